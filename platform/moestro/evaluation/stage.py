"""The `evaluate` stage: what a checkpoint is worth on every domain's held-out text and on a task."""

import json
import math
from collections.abc import Mapping
from typing import Any

from moestro.artifacts import Artifact, Job
from moestro.config import EvaluateConfig
from moestro.data.packed import PackedTokens
from moestro.data.tasks import Task
from moestro.data.tokenizer import load_tokenizer
from moestro.errors import InputError
from moestro.evaluation.answers import Answer, greedy_answers, sampled_accuracy
from moestro.evaluation.loss import held_out_loss
from moestro.models.checkpoint import load_model

# Every checkpoint answers the same problems.
PROBLEMS_SEED = 0
SAMPLES = 8


def evaluate(config: EvaluateConfig, *, model: Artifact, tokens: Mapping[str, Artifact], job: Job) -> dict[str, Any]:
    """Write `evaluation.json`: held-out loss per domain (nats per token), task accuracy of greedy and of sampled
    answers, a few answers.

    Works for dense and MoE checkpoints. Raises `InputError` if a domain has less than one held-out window.
    """
    if not tokens:
        raise InputError("There is nothing to evaluate on: no domain was given.")
    network = load_model(model.path)
    steps = len(tokens) + (config.task is not None)
    losses: dict[str, float] = {}
    counts: dict[str, int] = {}
    for step, (name, artifact) in enumerate(tokens.items(), 1):
        held_out = PackedTokens.open(artifact.path, "held_out")
        windows_NS = held_out.windows(config.sequence_length)[: max(1, config.max_tokens // config.sequence_length)]
        losses[name] = held_out_loss(network, windows_NS)
        counts[name] = windows_NS.shape[0] * (windows_NS.shape[1] - 1)
        job.reporter.progress(step, steps, f"{name}: {losses[name]:.3f} nats per token")
    answers, sampled = _answers(config, network, model)
    accuracy = sum(answer.correct for answer in answers) / len(answers) if answers else None
    if accuracy is not None:
        job.reporter.progress(steps, steps, f"task accuracy {accuracy:.3f}")
    _write(config, job, losses, answers, {"accuracy": accuracy, "sampled_accuracy": sampled})
    return {
        "held_out_loss": losses,
        "geometric_mean_perplexity": math.exp(sum(losses.values()) / len(losses)),
        "task_accuracy": accuracy,
        "sampled_accuracy": sampled,
        "tokens": counts,
    }


def _answers(config: EvaluateConfig, network: Any, model: Artifact) -> tuple[list[Answer], float | None]:
    """The greedy ones, and the accuracy of sampled ones."""
    if config.task is None:
        return [], None
    task, tokenizer = Task.open(config.task), load_tokenizer(model.path)
    problems = task.problems(config.problems, split="held_out", seed=PROBLEMS_SEED)
    answers = greedy_answers(network, tokenizer, task, problems, config.max_answer_tokens)
    if not config.num_samples:
        return answers, None
    shares = sampled_accuracy(
        network,
        tokenizer,
        task,
        problems,
        config.max_answer_tokens,
        samples=config.num_samples,
        seed=PROBLEMS_SEED,
    )
    return answers, sum(shares) / len(shares)


def _write(
    config: EvaluateConfig,
    job: Job,
    losses: dict[str, float],
    answers: list[Answer],
    accuracies: dict[str, float | None],
) -> None:
    task = {"name": config.task.name, "problems": len(answers), **accuracies} if config.task else None
    samples = [
        {
            "prompt": answer.problem.prompt,
            "answer": answer.problem.answer,
            "completion": answer.completion,
            "score": answer.score,
        }
        for answer in answers[:SAMPLES]
    ]
    content = {"held_out_loss": losses, "task": task, "samples": samples}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (job.out / "evaluation.json").write_text(text, encoding="utf-8")
