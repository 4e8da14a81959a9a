"""The `branch` stage: a domain's dense checkpoint, trained here from the seed or brought in from elsewhere."""

from collections.abc import Mapping
from typing import Any

from moestro.artifacts import Artifact, Job
from moestro.config import AnyBranch, ImportBranch


def branch(
    config: AnyBranch,
    *,
    seed: Artifact,
    tokens: Artifact | None = None,
    general: Mapping[str, Artifact] | None = None,
    job: Job,
) -> dict[str, Any]:
    """Write the branch's checkpoint into `job.out`, in the type the seed is stored in.

    `tokens` are the domain's, `general` those of other domains by name, for `general_share`; a branch that is
    brought in looks at neither. Result: the training's figures, or those of the checkpoint.
    """
    if isinstance(config, ImportBranch):
        from moestro.branching.importing import import_branch

        return import_branch(config, seed=seed, job=job)
    from moestro.branching.training import train_branch

    return train_branch(config, seed=seed, tokens=tokens, general=general or {}, job=job)
