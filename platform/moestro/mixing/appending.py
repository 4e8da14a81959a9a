"""The append stage: a domain's branch joins a Mixture-of-Experts as one more expert of every layer, tensor by tensor.

Only the branch's feed-forward networks are used. The new expert stands behind the others; every byte of these, of
their router rows and of all other weights stays what it was (Nexus, arXiv 2408.15901; FlexOlmo, arXiv 2507.07024).
L layers with experts, E experts, D hidden.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moestro.artifacts import Artifact, Job
from moestro.config import AppendConfig
from moestro.errors import InputError
from moestro.linting import refuse_errors, refuse_faulty
from moestro.mixing.existing import AddedExpert, ExistingMoe
from moestro.mixing.experts import projection
from moestro.mixing.joining import check_joins
from moestro.mixing.plan import ExpertPlan, Piece
from moestro.mixing.rows import RowContext, new_rows
from moestro.models.families import FEED_FORWARD
from moestro.models.layouts import PROJECTIONS
from moestro.models.weights import StoredWeights

BESIDE_SHARED = 0.5
"""Factor of a routed expert's output beside a shared expert, which does the other half."""


def append(
    config: AppendConfig, *, model: Artifact, branch: Artifact, tokens: Mapping[str, Artifact], job: Job
) -> dict[str, Any]:
    """Write `model` with the feed-forward networks of `branch` as a further expert of every layer to `job.out`.

    `tokens` (by domain) are read by rows that start from text: the new domain's, and those of domains that it is to
    be told apart from. A narrower network is padded with zeros, which changes nothing of what it computes.
    Result: expert, expert_ids (per layer the new number of each old one), experts (per layer), num_experts,
    num_experts_per_tok, dropped_layers (numbers of the layers behind the last one, left out), padded_features,
    router, parameters, active_parameters, size_bytes.
    Raises `InputError` if the branch is of another kind than the model, or the model cannot take another expert.
    """
    moe = ExistingMoe.open(model.path)
    known = refuse_faulty(model.path)
    _check_place(config, moe)
    check_joins(moe, branch.path)
    weights = StoredWeights(branch.path, finite=True)
    job.reporter.progress(0, 1, f"router: {config.router.type}")
    routers_LED = torch.stack([moe.router(layer) for layer in moe.layers])
    folders = {name: artifact.path for name, artifact in tokens.items()}
    rows_LD = new_rows(config.router, RowContext(moe, config.domain, routers_LED, folders))
    kept = {layer: range(moe.num_experts) for layer in moe.layers}
    added = {
        layer: _expert(config, moe, weights, layer, row_D) for layer, row_D in zip(moe.layers, rows_LD, strict=True)
    }
    tensors, origins = moe.changed(kept, added), [[*names, config.domain] for names in moe.origins]
    moe.write(job, tensors, origins, max_shard_bytes=config.max_shard_bytes)
    refuse_errors(job.out, but=known)
    num_experts = moe.num_experts + 1
    return {
        "expert": config.domain,
        "expert_ids": [list(experts) for experts in kept.values()],
        "experts": origins,
        "num_experts": num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "dropped_layers": list(moe.draft_layers),
        "padded_features": moe.expert_width - min(_width(weights, layer) for layer in moe.layers),
        "router": config.router.type,
        **moe.parameter_counts(tensors, num_experts),
        "size_bytes": sum(path.stat().st_size for path in job.out.glob("*.safetensors")),
    }


def _check_place(config: AppendConfig, moe: ExistingMoe) -> None:
    if any(config.domain in names for names in moe.origins):
        raise InputError(
            f"{moe.folder} has an expert made from {config.domain!r} already.",
            hint="Remove that one first (`moestro remove`), or give this one another name.",
        )
    if moe.num_groups > 1:
        raise InputError(
            f"The {moe.num_experts} experts of {moe.folder} stand in {moe.num_groups} groups, which "
            f"{moe.num_experts + 1} do not divide into.",
            hint="Experts join a model without groups (mix.num_groups: 1) alone.",
        )


def _expert(config: AppendConfig, moe: ExistingMoe, weights: StoredWeights, layer: int, row_D: Tensor) -> AddedExpert:
    scale = config.output_scale or (BESIDE_SHARED if moe.has_shared_expert else 1.0)
    plan = ExpertPlan(config.domain, (Piece(config.domain, 0, _width(weights, layer)),), scale=scale)
    made = {
        name: projection(plan, name, layer, moe.expert_width, models={config.domain: weights}, dtype=moe.dtype)
        for name in PROJECTIONS
    }
    # The bias decides the choice alone. It has drifted with the others' loads: at their mean, scores compare as they
    # do for an average expert; at zero, the new one would be chosen by far too often or never. One of minus infinity
    # takes its expert out of the choice, and is no drift.
    bias_E = moe.correction_bias(layer)
    chosen = torch.zeros(0) if bias_E is None else bias_E.double()[bias_E.isfinite()]
    return AddedExpert(made, row_D, float(chosen.mean()) if len(chosen) else 0.0)


def _width(weights: StoredWeights, layer: int) -> int:
    return weights[FEED_FORWARD["gate_proj"].format(layer=layer)].shape[0]
