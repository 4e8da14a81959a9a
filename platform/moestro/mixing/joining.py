"""What keeps a branch from joining a Mixture-of-Experts: every difference at once, and the ways out.

Of a branch only the feed-forward networks are used, and they are of use where they were trained: on hidden states as
the model's own layers make them. So the model's architecture, as the mix stage would make it of the branch, must be
the model's, but for what concerns experts and routing alone.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moestro.errors import InputError
from moestro.mixing.existing import ExistingMoe
from moestro.models.checkpoint import load_config
from moestro.models.families import FAMILIES, FEED_FORWARD, Family, MoeShape
from moestro.models.families.family import head_dim
from moestro.models.files import check_folder
from moestro.models.layouts import PROJECTIONS
from moestro.models.vocabulary import compare_vocabularies
from moestro.models.weights import StoredWeights

COMPARED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "tie_word_embeddings",
    "vocab_size",
)
"""Config fields that mean the same in every architecture."""
ROUTING = {
    "decoder_sparse_step",
    "first_k_dense_replace",
    "intermediate_size",
    "layer_types",
    "max_window_layers",
    "mlp_only_layers",
    "n_group",
    "norm_topk_prob",
    "num_nextn_predict_layers",
    "routed_scaling_factor",
    "topk_group",
    "use_sliding_window",
}
"""Config fields that a family sets for its routers and experts, or that others of its fields say as well."""
WAYS_OUT = {
    "kind": "Take a branch that was trained from the model's own seed.",
    "wider": "Experts are only ever padded, never cut: mix again with this branch among the others.",
    "dtype": "Import the branch in the model's type: the seed stage, `type: import`, converts.",
    "tokenizer": "Train the branch with the model's tokenizer.",
}
"""What can be done about each kind of difference."""
SHOWN = 3
"""How many wrong weights an error lists."""

Difference = tuple[str, str]
"""Kind, one of `WAYS_OUT`, and what differs, in words."""


def check_joins(moe: ExistingMoe, branch: Path) -> None:
    """Raise one `InputError` that lists everything in which the dense checkpoint `branch` does not suit `moe`."""
    families = {name: family for name, known in FAMILIES.items() for family in known if family.layout is moe.layout}
    kind = moe.layout.model_type
    if not families:
        raise InputError(
            f"No branch can join a {kind} model: no dense architecture has its layers.",
            hint=f"Branches join {', '.join(sorted({item.moe for known in FAMILIES.values() for item in known}))}.",
        )
    dense = load_config(branch, check_folder(branch, tokenizer=True))
    found = [
        *_architecture(moe, dense, families),
        *_networks(moe, StoredWeights(branch)),
        *_vocabulary(moe, branch, dense),
    ]
    if found:
        raise InputError(
            f"The branch {branch} cannot join the {kind} model. {'; '.join(line for _, line in found)}.",
            hint=" ".join(way for key, way in WAYS_OUT.items() if key in {item for item, _ in found}),
        )


def _architecture(moe: ExistingMoe, dense: Any, families: dict[str, Family]) -> Iterator[Difference]:
    family = families.get(dense.model_type)
    if family is None:
        yield "kind", f"it is a {dense.model_type} model, not a {' or '.join(families)}"
        yield from _fields(moe, dense, {*COMPARED})
        return
    refused = family.refuse(dense)
    yield from (("kind", f"{item.field}, which a {family.moe} cannot have") for item in refused)
    if refused:
        yield from _fields(moe, dense, {*COMPARED})
        return
    shape = _shape(moe)
    own = family.fields(dense, shape).keys() - ROUTING
    yield from _fields(moe, family.moe_config(dense, shape), {*COMPARED, *own, "rope_parameters", "head_dim"})


def _fields(moe: ExistingMoe, made: Any, names: set[str]) -> Iterator[Difference]:
    """Fields of `made`, the config of the branch or of its mix, that are not the model's."""
    for name in sorted(names):
        theirs, ours = _value(made, name), _value(moe.config, name)
        if theirs != ours:
            yield "kind", f"{name} is {theirs!r}, the model's is {ours!r}"


def _value(config: Any, name: str) -> Any:
    """A field in comparable form: absent options of rotary embeddings are those that are null."""
    if name == "head_dim":
        return head_dim(config)
    value = getattr(config, name, None)
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


def _shape(moe: ExistingMoe) -> MoeShape:
    return MoeShape(
        num_experts=moe.num_experts,
        num_experts_per_tok=moe.num_experts_per_tok,
        expert_width=moe.expert_width,
        loss_free=moe.layout.correction_bias is not None,
        num_groups=moe.num_groups,
    )


def _networks(moe: ExistingMoe, weights: StoredWeights) -> Iterator[Difference]:
    """Feed-forward networks that are missing, of another shape or type, or wider than the experts."""
    hidden, unfit, wide, types = moe.config.hidden_size, [], set[int](), set[str]()
    for layer in moe.layers:
        for projection in PROJECTIONS:
            name = FEED_FORWARD[projection].format(layer=layer)
            shape = weights[name].shape if name in weights else ()
            axis = 1 if projection == "down_proj" else 0
            if len(shape) != 2 or shape[1 - axis] != hidden:
                unfit.append(f"{name} is {list(shape) or 'missing'}")
                continue
            wide |= {shape[axis]} if shape[axis] > moe.expert_width else set()
            types |= {str(weights[name].dtype).removeprefix("torch.")}
    yield from (("kind", line) for line in unfit[:SHOWN])
    if len(unfit) > SHOWN:
        yield "kind", f"{len(unfit) - SHOWN} more weights"
    if wide:
        yield "wider", f"its feed-forward networks have {max(wide)} features, the experts {moe.expert_width}"
    ours = str(moe.dtype).removeprefix("torch.")
    if types - {ours}:
        yield "dtype", f"its weights are {', '.join(sorted(types))}, the experts' are {ours}"


def _vocabulary(moe: ExistingMoe, branch: Path, dense: Any) -> Iterator[Difference]:
    folders = {"model": moe.folder, "branch": branch}
    rows = {"model": moe.config.vocab_size, "branch": dense.vocab_size}
    vocabulary, clashes = compare_vocabularies(folders, rows, base="model")
    reasons = [reason for clash in clashes for reason in clash.reasons]
    if not reasons and len(set(vocabulary.tokens.values())) > 1:
        reasons = ["one knows more tokens"]
    if reasons:
        yield "tokenizer", f"its tokenizer is not the model's ({'; '.join(reasons)})"
