"""The rl stage: rollouts, rewards, update, weight refresh, check; and again.

Training state and rollouts are kept after every update. What an update does follows from the weights before it and its
number alone, so a run that was killed and resumed gives the bytes of one that was not.
"""

import copy
import shutil
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moestro.artifacts import Artifact, Job, fingerprint
from moestro.config import AnyRl, DpoConfig, RlConfig
from moestro.data.tasks import Task
from moestro.data.tokenizer import load_tokenizer
from moestro.errors import ConfigError
from moestro.inference.engine import EngineConfig, EngineFactory
from moestro.inference.routes import require_routing, returned_routing
from moestro.models.checkpoint import is_moe, load_model, save_model
from moestro.models.files import known_origins
from moestro.rl.ahead import Ahead
from moestro.rl.curriculum import build_curriculum
from moestro.rl.engine import TenaciousEngine, count_restarts
from moestro.rl.history import History
from moestro.rl.preferences import dpo
from moestro.rl.preflight import preflight, require_alignment
from moestro.rl.probe import Agreement, pick, require_agreement, verify_refresh
from moestro.rl.records import Writer
from moestro.rl.rewards import Judge
from moestro.rl.rollouts import Rollouts
from moestro.rl.routing import Mode, choose
from moestro.rl.sampling import Sampler, as_batch, figures
from moestro.rl.update import Learner, prepare, update
from moestro.training.optimizer import build_optimizer
from moestro.training.runtime import deterministic
from moestro.training.state import load_state, model_fingerprint, save_state

STATE, POLICY, ROLLOUTS, RESTARTS = "state", "policy", "rollouts", "restarts"
"""In scratch: the training state, the present weights as a checkpoint for the engine, records of rollouts, and a file
with a line for each restart of the engine."""


@dataclass(frozen=True)
class _Run:
    config: RlConfig
    job: Job
    learner: Learner
    sampler: Sampler
    source: Path
    moe: bool
    returned: bool
    """Whether the engine says which experts it chose."""
    owner: str
    """Whose the training state is."""

    @property
    def max_model_len(self) -> int:
        """Room for the longest rollout and the one token more that scoring it takes, as far as positions reach."""
        return _longest(self.config, self.sampler.curriculum.longest_prompt, self.learner.model)


def rl(config: AnyRl, *, model: Artifact, engine: EngineFactory, job: Job) -> dict[str, Any]:
    """Train `model` on a verifiable task, or on pairs of answers; see the package for how, the config for with what.

    Raises `ConfigError` for replay on a dense model or a reward that is not there, `InputError` if prompts or answers
    do not fit the model, vLLM returns no routing to replay, or a reward fails, `TrainingError` if figures are not
    finite, routing is not where it belongs, or a weight refresh does not hold.
    """
    if isinstance(config, DpoConfig):
        return dpo(config, model=model, job=job)
    moe = is_moe(model.path)
    if config.routing in ("r2", "r3") and not moe:
        raise ConfigError(
            f"rl.routing is {config.routing}, but the model is dense: there is no routing to replay.",
            hint="Set rl.routing to off.",
        )
    origins = known_origins(model.path)
    policy = load_model(model.path, dtype=torch.float32, tokenizer=True)
    run = _prepare(config, policy, model.path, moe, job)
    saved: dict[str, Any] = {}
    learner, state = run.learner, job.scratch / STATE
    done = load_state(
        state, model=policy, optimizer=learner.optimizer, schedule=learner.schedule, owner=run.owner, extra=saved
    )
    history = History.restore(saved)
    _train(run, engine, history, done or 0)
    save_model(policy, job.out, tokenizer_from=model.path, origins=origins)
    history.publish(job.out)
    shutil.copytree(job.scratch / ROLLOUTS, job.out / ROLLOUTS)
    return dict(history.result()) | {"engine_restarts": count_restarts(job.scratch / RESTARTS)}


def _prepare(config: RlConfig, policy: PreTrainedModel, source: Path, moe: bool, job: Job) -> _Run:
    tokenizer = load_tokenizer(source)
    task = Task.open(config.task)
    judge = Judge(config.rewards, task)
    curriculum = build_curriculum(
        config,
        task,
        tokenizer,
        max_positions=int(policy.config.max_position_embeddings),
        vocab_size=int(policy.config.vocab_size),
    )
    longest = _longest(config, curriculum.longest_prompt, policy)
    if config.routing == "r3":
        require_routing(source, longest, hint="Set rl.routing to r2 or off, or lower rl.max_tokens.")
    optimizer, schedule = build_optimizer(policy, config.optimizer, config.steps * config.mini_steps)
    reference = copy.deepcopy(policy).requires_grad_(requires_grad=False) if config.kl else None
    if config.activation_checkpointing:
        policy.gradient_checkpointing_enable()
    mode: Mode = "off" if config.routing == "auto" else config.routing
    identity = model_fingerprint(policy)
    return _Run(
        config,
        job,
        Learner(policy, optimizer, schedule, config, mode, reference),
        Sampler(config, curriculum, judge, tokenizer, Writer(job.scratch / ROLLOUTS), identity),
        source,
        moe,
        returned_routing(source, longest) is not None,
        fingerprint("rl state", "2", config.identity(), {"model": identity}),
    )


def _longest(config: RlConfig, longest_prompt: int, model: PreTrainedModel) -> int:
    return min(longest_prompt + config.max_tokens + 1, int(model.config.max_position_embeddings))


def _engine_config(run: _Run) -> EngineConfig:
    return EngineConfig(
        dtype=run.config.rollout_dtype,
        max_model_len=run.max_model_len,
        routes=run.returned,
        threads=run.job.resources.cpus,
    )


def _write_policy(run: _Run) -> Path:
    """The present weights as a checkpoint in scratch. A new file each time: the engine may have mapped the old one."""
    folder = run.job.scratch / POLICY
    shutil.rmtree(folder, ignore_errors=True)
    save_model(run.learner.model, folder, tokenizer_from=run.source)
    return folder


def _train(run: _Run, factory: EngineFactory, history: History, done: int) -> None:
    """All updates that are left."""
    if done == run.config.steps:
        return
    log = run.job.scratch / RESTARTS
    with (
        closing(TenaciousEngine(factory, _write_policy(run), _engine_config(run), log=log)) as engine,
        Ahead(run.sampler, engine) as ahead,
    ):
        for step in range(done, run.config.steps):
            sampled = ahead.take(step)
            batch = as_batch(run.config, sampled.record)
            if not history.routing:
                history.routing = _routing(run, batch)
            learner = replace(run.learner, mode=history.routing["mode"])
            measured = _learn(run, learner, history, batch, step)
            ahead.settle()
            measured |= figures(sampled.record, run.sampler.judge.names)
            started = time.monotonic()
            measured |= _refresh(run, engine, batch, step + 1)
            speeds = _speeds(history, ahead) | {"sync/seconds": time.monotonic() - started}
            _finish(run, history, measured, speeds, step + 1)


def _routing(run: _Run, batch: Rollouts) -> dict[str, Any]:
    """Before the first update: the probe's figures, the mode of replay and its reason."""
    config = run.config
    with deterministic():
        found = preflight(
            run.learner.model, batch, temperature=config.temperature, micro_batch_size=config.micro_batch_size
        )
    run.job.reporter.metrics(found.figures(), 0)
    wanted = config.routing
    if wanted == "r3" or (wanted == "auto" and batch.routes_BSLK is not None):
        require_alignment(found, rollout_dtype=config.rollout_dtype)
    if config.rollout_dtype == "float32" and (batch.routes_BSLK is not None or not run.moe):
        told = Agreement(found.largest_difference, found.k3_off)
        require_agreement(told, config, step=1, what="before the first update")
    if wanted != "auto":
        return {"mode": wanted, "reason": "configured", **found.figures()}
    choice = choose(
        mini_steps=config.mini_steps,
        max_staleness=config.max_staleness,
        moe=run.moe,
        returned=run.returned,
        router_mismatch=found.router_mismatch,
    )
    run.job.reporter.progress(0, config.steps, f"routing {choice.mode}: {choice.reason}")
    return {"mode": choice.mode, "reason": choice.reason, **found.figures()}


def _learn(run: _Run, learner: Learner, history: History, batch: Rollouts, step: int) -> dict[str, float]:
    """The optimiser steps over `batch`; their figures."""
    config, number = run.config, step + 1
    started = time.monotonic()
    with deterministic():
        prepared, compared = prepare(learner, batch)
    fresh = not config.max_staleness
    if fresh and config.rollout_dtype == "float32" and (learner.mode == "r3" or not run.moe):
        found = Agreement(compared["sampling/logp_difference/max"], compared["r3/k3_kl"])
        require_agreement(found, config, step=number, what="in its rollouts")
    learning_rate = float(learner.schedule.get_last_lr()[0])
    with deterministic():
        updated = update(learner, prepared, step=number)
    history.update.add(int(batch.real_BS.sum()), time.monotonic() - started)
    return compared | updated | {"learning_rate": learning_rate}


def _refresh(run: _Run, engine: TenaciousEngine, batch: Rollouts, number: int) -> dict[str, float]:
    """Give the engine the new weights and check that it runs them."""
    engine.refresh(_write_policy(run))
    sequences = _probe_sequences(batch, run.max_model_len - 1)
    return verify_refresh(engine, run.learner.model, sequences, run.config, step=number).figures()


def _speeds(history: History, ahead: Ahead) -> dict[str, float]:
    speeds = {"update/tokens_per_second": history.update.last}
    for sampled in ahead.finished:
        assert sampled.seconds is not None
        history.rollout.add(sampled.tokens, sampled.seconds)
        speeds["rollout/tokens_per_second"] = history.rollout.last
    ahead.finished.clear()
    return speeds


def _finish(run: _Run, history: History, measured: dict[str, float], speeds: dict[str, float], number: int) -> None:
    """Write down what step `number` did, and keep the training state."""
    history.steps.append({"step": number, **measured})
    save_state(
        run.job.scratch / STATE,
        number,
        model=run.learner.model,
        optimizer=run.learner.optimizer,
        schedule=run.learner.schedule,
        owner=run.owner,
        extra=history.state(),
    )
    run.job.reporter.metrics(measured | speeds, number)
    run.job.reporter.progress(number, run.config.steps, f"reward {measured['reward']:.3f}")


def _probe_sequences(rollouts: Rollouts, max_length: int) -> list[list[int]]:
    sequences = []
    for inputs_S, targets_S, real_S in zip(rollouts.inputs_BS, rollouts.targets_BS, rollouts.real_BS, strict=True):
        length = int(real_S.sum())
        sequences.append([*inputs_S[:length].tolist(), int(targets_S[length - 1])])
    return pick(sequences, max_length=max_length)
