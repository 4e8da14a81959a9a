"""Questions about what was measured: held-out losses, task accuracy, routing, and what was deployed."""

from collections.abc import Sequence

from sqlalchemy import Connection, select

from moestro.artifacts import Input, LifecycleRun
from moestro.errors import ArtifactError
from moestro.registry.index import table_of
from moestro.registry.queries import ARTIFACTS, INPUTS, in_chunks
from moestro.registry.tables import (
    DeploymentRow,
    ExpertRow,
    ExpertStatisticRow,
    HeldOutLossRow,
    LayerStatisticRow,
    TaskResultRow,
)
from moestro.registry.views import Deployment, Evaluation, ExpertStatistics, TaskResult

LOSSES = table_of(HeldOutLossRow)
TASKS = table_of(TaskResultRow)
EXPERTS = table_of(ExpertRow)
EXPERT_STATISTICS = table_of(ExpertStatisticRow)
LAYER_STATISTICS = table_of(LayerStatisticRow)
DEPLOYMENTS = table_of(DeploymentRow)


def evaluations_of_run(connection: Connection, run: LifecycleRun) -> list[Evaluation]:
    """The evaluations of a run's checkpoints, in the order in which the checkpoints were made in it."""
    steps: dict[str, str] = {}
    for step in run.steps:
        steps.setdefault(step.fingerprint, step.name)
    evaluations = list(dict.fromkeys(step.fingerprint for step in run.steps if step.stage == "evaluate"))
    found = _evaluations(connection, evaluations, steps)
    order = list(steps)
    return sorted(found, key=lambda item: order.index(_nearest(item, steps)))


def evaluations_of_checkpoint(connection: Connection, checkpoint: str) -> list[Evaluation]:
    """The evaluations of one checkpoint (whole fingerprint), oldest first."""
    query = (
        select(ARTIFACTS.c.fingerprint)
        .join(INPUTS, INPUTS.c.artifact == ARTIFACTS.c.fingerprint)
        .where(INPUTS.c.role == "model", INPUTS.c.fingerprint == checkpoint, ARTIFACTS.c.stage == "evaluate")
        .order_by(ARTIFACTS.c.created_at, ARTIFACTS.c.fingerprint)
    )
    return _evaluations(connection, list(connection.scalars(query)), {})


def _nearest(item: Evaluation, steps: dict[str, str]) -> str:
    """The step by which an evaluation is placed: its checkpoint's, or its own when the run did not make that."""
    return item.checkpoint.fingerprint if item.checkpoint.fingerprint in steps else item.evaluation


def _evaluations(connection: Connection, fingerprints: Sequence[str], steps: dict[str, str]) -> list[Evaluation]:
    models = {
        row["artifact"]: Input(stage=row["stage"], fingerprint=row["fingerprint"])
        for row in in_chunks(connection, INPUTS, INPUTS.c.artifact, fingerprints)
        if row["role"] == "model"
    }
    losses: dict[str, dict[str, float | None]] = {fingerprint: {} for fingerprint in fingerprints}
    tokens: dict[str, dict[str, int]] = {fingerprint: {} for fingerprint in fingerprints}
    for row in in_chunks(connection, LOSSES, LOSSES.c.evaluation, fingerprints):
        losses[row["evaluation"]][row["domain"]] = row["loss"]
        tokens[row["evaluation"]][row["domain"]] = row["tokens"]
    tasks = {
        row["evaluation"]: TaskResult(row["task"], row["problems"], row["accuracy"])
        for row in in_chunks(connection, TASKS, TASKS.c.evaluation, fingerprints)
    }
    return [
        Evaluation(
            step=steps.get(models[fingerprint].fingerprint, models[fingerprint].stage),
            checkpoint=models[fingerprint],
            evaluation=fingerprint,
            held_out_loss=dict(sorted(losses[fingerprint].items())),
            tokens=dict(sorted(tokens[fingerprint].items())),
            task=tasks.get(fingerprint),
        )
        for fingerprint in fingerprints
        if fingerprint in models
    ]


def expert_statistics(connection: Connection, checkpoint: str) -> ExpertStatistics:
    """The newest profile of a checkpoint (whole fingerprint); raises `ArtifactError` if it has none."""
    newest = (
        select(LAYER_STATISTICS.c.profile)
        .join(ARTIFACTS, ARTIFACTS.c.fingerprint == LAYER_STATISTICS.c.profile)
        .where(LAYER_STATISTICS.c.checkpoint == checkpoint)
        .order_by(ARTIFACTS.c.created_at.desc(), ARTIFACTS.c.fingerprint)
        .limit(1)
    )
    profile = connection.scalar(newest)
    if profile is None:
        raise ArtifactError(
            f"There is no profile of {checkpoint[:16]}.", hint="Checkpoints with experts are profiled: mix and later."
        )
    statistics = {
        (row["layer"], row["expert"], row["domain"]): row
        for row in in_chunks(connection, EXPERT_STATISTICS, EXPERT_STATISTICS.c.profile, [profile])
    }
    tokens = {
        (row["layer"], row["domain"]): int(row["tokens"])
        for row in in_chunks(connection, LAYER_STATISTICS, LAYER_STATISTICS.c.profile, [profile])
    }
    origins = {
        (row["layer"], row["expert"]): str(row["origin"])
        for row in in_chunks(connection, EXPERTS, EXPERTS.c.artifact, [profile])
    }
    domains = tuple(sorted({domain for _, domain in tokens}))
    num_experts: dict[int, int] = {}
    for layer, expert, _ in statistics:
        num_experts[layer] = max(num_experts.get(layer, 0), expert + 1)
    layers = [(layer, range(num_experts[layer])) for layer in sorted(num_experts)]
    return ExpertStatistics(
        checkpoint=checkpoint,
        profile=profile,
        domains=domains,
        origins=tuple(tuple(origins.get((layer, expert), "") for expert in experts) for layer, experts in layers),
        counts=tuple(
            tuple(tuple(int(statistics[layer, expert, domain]["tokens"]) for domain in domains) for expert in experts)
            for layer, experts in layers
        ),
        gate_mass=tuple(
            tuple(
                tuple(float(statistics[layer, expert, domain]["gate_mass"]) for domain in domains) for expert in experts
            )
            for layer, experts in layers
        ),
        tokens=tuple(tuple(tokens[layer, domain] for domain in domains) for layer, _ in layers),
    )


def deployments(connection: Connection, *, name: str | None) -> list[Deployment]:
    """What was deployed, newest first, under one name or under any."""
    query = (
        select(DEPLOYMENTS, ARTIFACTS.c.created_at)
        .join(ARTIFACTS, ARTIFACTS.c.fingerprint == DEPLOYMENTS.c.artifact)
        .order_by(ARTIFACTS.c.created_at.desc(), ARTIFACTS.c.fingerprint)
    )
    if name is not None:
        query = query.where(DEPLOYMENTS.c.name == name)
    return [
        Deployment(
            name=row["name"],
            artifact=row["artifact"],
            checkpoint=Input(stage=row["checkpoint_stage"], fingerprint=row["checkpoint"]),
            dtype=row["dtype"],
            max_model_len=row["max_model_len"],
            gates=row["gates"],
            created_at=row["created_at"],
        )
        for row in connection.execute(query).mappings()
    ]
