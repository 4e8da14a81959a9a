"""Do the experts work? Counts of the choices that vLLM itself reports for held-out text, not of transformers'.

L sparse layers, E experts, K chosen per token, S tokens of a sequence.
"""

from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moestro.config import RoutingGate
from moestro.deployment.gates.gate import Subject, Verdict, above, finite
from moestro.inference.client import Endpoint, routes_over_http
from moestro.inference.routes import routing_shape
from moestro.profiling.figures import load_variation, unused_experts

SHOWN = 6
"""How many dead experts a refusal lists."""


class Routing:
    """The gate: dead experts and the variation of their loads. A dense model has neither."""

    timed: ClassVar[bool] = False

    def __init__(self, subject: Subject) -> None:
        """Choose the text."""
        self._subject = subject
        length, tokens = subject.config.parity.sequence_length, subject.config.routing.max_tokens
        self._sequences = [
            window
            for domain in subject.tokens
            for window in subject.spread_windows(domain, length=length, max_tokens=tokens).tolist()
        ]
        self._counts_LE: Tensor | None = None

    def ask(self, endpoint: Endpoint, port: int) -> None:  # noqa: ARG002
        """Have the server route the text."""
        if self._subject.shape:
            routes = routes_over_http(endpoint, self._sequences, shape=self._subject.shape)
            self._counts_LE = count(routes, self._subject.shape.num_experts)

    def judge(self, network: PreTrainedModel) -> Verdict:  # noqa: ARG002
        """Hold the counts against the gate."""
        gate = self._subject.config.routing
        if self._counts_LE is None:
            return Verdict(refused=(), thresholds=gate, note=_note(self._subject))
        dead_LE = unused_experts(self._counts_LE, gate.dead_below)
        return Verdict(
            refused=tuple(refusals(self._counts_LE, gate)),
            thresholds=gate,
            figures={
                "routed_tokens": sum(map(len, self._sequences)),
                "experts": dead_LE.numel(),
                "dead_experts": int(dead_LE.sum()),
                "load_variation": finite(load_variation(self._counts_LE)),
            },
        )


def count(routes: Iterable[np.ndarray], num_experts: int) -> Tensor:
    """Tokens that chose each expert, int64 [L, E], from choices [S, L, K] of several sequences."""
    chosen = np.concatenate(list(routes)).astype(np.int64)
    layers = range(chosen.shape[1])
    counts_LE = [np.bincount(chosen[:, layer].ravel(), minlength=num_experts) for layer in layers]
    return torch.from_numpy(np.stack(counts_LE))


def refusals(counts_LE: Tensor, gate: RoutingGate) -> list[str]:
    """What is beyond the gate, with figures and thresholds."""
    refused = []
    dead_LE = unused_experts(counts_LE, gate.dead_below)
    dead = int(dead_LE.sum())
    if not dead <= gate.max_dead_share * dead_LE.numel():
        places = [f"{expert} of layer {layer}" for layer, expert in dead_LE.nonzero().tolist()]
        more = f" and {dead - SHOWN} more" if dead > SHOWN else ""
        refused.append(
            f"{dead} of {dead_LE.numel()} experts are dead ({', '.join(places[:SHOWN])}{more}; "
            f"at most {gate.max_dead_share:.0%} may be)"
        )
    return refused + above("the worst layer's load variation", load_variation(counts_LE), gate.max_load_variation)


def _note(subject: Subject) -> str:
    if routing_shape(subject.model.path) is None:
        return "not applicable: the model is dense"
    return "not measured: vLLM returns no routing for a model whose layers all slide"
