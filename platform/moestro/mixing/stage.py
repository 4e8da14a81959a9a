"""The mix stage: dense checkpoints of one kind become one Mixture-of-Experts, tensor by tensor.

Nothing is loaded as a model: every weight of the result is copied, or made and written when its turn has come, so
peak memory is that of the largest one. Experts stand in the order of the branches, the generalist last.
L layers, E experts, D hidden.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from moestro.artifacts import Artifact, Job
from moestro.config import MixConfig
from moestro.errors import InputError
from moestro.linting import refuse_errors
from moestro.mixing.experts import feed_forward_width
from moestro.mixing.merging import Merger
from moestro.mixing.plan import MoePlan
from moestro.mixing.recipes import BLEND, SEED, plan_experts
from moestro.mixing.starts import router_weights
from moestro.mixing.starts.context import StartContext
from moestro.mixing.tensors import all_tensors, parameter_counts
from moestro.models.checkpoint import save_config, save_files_beside, stored_dtype
from moestro.models.compare import Likeness, check_same_kind
from moestro.models.families import MoeShape, families_of, family_of
from moestro.models.weights import StoredWeights, write_weights


def mix(
    config: MixConfig, *, seed: Artifact, branches: Mapping[str, Artifact], tokens: Mapping[str, Artifact], job: Job
) -> dict[str, Any]:
    """Mix `branches` (by domain) of `seed` into one MoE checkpoint in `job.out`.

    Whole experts are a branch's weights, bit for bit. `tokens` (by domain) are read by routers that start from text.
    Result: parameters, active_parameters, experts, architecture, num_experts_per_tok, router, rest (per module group
    how it was merged and how much the models differed), size_bytes, and the figures of the router's start.
    Raises `InputError` if they are not of one kind, cannot become an MoE, or a weight that is used is not finite.
    """
    _check_names(branches)
    paths = {} if config.copies_of_seed() else {name: branch.path for name, branch in branches.items()}
    folders = {**paths, SEED: seed.path}
    common = check_same_kind(seed.path, paths, unify_vocabulary=config.unify_vocabulary)
    dense = common.config
    families_of(dense.model_type)
    models = {name: StoredWeights(folder, finite=True) for name, folder in folders.items()}
    plan = plan_experts(config, {name: feed_forward_width(name, weights) for name, weights in models.items()})
    shape = _shape(config, plan)
    family = family_of(dense, shape, config.target)
    moe = family.moe_config(dense, shape)
    job.reporter.progress(0, 1, f"router: {config.router.type}")
    starting = _start_context(plan, common, folders=folders, models=models, tokens=tokens, job=job)
    routers_LED, router_figures = router_weights(config.router, starting)
    dtype = _dtype(config, seed.path)
    rest = Merger(config.rest, models[SEED], {name: models[name] for name in paths}, common.vocabulary)
    tensors = all_tensors(rest, plan, shape, family, dense, models=models, routers_LED=routers_LED, dtype=dtype)
    digests = write_weights(
        job.out,
        tensors,
        max_shard_bytes=config.max_shard_bytes,
        progress=lambda done, total: job.reporter.progress(done, total, "writing"),
    )
    job.digests.update(digests)
    origins = [expert.origin for expert in plan.experts]
    save_config(moe, job.out, dtype=dtype)
    save_files_beside(
        job.out, tokenizer_from=folders[common.vocabulary.largest], origins=[origins] * dense.num_hidden_layers
    )
    refuse_errors(job.out)
    return {
        **parameter_counts(tensors, plan),
        "experts": origins,
        "architecture": family.moe,
        "num_experts_per_tok": plan.num_experts_per_tok,
        "router": config.router.type,
        **router_figures,
        "rest": rest.report.summary(config.rest),
        "size_bytes": sum(path.stat().st_size for path in job.out.glob("*.safetensors")),
    }


def _dtype(config: MixConfig, seed: Path) -> torch.dtype:
    """The type that weights are stored in. Double precision, which no engine serves, becomes single."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    dtype = stored_dtype(seed)
    return torch.float32 if dtype == torch.float64 else dtype


def _check_names(branches: Iterable[str]) -> None:
    for name, meaning in ((SEED, "the generalist"), (BLEND, "experts made of all branches")):
        if name in branches:
            raise InputError(f"A branch is called {name!r}, like {meaning}.", hint="Rename that domain.")


def _start_context(
    plan: MoePlan,
    common: Likeness,
    *,
    folders: Mapping[str, Path],
    models: Mapping[str, StoredWeights],
    tokens: Mapping[str, Artifact],
    job: Job,
) -> StartContext:
    return StartContext(
        plan=plan,
        layers=common.config.num_hidden_layers,
        hidden=common.config.hidden_size,
        longest=common.config.max_position_embeddings,
        unknown_ids=range(common.vocabulary.tokens[SEED], common.vocabulary.size),
        folders=folders,
        models=models,
        tokens={name: artifact.path for name, artifact in tokens.items()},
        progress=job.reporter.progress,
    )


def _shape(config: MixConfig, plan: MoePlan) -> MoeShape:
    return MoeShape(
        num_experts=len(plan.experts),
        num_experts_per_tok=plan.num_experts_per_tok,
        expert_width=plan.expert_width,
        shared_width=plan.shared_width,
        loss_free=config.selection == "loss_free",
        num_groups=config.num_groups,
        num_groups_per_tok=config.num_groups_per_tok,
    )
