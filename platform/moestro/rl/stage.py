"""The rl stage: rollouts, rewards, update, weight refresh, check; and again.

The training state is kept after every update. What an update does follows from the weights before it and its number
alone, so a run that was killed and resumed gives the bytes of one that was not.

Shapes: N prompts, G completions per prompt, B = N G sequences, S positions.
"""

import shutil
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moestro.artifacts import Artifact, Job, fingerprint
from moestro.config import RlConfig
from moestro.data.tasks import Problem, Task
from moestro.data.tokenizer import load_tokenizer
from moestro.errors import ConfigError
from moestro.inference.engine import Completion, Engine, EngineConfig, EngineFactory, Sampling
from moestro.inference.routes import require_routing, returned_routing
from moestro.models.checkpoint import is_moe, load_model, save_model
from moestro.models.files import read_origins
from moestro.rl.curriculum import Curriculum, build_curriculum, derived_seed
from moestro.rl.grpo import group_advantages
from moestro.rl.history import History
from moestro.rl.probe import pick, require_agreement, verify_refresh
from moestro.rl.rollouts import Rollouts, collate
from moestro.rl.update import Learner, old_logprobs, update
from moestro.training.optimizer import build_optimizer
from moestro.training.runtime import deterministic
from moestro.training.state import load_state, model_fingerprint, save_state

STATE, POLICY = "state", "policy"
"""Folders in scratch: the training state, and the present weights as a checkpoint for the engine."""


@dataclass(frozen=True)
class _Run:
    config: RlConfig
    job: Job
    task: Task
    tokenizer: Any
    curriculum: Curriculum
    learner: Learner
    source: Path
    moe: bool
    routes: bool
    """Whether the engine says which experts it chose."""
    owner: str
    """Whose the training state is."""

    @property
    def max_model_len(self) -> int:
        """Room for the longest rollout and the one token more that scoring it takes, as far as positions reach."""
        return _longest(self.config, self.curriculum, self.learner.model)


def rl(config: RlConfig, *, model: Artifact, engine: EngineFactory, job: Job) -> dict[str, Any]:
    """Train `model` on a verifiable task with GRPO; see the package for how, the config for with what.

    Raises `ConfigError` for replay on a dense model, `InputError` if prompts do not fit the model or vLLM returns no
    routing to replay, `TrainingError` if figures are not finite or a weight refresh does not hold.
    """
    moe = is_moe(model.path)
    if config.routing == "r3" and not moe:
        raise ConfigError(
            "rl.routing is r3, but the model is dense: there is no routing to replay.", hint="Set rl.routing to off."
        )
    origins = read_origins(model.path) if moe else None
    policy = load_model(model.path, dtype=torch.float32, tokenizer=True)
    run = _prepare(config, policy, model.path, moe, job)
    saved: dict[str, Any] = {}
    learner, state = run.learner, job.scratch / STATE
    done = load_state(
        state, model=policy, optimizer=learner.optimizer, schedule=learner.schedule, owner=run.owner, extra=saved
    )
    done = done or 0
    history = History.restore(saved)
    if done < config.steps:
        folder = _write_policy(run)
        with closing(engine(folder, _engine_config(run))) as rollout_engine:
            for step in range(done, config.steps):
                _step(run, rollout_engine, history, step)
    save_model(policy, job.out, tokenizer_from=model.path, origins=origins)
    history.publish(job.out)
    return dict(history.result())


def _prepare(config: RlConfig, policy: PreTrainedModel, source: Path, moe: bool, job: Job) -> _Run:
    tokenizer = load_tokenizer(source)
    task = Task.open(config.task)
    positions = int(policy.config.max_position_embeddings)
    curriculum = build_curriculum(config, task, tokenizer, max_positions=positions)
    longest = _longest(config, curriculum, policy)
    if config.routing == "r3":
        require_routing(source, longest, hint="Set rl.routing to off, or lower rl.max_tokens.")
    optimizer, schedule = build_optimizer(policy, config.optimizer, config.steps * config.mini_steps)
    learner = Learner(policy, optimizer, schedule, config)
    routes = returned_routing(source, longest) is not None
    owner = fingerprint("rl state", "1", config, {"model": model_fingerprint(policy)})
    return _Run(config, job, task, tokenizer, curriculum, learner, source, moe, routes, owner)


def _longest(config: RlConfig, curriculum: Curriculum, model: PreTrainedModel) -> int:
    return min(curriculum.longest_prompt + config.max_tokens + 1, int(model.config.max_position_embeddings))


def _engine_config(run: _Run) -> EngineConfig:
    return EngineConfig(
        dtype=run.config.rollout_dtype,
        max_model_len=run.max_model_len,
        routes=run.routes,
        threads=run.job.resources.cpus,
    )


def _write_policy(run: _Run) -> Path:
    """The present weights as a checkpoint in scratch. A new file each time: the engine may have mapped the old one."""
    folder = run.job.scratch / POLICY
    shutil.rmtree(folder, ignore_errors=True)
    save_model(run.learner.model, folder, tokenizer_from=run.source)
    return folder


def _step(run: _Run, engine: Engine, history: History, step: int) -> None:
    """Update number `step` (from 0), through to the refreshed and checked engine and the saved state."""
    config, learner, number = run.config, run.learner, step + 1
    started = time.monotonic()
    rollouts, figures = _rollouts(run, engine, step)
    speed = history.rollout.add(rollouts.tokens, time.monotonic() - started)
    started = time.monotonic()
    with deterministic():
        old_BS, compared = old_logprobs(learner, rollouts)
    if config.rollout_dtype == "float32" and (learner.replay or not run.moe):
        require_agreement(compared["sampling/logp_difference/max"], config, step=number, what="in its rollouts")
    learning_rate = float(learner.schedule.get_last_lr()[0])
    with deterministic():
        figures |= compared | update(learner, rollouts, old_BS, step=number) | {"learning_rate": learning_rate}
    update_speed = history.update.add(int(rollouts.real_BS.sum()), time.monotonic() - started)
    engine.refresh(_write_policy(run))
    figures["sync/max_abs_dlogp"] = verify_refresh(
        engine, learner.model, _probe_sequences(rollouts, run.max_model_len - 1), config, step=number
    )
    history.steps.append({"step": number, **figures})
    save_state(
        run.job.scratch / STATE,
        number,
        model=learner.model,
        optimizer=learner.optimizer,
        schedule=learner.schedule,
        owner=run.owner,
        extra=history.state(),
    )
    speeds = {"rollout/tokens_per_second": speed, "update/tokens_per_second": update_speed}
    run.job.reporter.metrics(figures | speeds, number)
    run.job.reporter.progress(number, config.steps, f"reward {figures['reward']:.3f}")


def _rollouts(run: _Run, engine: Engine, step: int) -> tuple[Rollouts, dict[str, float]]:
    """Completions of the step's problems with their advantages, and the figures of their rewards."""
    config, prompts = run.config, run.curriculum.prompts[step]
    sampling = Sampling(
        n=config.num_generations,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        seed=derived_seed(config.seed, step, "sampling"),
        stop_token_ids=run.curriculum.stop_token_ids,
    )
    groups = engine.generate(prompts, sampling)
    rewards_NG = _rewards(run, groups, step)
    std_N = rewards_NG.std(dim=1)
    answers = [answer for group in groups for answer in group]
    figures = {
        "reward": float(rewards_NG.mean()),
        "reward_std": float(std_N.mean()),
        "frac_reward_zero_std": float((std_N == 0).double().mean()),
        "completions/mean_length": sum(len(answer.token_ids) for answer in answers) / len(answers),
        "completions/clipped_ratio": sum(answer.finish_reason == "length" for answer in answers) / len(answers),
    }
    return collate(prompts, groups, group_advantages(rewards_NG)), figures


def _rewards(run: _Run, groups: list[list[Completion]], step: int) -> torch.Tensor:
    def reward(problem: Problem, answer: Completion) -> float:
        score = run.task.score(problem, run.tokenizer.decode(answer.token_ids, skip_special_tokens=True))
        return score if run.config.reward == "graded" else float(score == 1.0)

    pairs = zip(run.curriculum.problems[step], groups, strict=True)
    return torch.tensor([[reward(problem, answer) for answer in group] for problem, group in pairs])


def _probe_sequences(rollouts: Rollouts, max_length: int) -> list[list[int]]:
    sequences = []
    for inputs_S, targets_S, real_S in zip(rollouts.inputs_BS, rollouts.targets_BS, rollouts.real_BS, strict=True):
        length = int(real_S.sum())
        sequences.append([*inputs_S[:length].tolist(), int(targets_S[length - 1])])
    return pick(sequences, max_length=max_length)
