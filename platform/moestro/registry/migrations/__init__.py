"""Alembic's migrations of the registry. `moestro.registry.database` applies them when it connects."""

VERSION_TABLE = "moestro_alembic_version"
"""Where the schema's revision is kept: MLflow and Prefect, which may share the database, use Alembic's default."""
