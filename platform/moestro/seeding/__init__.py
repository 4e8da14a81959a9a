"""The `seed` stage: the dense checkpoint everything starts from, pre-trained here or imported."""

from collections.abc import Mapping
from typing import Any

from moestro.artifacts import Artifact, Job
from moestro.config import ImportSeed, SeedConfig


def seed(config: SeedConfig, *, corpora: Mapping[str, Artifact], job: Job) -> dict[str, Any]:
    """Write a dense checkpoint with its tokenizer into `job.out`; an imported one does not look at `corpora`."""
    if isinstance(config, ImportSeed):
        from moestro.seeding.importing import import_seed

        return import_seed(config, job=job)
    from moestro.seeding.pretrain import pretrain_seed

    return pretrain_seed(config, corpora=corpora, job=job)
