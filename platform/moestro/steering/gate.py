"""What a profile costs, measured before anyone may use it: held-out loss with and without it, in transformers.

N windows of S tokens, B of them in a batch, V vocabulary.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from moestro.artifacts import Artifact
from moestro.config import LossGate
from moestro.data.packed import PackedTokens
from moestro.errors import GateError, InputError
from moestro.models.steering_profiles import Method, Profile
from moestro.models.windows import TOKENS_PER_FORWARD, spread_windows
from moestro.steering.reference import steered_logits

MAX_LOGITS = 2**26
"""Logits of one forward pass stay below this many numbers."""
DIGITS = 6

Figures = dict[str, dict[str, float]]
"""By domain: loss, steered_loss and loss_increase in nats per token; for contrast also ruled_out."""


def measure(model: PreTrainedModel, profile: Profile, tokens: Mapping[str, Artifact], gate: LossGate) -> Figures:
    """Held-out loss of every domain with and without the profile.

    Contrast's is that of the mixed logits before tokens are ruled out, which truncates what is sampled, as top-p does;
    `ruled_out` is the share of held-out tokens it concerns. Raises `InputError` if there are no tokens.
    """
    if not tokens:
        raise InputError("There are no tokens to measure the profile on.", hint="Hand in at least one domain.")
    figures: Figures = {}
    for domain, artifact in tokens.items():
        windows_NS = spread_windows(
            PackedTokens.open(artifact.path, "held_out").ids,
            length=min(gate.sequence_length, model.config.max_position_embeddings),
            max_tokens=gate.max_tokens,
        )
        _check(model, windows_NS, domain)
        plain, steered = _loss(model, windows_NS, None), _loss(model, windows_NS, profile)
        found = {"loss": plain, "steered_loss": steered, "loss_increase": steered - plain}
        if profile.method == Method.CONTRAST:
            found["ruled_out"] = _ruled_out(model, windows_NS, profile)
        figures[domain] = {name: round(value, DIGITS) for name, value in found.items()}
    return figures


def require(figures: Figures, gate: LossGate) -> None:
    """Raise `GateError` naming figure and threshold if the loss of a domain grows by more than the gate allows."""
    # "not <=" so that a loss that is not a number is refused too
    refused = {
        domain: found["loss_increase"]
        for domain, found in figures.items()
        if not found["loss_increase"] <= gate.max_loss_increase
    }
    if refused:
        worst = "; ".join(f"{domain} by {increase:.4f}" for domain, increase in refused.items())
        raise GateError(
            f"The profile raises held-out loss beyond what its gate allows: {worst} nats per token "
            f"(at most {gate.max_loss_increase:g}).",
            hint="Steer fewer experts, or less, or allow more in gate.max_loss_increase.",
        )


def _check(model: PreTrainedModel, windows_NS: Tensor, domain: str) -> None:
    if windows_NS.shape[1] < 2:
        raise InputError(f"Domain {domain} has less than two held-out tokens.", hint="Hold out more text.")
    if (largest := int(windows_NS.max())) >= model.config.vocab_size:
        raise InputError(
            f"Token {largest} of domain {domain} is outside the model's vocabulary of {model.config.vocab_size}.",
            hint="The tokens were made with another tokenizer than the model's.",
        )


def _batches(model: PreTrainedModel, windows_NS: Tensor) -> tuple[Tensor, ...]:
    tokens = min(TOKENS_PER_FORWARD, MAX_LOGITS // model.config.vocab_size)
    return windows_NS.split(max(1, tokens // windows_NS.shape[1]))


def _loss(model: PreTrainedModel, windows_NS: Tensor, profile: Profile | None) -> float:
    total = 0.0
    for batch_BS in _batches(model, windows_NS):
        logits_BSV = steered_logits(model, batch_BS, profile, ruled=False)[:, :-1]
        targets_T = batch_BS[:, 1:].flatten().to(logits_BSV.device)
        total += float(functional.cross_entropy(logits_BSV.flatten(0, 1), targets_T, reduction="none").double().sum())
    return total / windows_NS[:, 1:].numel()


def _ruled_out(model: PreTrainedModel, windows_NS: Tensor, profile: Profile) -> float:
    floor = torch.log(torch.tensor(profile.parameters["alpha"]))
    count = 0
    for batch_BS in _batches(model, windows_NS):
        logits_BSV = steered_logits(model, batch_BS, None)[:, :-1]
        targets_BS = batch_BS[:, 1:, None].to(logits_BSV.device)
        own_BS = logits_BSV.gather(-1, targets_BS)[..., 0]
        count += int((own_BS < floor + logits_BSV.amax(dim=-1)).sum())
    return count / windows_NS[:, 1:].numel()
