"""What the checkpoint is worth: held-out loss per domain, and the accuracy of greedy answers to a task.

Both are measured with transformers, whose numbers the server's are (the parity gate sees to that).
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from moestro.artifacts import canonical_json
from moestro.config import QualityGate
from moestro.data.tasks import Problem, Task
from moestro.data.tokenizer import encode, load_tokenizer
from moestro.deployment.gates.gate import Subject, Verdict, above, digest, finite
from moestro.errors import InputError
from moestro.evaluation import Answer, greedy_answers, held_out_loss
from moestro.inference.client import Endpoint

# Every candidate answers the same problems, those that `evaluate` asks.
PROBLEMS_SEED = 0


class Quality:
    """The gate: losses and accuracy as such; `comparison` holds them against the champion's."""

    timed: ClassVar[bool] = False

    def __init__(self, subject: Subject) -> None:
        """Choose text and problems.

        Raises `InputError` for a bound on an unknown domain, for too few problems, and for ones too long to be served.
        """
        self._subject = subject
        gate = subject.config.quality
        if unknown := sorted(set(gate.max_held_out_loss) - set(subject.tokens)):
            raise InputError(
                f"deploy.quality.max_held_out_loss bounds {unknown[0]!r}, which is no domain.",
                hint=f"Domains are {', '.join(subject.tokens)}.",
            )
        length = min(gate.sequence_length, subject.config.max_model_len)
        self._windows = {
            domain: subject.spread_windows(domain, length=length, max_tokens=gate.max_tokens)
            for domain in subject.tokens
        }
        self._task = Task.open(gate.task) if gate.task else None
        self._problems = self._task.problems(gate.problems, split="held_out", seed=PROBLEMS_SEED) if self._task else []
        self._tokenizer = load_tokenizer(subject.model.path) if self._task else None
        self._check_length()

    def ask(self, endpoint: Endpoint, port: int) -> None:
        """Nothing: the checkpoint is measured, not the server."""

    def judge(self, network: PreTrainedModel) -> Verdict:
        """Measure losses and answers."""
        gate = self._subject.config.quality
        losses = {domain: held_out_loss(network, windows_NS) for domain, windows_NS in self._windows.items()}
        answers = self._answers(network)
        accuracy = sum(answer.correct for answer in answers) / len(answers) if answers else None
        return Verdict(
            refused=tuple(refusals(losses, accuracy, gate)),
            thresholds=gate,
            figures={
                "held_out_loss": {domain: finite(loss) for domain, loss in losses.items()},
                "task_accuracy": finite(accuracy),
            },
            evidence={
                "text": {domain: text_identity(windows_NS) for domain, windows_NS in self._windows.items()},
                "task": self._task_identity(answers),
            },
        )

    def _answers(self, network: PreTrainedModel) -> list[Answer]:
        if self._task is None:
            return []
        longest = self._subject.config.quality.max_answer_tokens
        return greedy_answers(network, self._tokenizer, self._task, self._problems, longest)

    def _check_length(self) -> None:
        config = self._subject.config
        prompts = encode(self._tokenizer, [problem.prompt for problem in self._problems]) if self._task else []
        longest = max(map(len, prompts), default=0) + config.quality.max_answer_tokens
        if longest > config.max_model_len:
            raise InputError(
                f"The longest problem of deploy.quality.task and its answer need {longest} positions, "
                f"{config.max_model_len} are served.",
                hint="Raise deploy.max_model_len, choose shorter problems, or lower deploy.quality.max_answer_tokens.",
            )

    def _task_identity(self, answers: Sequence[Answer]) -> dict[str, object] | None:
        gate = self._subject.config.quality
        if gate.task is None:
            return None
        return {
            "name": gate.task.name,
            "problems": problems_identity(self._problems, gate.max_answer_tokens),
            "right": "".join("1" if answer.correct else "0" for answer in answers),
        }


def refusals(losses: Mapping[str, float], accuracy: float | None, gate: QualityGate) -> list[str]:
    """What is beyond the gate's absolute bounds, and losses that are no numbers, with figures and thresholds.

    Accuracy is taken as it is: for one model on fixed problems, answered greedily, it has no noise.
    """
    refused = [
        words
        for domain, loss in losses.items()
        for words in above(
            f"the held-out loss of {domain}", loss, gate.max_held_out_loss.get(domain), " nats per token"
        )
    ]
    if gate.min_accuracy is not None and not (accuracy is not None and accuracy >= gate.min_accuracy):
        refused.append(f"task accuracy is {accuracy} (at least {gate.min_accuracy:g} is asked for)")
    return refused


def text_identity(windows_NS: Tensor) -> str:
    """Identity of a text as a model reads it: shape and token ids, wherever they come from."""
    ids = windows_NS.numpy().astype("<i8")
    return digest(np.array(ids.shape, "<i8").tobytes() + ids.tobytes())


def problems_identity(problems: Sequence[Problem], max_answer_tokens: int) -> str:
    """Identity of what was asked, in its order, and of how long an answer may be."""
    asked = [[problem.prompt, problem.answer] for problem in problems]
    return digest(canonical_json([max_answer_tokens, asked]).encode())
