"""Alembic's entry: runs migrations on the connection that `moestro.registry.database` hands it."""

from alembic import context

from moestro.registry.migrations import VERSION_TABLE
from moestro.registry.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    version_table=VERSION_TABLE,
    render_as_batch=True,
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()
