"""DPO, the offline sibling: learn from pairs of a better and a worse answer to the same prompt (arXiv 2305.18290).

L = -log sigmoid(beta ((log p(y+) - log p_ref(y+)) - (log p(y-) - log p_ref(y-)))), eq. 7, mean over pairs; an answer's
log-probability is the sum over its tokens, end of text included.

Shapes: P pairs, B = 2P sequences (chosen and rejected in turn), S positions.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

from moestro.artifacts import Artifact, Job, fingerprint
from moestro.config import DpoConfig
from moestro.data.tokenizer import encode, load_tokenizer
from moestro.errors import InputError, TrainingError
from moestro.inference.engine import Completion
from moestro.models.checkpoint import load_model, save_model
from moestro.models.files import known_origins
from moestro.rl.history import NAME
from moestro.rl.policy import policy_logprobs
from moestro.rl.rollouts import Rollouts, collate
from moestro.training.optimizer import build_optimizer
from moestro.training.runtime import deterministic
from moestro.training.state import load_state, model_fingerprint, save_state

STATE = "state"
CHECKPOINT_EVERY = 20
"""Optimiser steps."""


class Pair(BaseModel):
    """A line of the pairs' file."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class _Tokens:
    """A pair as token ids."""

    prompt: list[int]
    answers: tuple[list[int], list[int]]


def dpo(config: DpoConfig, *, model: Artifact, job: Job) -> dict[str, Any]:
    """Train `model` on the pairs of `config.pairs`; write the checkpoint into `job.out`.

    Raises `InputError` naming the line for a file that does not hold pairs, or a pair whose answers are the same, that
    is longer than the model's positions or has tokens that the model has not, `TrainingError` if loss or gradient is
    not finite.
    """
    policy = load_model(model.path, dtype=torch.float32, tokenizer=True)
    origins = known_origins(model.path)
    pairs = _read(Path(config.pairs).expanduser(), load_tokenizer(model.path), policy)
    owner = fingerprint("dpo state", "1", config.identity(), {"model": model_fingerprint(policy)})
    with deterministic():
        reference = torch.cat([_answer_logprobs(policy, batch) for batch in _batches(pairs, config)])
    steps = list(_steps(config, len(pairs)))
    optimizer, schedule = build_optimizer(policy, config.optimizer, len(steps))
    state, saved = job.scratch / STATE, dict[str, Any]()
    done = load_state(state, model=policy, optimizer=optimizer, schedule=schedule, owner=owner, extra=saved) or 0
    rows: list[dict[str, float]] = saved.get("steps", [])
    for number, chosen in enumerate(steps[done:], start=done + 1):
        with deterministic():
            figures = _step(policy, optimizer, config, [pairs[one] for one in chosen], reference[chosen], number)
        figures["learning_rate"] = float(schedule.get_last_lr()[0])
        schedule.step()
        rows.append({"step": number, **figures})
        if number % CHECKPOINT_EVERY == 0 or number == len(steps):
            save_state(
                state,
                number,
                model=policy,
                optimizer=optimizer,
                schedule=schedule,
                owner=owner,
                extra={"steps": rows},
            )
        job.reporter.metrics(figures, number)
        job.reporter.progress(number, len(steps), f"loss {figures['loss']:.3f}")
    save_model(policy, job.out, tokenizer_from=model.path, origins=origins)
    (job.out / NAME).write_text(json.dumps({"steps": rows}, indent=1) + "\n")
    return {"pairs": len(pairs), "steps": len(steps)} | {
        name: rows[-1][name] for name in ("loss", "rewards/accuracies", "rewards/margins")
    }


def preference_loss(policy_P2: Tensor, reference_P2: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Losses [P] and implicit rewards [P, 2], beta (log p - log p_ref), of chosen and rejected answers."""
    rewards_P2 = beta * (policy_P2 - reference_P2)
    return -nn.functional.logsigmoid(rewards_P2[:, 0] - rewards_P2[:, 1]), rewards_P2


def _read(path: Path, tokenizer: Any, model: PreTrainedModel) -> list[_Tokens]:
    pairs = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    pairs.append(_tokens(Pair.model_validate_json(line), tokenizer))
                except ValidationError as error:
                    first = error.errors()[0]
                    where = ".".join(map(str, first["loc"])) or "the line"
                    raise InputError(
                        f"{path}, line {number}: {where}: {first['msg']}.",
                        hint='Each line is {"prompt": ..., "chosen": ..., "rejected": ...}.',
                    ) from None
                _check(pairs[-1], model, where=f"{path}, line {number}")
    if not pairs:
        raise InputError(f"{path} holds no pairs.")
    return pairs


def _check(pair: _Tokens, model: PreTrainedModel, *, where: str) -> None:
    if pair.answers[0] == pair.answers[1]:
        raise InputError(
            f"{where}: chosen and rejected are the same answer, from which nothing can be learnt.", hint="Leave it out."
        )
    longest = len(pair.prompt) + max(map(len, pair.answers))
    if longest > model.config.max_position_embeddings:
        raise InputError(
            f"{where}: {longest} tokens, the model has {model.config.max_position_embeddings} positions.",
            hint="Shorten it or leave it out.",
        )
    largest = max(max(ids) for ids in (pair.prompt, *pair.answers))
    if largest >= model.config.vocab_size:
        raise InputError(
            f"{where}: the checkpoint's tokenizer writes it with token {largest}, its model has only "
            f"{model.config.vocab_size}.",
            hint="The tokenizer is another model's: put the model's own beside its weights.",
        )


def _tokens(pair: Pair, tokenizer: Any) -> _Tokens:
    prompt, chosen, rejected = encode(tokenizer, [pair.prompt, pair.chosen, pair.rejected])
    end = [tokenizer.eos_token_id]
    return _Tokens(prompt or end, (chosen + end, rejected + end))


def _steps(config: DpoConfig, count: int) -> Iterator[list[int]]:
    """The pairs of each optimiser step; every epoch in another order."""
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.epochs):
        order: list[int] = torch.randperm(count, generator=generator).tolist()
        yield from (order[start : start + config.batch_size] for start in range(0, count, config.batch_size))


def _batches(pairs: list[_Tokens], config: DpoConfig) -> Iterator[Rollouts]:
    for start in range(0, len(pairs), config.micro_batch_size):
        some = pairs[start : start + config.micro_batch_size]
        groups = [
            [Completion(ids, np.zeros(len(ids), np.float32), None, "stop") for ids in pair.answers] for pair in some
        ]
        yield collate([pair.prompt for pair in some], groups, torch.zeros(len(some), 2))


def _answer_logprobs(model: PreTrainedModel, batch: Rollouts, *, attached: bool = False) -> Tensor:
    """[P, 2]: log-probabilities of whole answers in nats."""
    with torch.set_grad_enabled(attached):
        return policy_logprobs(model, batch, temperature=1.0).sum(dim=1).unflatten(0, (-1, 2))


def _step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    config: DpoConfig,
    pairs: list[_Tokens],
    reference_P2: Tensor,
    number: int,
) -> dict[str, float]:
    optimizer.zero_grad(set_to_none=True)
    losses, rewards, logps, row = [], [], [], 0
    for batch in _batches(pairs, config):
        logprobs_P2 = _answer_logprobs(model, batch, attached=True)
        loss_P, rewards_P2 = preference_loss(logprobs_P2, reference_P2[row : row + len(logprobs_P2)], config.beta)
        (loss_P.sum() / len(pairs)).backward()
        losses.append(loss_P.detach())
        rewards.append(rewards_P2.detach())
        logps.append(logprobs_P2.detach())
        row += len(logprobs_P2)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
    loss, rewards_P2, logps_P2 = torch.cat(losses).mean(), torch.cat(rewards), torch.cat(logps)
    if not torch.isfinite(torch.stack([loss, norm])).all():
        raise TrainingError(
            f"dpo step {number}: loss {float(loss)} or gradient norm {float(norm)} is not finite.",
            hint="Lower rl.optimizer.learning_rate.",
        )
    optimizer.step()
    return {
        "loss": float(loss),
        "grad_norm": float(norm),
        "rewards/chosen": float(rewards_P2[:, 0].mean()),
        "rewards/rejected": float(rewards_P2[:, 1].mean()),
        "rewards/accuracies": float((rewards_P2[:, 0] > rewards_P2[:, 1]).float().mean()),
        "rewards/margins": float((rewards_P2[:, 0] - rewards_P2[:, 1]).mean()),
        "logps/chosen": float(logps_P2[:, 0].mean()),
        "logps/rejected": float(logps_P2[:, 1].mean()),
    }
