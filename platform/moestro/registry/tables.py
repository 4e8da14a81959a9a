"""The registry's tables: an index over the records of artifacts and lifecycle runs, never the truth itself.

Every row can be made again from `artifact.json` and `runs/<id>.json`. Routing is kept as counts, not ratios, so that
profiles can be summed. An artifact is known by its fingerprint, which covers its stage; where it lies is the store's
business. Inputs and checkpoints are named without a foreign key: what they name may have been deleted since.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    Double,
    Enum,
    ForeignKey,
    Index,
    MetaData,
    String,
    Text,
    TypeDecorator,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

FINGERPRINT = String(64)
NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_name)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class UtcDateTime(TypeDecorator[datetime]):
    """A moment, stored and returned in UTC. SQLite would drop the time zone, PostgreSQL return the session's."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """To UTC; raises `ValueError` for a moment without a time zone."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value} has no time zone")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """With UTC as its time zone."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def status_type() -> Enum:
    """How a run or step stands, checked by Python and by the database."""
    values = ("running", "completed", "failed", "cancelled")
    return Enum(*values, name="status", native_enum=False, create_constraint=True, validate_strings=True, length=16)


class Base(DeclarativeBase):
    """Base of all tables."""

    metadata = MetaData(naming_convention=NAMES)
    type_annotation_map = {  # noqa: RUF012  (SQLAlchemy declares it so)
        dict[str, Any]: JSON().with_variant(JSONB(), "postgresql"),
        datetime: UtcDateTime(),
        float: Double(),
        str: Text(),
    }


class LifecycleRunRow(Base):
    """One run of a lifecycle."""

    __tablename__ = "lifecycle_runs"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(index=True)
    status: Mapped[str] = mapped_column(status_type())
    config: Mapped[dict[str, Any]]
    started_at: Mapped[datetime]
    seconds: Mapped[float]
    mlflow_run_id: Mapped[str]


class StepRunRow(Base):
    """One step of a lifecycle run, in the order in which steps ended."""

    __tablename__ = "step_runs"

    run_id: Mapped[str] = mapped_column(ForeignKey("lifecycle_runs.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str]
    stage: Mapped[str]
    fingerprint: Mapped[str] = mapped_column(FINGERPRINT, index=True)
    status: Mapped[str] = mapped_column(status_type())
    reused: Mapped[bool]
    started_at: Mapped[datetime]
    seconds: Mapped[float]
    message: Mapped[str]
    mlflow_run_id: Mapped[str]


class ArtifactRow(Base):
    """One published artifact."""

    __tablename__ = "artifacts"
    __table_args__ = (Index("ix_artifacts_stage_created_at", "stage", "created_at"),)

    fingerprint: Mapped[str] = mapped_column(FINGERPRINT, primary_key=True)
    stage: Mapped[str]
    version: Mapped[str]
    config: Mapped[dict[str, Any]]
    result: Mapped[dict[str, Any]]
    code_version: Mapped[str]
    created_at: Mapped[datetime]
    seconds: Mapped[float]
    size: Mapped[int] = mapped_column(BigInteger)


def owner() -> Mapped[str]:
    """The artifact a row was read from, as first part of its primary key; the row goes when the artifact does."""
    return mapped_column(ForeignKey("artifacts.fingerprint", ondelete="CASCADE"), primary_key=True)


class ArtifactInputRow(Base):
    """Lineage: one thing an artifact was made from."""

    __tablename__ = "artifact_inputs"

    artifact: Mapped[str] = owner()
    role: Mapped[str] = mapped_column(primary_key=True)
    stage: Mapped[str]
    fingerprint: Mapped[str] = mapped_column(FINGERPRINT, index=True)


class HeldOutLossRow(Base):
    """An evaluation's loss of one checkpoint on one domain (nats per token)."""

    __tablename__ = "held_out_losses"

    evaluation: Mapped[str] = owner()
    domain: Mapped[str] = mapped_column(primary_key=True)
    checkpoint: Mapped[str] = mapped_column(FINGERPRINT, index=True)
    loss: Mapped[float | None]
    tokens: Mapped[int] = mapped_column(BigInteger)


class TaskResultRow(Base):
    """An evaluation's accuracy of one checkpoint on one task."""

    __tablename__ = "task_results"

    evaluation: Mapped[str] = owner()
    task: Mapped[str] = mapped_column(primary_key=True)
    checkpoint: Mapped[str] = mapped_column(FINGERPRINT, index=True)
    problems: Mapped[int]
    accuracy: Mapped[float]


class ExpertRow(Base):
    """Where one expert of an artifact (a checkpoint or its profile) comes from: a domain's name or `seed`."""

    __tablename__ = "experts"

    artifact: Mapped[str] = owner()
    layer: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    expert: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    origin: Mapped[str]


class ExpertStatisticRow(Base):
    """How much of one domain one expert took in a profile: tokens, and their summed gate weights."""

    __tablename__ = "expert_statistics"

    profile: Mapped[str] = owner()
    layer: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    expert: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    domain: Mapped[str] = mapped_column(primary_key=True)
    checkpoint: Mapped[str] = mapped_column(FINGERPRINT, index=True)
    tokens: Mapped[int] = mapped_column(BigInteger)
    gate_mass: Mapped[float]


class LayerStatisticRow(Base):
    """Tokens of one domain that passed one layer in a profile: what expert counts are shares of."""

    __tablename__ = "layer_statistics"

    profile: Mapped[str] = owner()
    layer: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    domain: Mapped[str] = mapped_column(primary_key=True)
    checkpoint: Mapped[str] = mapped_column(FINGERPRINT, index=True)
    tokens: Mapped[int] = mapped_column(BigInteger)


class DeploymentRow(Base):
    """A checkpoint that was let through, or forced past, the gates."""

    __tablename__ = "deployments"

    artifact: Mapped[str] = owner()
    name: Mapped[str] = mapped_column(index=True)
    checkpoint: Mapped[str] = mapped_column(FINGERPRINT, index=True)
    checkpoint_stage: Mapped[str]
    dtype: Mapped[str]
    max_model_len: Mapped[int]
    gates: Mapped[dict[str, Any]]
