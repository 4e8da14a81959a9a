"""Does the served model compute what its checkpoint says? The same token ids through both, compared token by token.

Shapes: S tokens of a sequence, L layers, K chosen experts.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from transformers import PreTrainedModel

from moestro.config import ParityGate
from moestro.data.packed import PackedTokens
from moestro.deployment.gates.gate import Subject, Verdict, finite
from moestro.errors import InputError
from moestro.inference.client import Endpoint, score_over_http
from moestro.inference.engine import Scored
from moestro.inference.routes import routing_shape
from moestro.models.routing import record_routes


class Parity:
    """The gate: the server's answers against transformers'."""

    timed: ClassVar[bool] = False

    def __init__(self, subject: Subject) -> None:
        """Choose the text; raises `InputError` for a domain without as many held-out windows as the gate asks for."""
        self._subject = subject
        self._sequences = _windows(subject)
        self._served: list[Scored] = []

    def ask(self, endpoint: Endpoint, port: int) -> None:  # noqa: ARG002
        """Score the sequences over REST."""
        self._served = score_over_http(endpoint, self._sequences, shape=self._subject.shape)

    def judge(self, network: PreTrainedModel) -> Verdict:
        """Score them with transformers and compare."""
        subject, gate = self._subject, self._subject.config.parity
        expected = reference(network, self._sequences, routes=subject.shape is not None)
        differences = compare(self._served, expected)
        return Verdict(
            refused=tuple(refusals(differences, gate)),
            thresholds=gate,
            figures=differences.figures(),
            note=_note(subject),
        )


def _windows(subject: Subject) -> list[list[int]]:
    """The first held-out windows of every domain."""
    gate = subject.config.parity
    windows: list[list[int]] = []
    for domain, artifact in subject.tokens.items():
        found = PackedTokens.open(artifact.path, "held_out").windows(gate.sequence_length)
        if len(found) < gate.sequences:
            raise InputError(
                f"Domain {domain} has {len(found)} held-out windows of {gate.sequence_length} tokens, "
                f"the gate wants {gate.sequences}.",
                hint="Lower deploy.parity.sequences or deploy.parity.sequence_length, or hold out more text.",
            )
        windows += found[: gate.sequences].tolist()
    return windows


def _note(subject: Subject) -> str:
    if subject.shape:
        return ""
    if routing_shape(subject.model.path) is None:
        return "routing was not compared: the model is dense"
    return "routing was not compared: vLLM returns none for a model whose layers all slide"


@dataclass(frozen=True)
class Differences:
    """How far two models are apart on the same tokens."""

    tokens: int
    """Compared log-probabilities."""
    max_logprob_difference: float
    """Largest difference of a token's log-probability, nats."""
    mean_logprob_difference: float
    """Mean absolute difference, nats."""
    routing_agreement: float | None
    """Share of (token, layer) pairs routed to the same set of experts; None where the server returns no routing."""

    def figures(self) -> dict[str, float | None]:
        """By name, rounded to a millionth; None where there is no number."""
        return {
            "tokens": self.tokens,
            "max_logprob_difference": finite(self.max_logprob_difference),
            "mean_logprob_difference": finite(self.mean_logprob_difference),
            "routing_agreement": finite(self.routing_agreement),
        }


@torch.no_grad()
def reference(model: PreTrainedModel, sequences: list[list[int]], *, routes: bool) -> list[Scored]:
    """`sequences` under transformers: what the server must answer."""
    return [_score(model, sequence, routes=routes) for sequence in sequences]


def _score(model: PreTrainedModel, sequence: list[int], *, routes: bool) -> Scored:
    tokens_1S = torch.tensor([sequence])
    routes_SLK = None
    if routes:
        with record_routes(model) as record:
            logits_SV = model(input_ids=tokens_1S, use_cache=False).logits[0]
        routes_SLK = record.routes().numpy()
    else:
        logits_SV = model(input_ids=tokens_1S, use_cache=False).logits[0]
    logprobs_SV = logits_SV[:-1].float().log_softmax(dim=-1)
    return Scored(logprobs_SV.gather(1, tokens_1S[0, 1:, None])[:, 0].numpy(), routes_SLK)


def compare(served: list[Scored], expected: list[Scored]) -> Differences:
    """The differences between two scorings of the same sequences."""
    pairs = list(zip(served, expected, strict=True))
    differences = np.concatenate([np.abs(ours.logprobs - theirs.logprobs) for ours, theirs in pairs])
    agreements = [
        (np.sort(ours.routes, axis=-1) == np.sort(theirs.routes, axis=-1)).all(axis=-1).ravel()
        for ours, theirs in pairs
        if ours.routes is not None and theirs.routes is not None
    ]
    return Differences(
        tokens=differences.size,
        max_logprob_difference=float(differences.max()),
        mean_logprob_difference=float(differences.mean()),
        routing_agreement=float(np.concatenate(agreements).mean()) if agreements else None,
    )


def refusals(found: Differences, gate: ParityGate) -> list[str]:
    """What is beyond the gate, with figures and thresholds."""
    refused = []
    # "not <=" so that a difference that is not a number is refused too
    if not found.max_logprob_difference <= gate.max_logprob_difference:
        refused.append(
            f"over {found.tokens} held-out tokens log-probabilities differ by up to "
            f"{found.max_logprob_difference:.3g} nats (mean {found.mean_logprob_difference:.3g}; "
            f"at most {gate.max_logprob_difference:g} is allowed)"
        )
    if found.routing_agreement is not None and not found.routing_agreement >= gate.min_routing_agreement:
        refused.append(
            f"only {found.routing_agreement:.2%} of routings agree with transformers' "
            f"(at least {gate.min_routing_agreement:.2%} must)"
        )
    return refused
