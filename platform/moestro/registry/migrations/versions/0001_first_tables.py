"""The first tables: runs and their steps, artifacts and their inputs, measurements, deployments."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None

FINGERPRINT = sa.String(length=64)
STATUSES = ("running", "completed", "failed", "cancelled")
TABLES = (
    "deployments",
    "layer_statistics",
    "expert_statistics",
    "experts",
    "task_results",
    "held_out_losses",
    "artifact_inputs",
    "artifacts",
    "step_runs",
    "lifecycle_runs",
)


def upgrade() -> None:
    """Create them all."""
    _create_runs()
    _create_artifacts()
    _create_evaluations()
    _create_routing()
    _create_deployments()


def downgrade() -> None:
    """Drop them all."""
    for table in TABLES:
        op.drop_table(table)


def _json(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.JSON().with_variant(postgresql.JSONB(), "postgresql"), nullable=False)


def _text(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.Text(), nullable=False)


def _number(name: str, kind: type[sa.types.TypeEngine[Any]]) -> sa.Column[Any]:
    return sa.Column(name, kind(), nullable=False)


def _status() -> sa.Column[Any]:
    kind = sa.Enum(*STATUSES, name="status", native_enum=False, create_constraint=True, length=16)
    return sa.Column("status", kind, nullable=False)


def _moment(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=False)


def _position(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.Integer(), primary_key=True, autoincrement=False)


def _owner(name: str) -> sa.Column[Any]:
    return sa.Column(name, FINGERPRINT, sa.ForeignKey("artifacts.fingerprint", ondelete="CASCADE"), primary_key=True)


def _indexed(table: str, column: str) -> None:
    op.create_index(f"ix_{table}_{column}", table, [column])


def _create_runs() -> None:
    op.create_table(
        "lifecycle_runs",
        sa.Column("id", sa.String(length=64), primary_key=True),
        _text("name"),
        _status(),
        _json("config"),
        _moment("started_at"),
        _number("seconds", sa.Double),
        _text("mlflow_run_id"),
    )
    _indexed("lifecycle_runs", "name")
    op.create_table(
        "step_runs",
        sa.Column(
            "run_id", sa.String(length=64), sa.ForeignKey("lifecycle_runs.id", ondelete="CASCADE"), primary_key=True
        ),
        _position("position"),
        _text("name"),
        _text("stage"),
        sa.Column("fingerprint", FINGERPRINT, nullable=False),
        _status(),
        _number("reused", sa.Boolean),
        _moment("started_at"),
        _number("seconds", sa.Double),
        _text("message"),
        _text("mlflow_run_id"),
    )
    _indexed("step_runs", "fingerprint")


def _create_artifacts() -> None:
    op.create_table(
        "artifacts",
        sa.Column("fingerprint", FINGERPRINT, primary_key=True),
        _text("stage"),
        _text("version"),
        _json("config"),
        _json("result"),
        _text("code_version"),
        _moment("created_at"),
        _number("seconds", sa.Double),
        _number("size", sa.BigInteger),
    )
    op.create_index("ix_artifacts_stage_created_at", "artifacts", ["stage", "created_at"])
    op.create_table(
        "artifact_inputs",
        _owner("artifact"),
        sa.Column("role", sa.Text(), primary_key=True),
        _text("stage"),
        sa.Column("fingerprint", FINGERPRINT, nullable=False),
    )
    _indexed("artifact_inputs", "fingerprint")


def _create_evaluations() -> None:
    op.create_table(
        "held_out_losses",
        _owner("evaluation"),
        sa.Column("domain", sa.Text(), primary_key=True),
        sa.Column("checkpoint", FINGERPRINT, nullable=False),
        sa.Column("loss", sa.Double(), nullable=True),
        _number("tokens", sa.BigInteger),
    )
    _indexed("held_out_losses", "checkpoint")
    op.create_table(
        "task_results",
        _owner("evaluation"),
        sa.Column("task", sa.Text(), primary_key=True),
        sa.Column("checkpoint", FINGERPRINT, nullable=False),
        _number("problems", sa.Integer),
        _number("accuracy", sa.Double),
    )
    _indexed("task_results", "checkpoint")


def _create_routing() -> None:
    op.create_table("experts", _owner("artifact"), _position("layer"), _position("expert"), _text("origin"))
    op.create_table(
        "expert_statistics",
        _owner("profile"),
        _position("layer"),
        _position("expert"),
        sa.Column("domain", sa.Text(), primary_key=True),
        sa.Column("checkpoint", FINGERPRINT, nullable=False),
        _number("tokens", sa.BigInteger),
        _number("gate_mass", sa.Double),
    )
    _indexed("expert_statistics", "checkpoint")
    op.create_table(
        "layer_statistics",
        _owner("profile"),
        _position("layer"),
        sa.Column("domain", sa.Text(), primary_key=True),
        sa.Column("checkpoint", FINGERPRINT, nullable=False),
        _number("tokens", sa.BigInteger),
    )
    _indexed("layer_statistics", "checkpoint")


def _create_deployments() -> None:
    op.create_table(
        "deployments",
        _owner("artifact"),
        _text("name"),
        sa.Column("checkpoint", FINGERPRINT, nullable=False),
        _text("checkpoint_stage"),
        _text("dtype"),
        _number("max_model_len", sa.Integer),
        _json("gate"),
    )
    _indexed("deployments", "name")
    _indexed("deployments", "checkpoint")
