"""`Sampler`: the rollouts of each step, sampled and judged once and kept on disk.

Shapes: N prompts, G completions per prompt, F reward functions.
"""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moestro.config import RlConfig
from moestro.errors import InputError
from moestro.inference.engine import Completion, Engine, Sampling
from moestro.rl.advantages import advantages, group_std
from moestro.rl.curriculum import Curriculum, derived_seed
from moestro.rl.records import Provenance, RolloutRecord, Writer, find_record, read_record, write_record
from moestro.rl.rewards import Answered, Judge, Verdicts
from moestro.rl.rollouts import Rollouts, collate

UNJUDGED = "unjudged"
"""Folder beside that of the records: rollouts that users' rewards have not judged yet."""


@dataclass(frozen=True)
class Sampled:
    """The rollouts of a step."""

    record: RolloutRecord
    seconds: float | None
    """What sampling them took; None if they were found on disk."""

    @property
    def tokens(self) -> int:
        """Completion tokens."""
        return sum(len(answer.token_ids) for group in self.record.groups for answer in group)


@dataclass(frozen=True)
class Sampler:
    """What is asked of the engine, and of the rewards."""

    config: RlConfig
    curriculum: Curriculum
    judge: Judge
    tokenizer: Any
    records: Writer
    model: str
    """Identity of the model that the stage began with."""

    def obtain(self, engine: Engine, step: int, *, version: int) -> Sampled:
        """The rollouts of `step` (from 0), from disk, or by an engine whose policy has had `version` updates.

        They are on disk once `records` has settled, which has to be before that policy is gone. What users' rewards
        are asked about is kept first: if one fails, or the run dies meanwhile, it is not sampled again. Raises
        `InputError` if rollouts on disk are damaged or not of that policy, or what a reward raises.
        """
        begun = self.records.begun(step + 1)
        if begun is not None:
            return Sampled(begun, None)
        found = find_record(self.records.folder, step + 1)
        if found is not None:
            return Sampled(self._read(found, step), None)
        kept = find_record(self._unjudged, step + 1)
        sampled_here, started = kept is None, time.monotonic()
        raw = self._sample(engine, step, version) if kept is None else self._read(kept, step)
        if sampled_here and self.judge.may_fail:
            kept = write_record(self._unjudged, raw)
        record = replace(raw, verdicts=self._verdicts(raw, step))
        self.records.begin(record, None if kept is None else kept.unlink)
        return Sampled(record, time.monotonic() - started if sampled_here else None)

    @property
    def _unjudged(self) -> Path:
        return self.records.folder.with_name(UNJUDGED)

    def _provenance(self, step: int) -> Provenance:
        """What the rollouts of `step` (from 0) have to come from."""
        return Provenance(
            step=step + 1,
            policy_version=max(0, step - self.config.max_staleness),
            model=self.model,
            dtype=self.config.rollout_dtype,
            temperature=self.config.temperature,
            max_tokens=self.config.max_tokens,
            seed=derived_seed(self.config.seed, step, "sampling"),
        )

    def _read(self, path: Path, step: int) -> RolloutRecord:
        record, wanted = read_record(path), asdict(self._provenance(step))
        other = {name: value for name, value in asdict(record.provenance).items() if value != wanted[name]}
        if other:
            told = ", ".join(f"{name} {value} and not {wanted[name]}" for name, value in other.items())
            raise InputError(
                f"{path} holds rollouts of another policy: {told}.",
                hint=f"Delete {self.records.folder.parent} to begin anew.",
            )
        return record

    def _sample(self, engine: Engine, step: int, version: int) -> RolloutRecord:
        config, prompts, provenance = self.config, self.curriculum.prompts[step], self._provenance(step)
        if version != provenance.policy_version:
            raise InputError(
                f"The rollouts of rl step {step + 1} are gone, and so is the policy that sampled them.",
                hint=f"Delete {self.records.folder.parent} to begin anew.",
            )
        sampling = Sampling(
            n=config.num_generations,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            seed=provenance.seed,
            stop_token_ids=self.curriculum.stop_token_ids,
        )
        groups = engine.generate(prompts, sampling)
        nothing_NG = torch.full((len(prompts), config.num_generations), torch.nan)
        return RolloutRecord(prompts, groups, Verdicts(nothing_NG[None], nothing_NG, failures=0), provenance)

    def _verdicts(self, raw: RolloutRecord, step: int) -> Verdicts:
        ids = [answer.token_ids for group in raw.groups for answer in group]
        group = self.config.num_generations
        answered = Answered(
            problems=[problem for problem in self.curriculum.problems[step] for _ in range(group)],
            completions=[self.tokenizer.decode(row, skip_special_tokens=True) for row in ids],
            completion_ids=ids,
        )
        return self.judge.judge(answered, step=step + 1, group=group)


def as_batch(config: RlConfig, record: RolloutRecord) -> Rollouts:
    """The record as a batch that the trainer learns from."""
    return collate(record.prompts, record.groups, advantages(record.verdicts.total_NG, config.scaling))


def figures(record: RolloutRecord, names: list[str]) -> dict[str, float]:
    """Rewards and lengths under the field's names; `names` are those of the reward functions."""
    verdicts, answers = record.verdicts, [answer for group in record.groups for answer in group]
    std_N = group_std(verdicts.total_NG)
    return {
        "reward": _mean(verdicts.total_NG),
        "reward_std": float(std_N.mean()),
        "frac_reward_zero_std": float((std_N == 0).double().mean()),
        **_by_function(verdicts, names),
        **_lengths(answers),
        "staleness": float(record.provenance.step - 1 - record.provenance.policy_version),
    }


def _by_function(verdicts: Verdicts, names: list[str]) -> dict[str, float]:
    found = {}
    for name, rewards_NG in zip(names, verdicts.by_function_FNG, strict=True):
        found[f"rewards/{name}/mean"] = _mean(rewards_NG)
        found[f"rewards/{name}/std"] = float(group_std(rewards_NG.reshape(1, -1))[0])
    found["rewards/unjudged"] = float(verdicts.total_NG.isnan().double().mean())
    found["rewards/failures"] = float(verdicts.failures)
    return found


def _mean(rewards: torch.Tensor) -> float:
    """Of those that were given; 0 if none was."""
    return float(rewards.nan_to_num().sum() / (~rewards.isnan()).sum().clamp(min=1))


def _lengths(answers: list[Completion]) -> dict[str, float]:
    lengths = [len(answer.token_ids) for answer in answers]
    return {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": sum(answer.finish_reason == "length" for answer in answers) / len(answers),
    }
