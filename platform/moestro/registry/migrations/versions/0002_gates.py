"""A deployment passes several gates, each with figures of its own."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """`gate` becomes `gates`."""
    op.execute("ALTER TABLE deployments RENAME COLUMN gate TO gates")


def downgrade() -> None:
    """And back."""
    op.execute("ALTER TABLE deployments RENAME COLUMN gates TO gate")
