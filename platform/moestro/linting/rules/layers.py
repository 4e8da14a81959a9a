"""Rules on the number of layers, and on layers behind the last one."""

from collections.abc import Iterator

from moestro.linting.checkpoint import Checkpoint, matches, with_layers
from moestro.linting.draft import Draft
from moestro.linting.rule import Rule, Trouble, counted, some
from moestro.models.layouts import DRAFT_LAYERS, LAYOUTS, routed_experts

FIELD = "num_hidden_layers"


def _count(checkpoint: Checkpoint) -> Iterator[Trouble]:
    told, behind = int(checkpoint.text.num_hidden_layers), checkpoint.layers_behind
    if told >= 1 and not behind:
        return
    stored, whole = len(checkpoint.layers), checkpoint.layers_to_count
    reach = f"reach to model.layers.{max(checkpoint.layers)}" if stored else "hold no layer"
    way_out = "Copy the checkpoint again: the stored layers do not make up a model."
    yield Trouble(
        where=(FIELD, *some(f"model.layers.{layer}" for layer in behind)),
        what=f"{FIELD} is {told}, and the weights {reach}.",
        transformers="Passes over the others with a warning, and computes noise." if behind else "Computes noise.",
        vllm="Raises an error.",
        remedy=f"Set {FIELD} to {stored}." if whole else way_out,
        fixable=whole is not None,
    )


def _tell_count(checkpoint: Checkpoint, draft: Draft) -> None:
    draft.config = with_layers(draft.config, len(checkpoint.layers))


LAYER_COUNT = Rule(
    name="layer-count",
    severity="error",
    about=f"More layers are stored than `{FIELD}` says, or it says none.",
    check=_count,
    mend=_tell_count,
    mends="The number that is stored, if the stored layers make up a whole model.",
    any_architecture=True,
    structural=True,
)


def _predicting(checkpoint: Checkpoint) -> Iterator[Trouble]:
    count = checkpoint.num_experts if checkpoint.layout else routed_experts(checkpoint.parsed)
    wrong = {}
    for layer in sorted(checkpoint.predicting_layers):
        experts, rows = _stored_experts(checkpoint, layer)
        if (experts or rows is not None) and (experts != set(range(count)) or rows != count):
            wrong[layer] = f"layer {layer} has {counted(len(experts), 'expert', 'experts')} and {rows or 0} router rows"
    if wrong:
        yield Trouble(
            where=some(f"model.layers.{layer}" for layer in wrong),
            what=f"Layers that predict further tokens have another number of experts than {count}: "
            f"{'; '.join(wrong.values())}.",
            transformers="Does not read these layers.",
            vllm="Raises an error, or leaves experts uninitialised, when it is to predict several tokens.",
            remedy=f"Take them from the original, or leave them out and set {DRAFT_LAYERS[0]} to 0.",
            affects=("vllm",),
        )


def _stored_experts(checkpoint: Checkpoint, layer: int) -> tuple[set[int], int | None]:
    """Numbers of a layer's experts, and the rows of its router; the names are those of all models with such layers."""
    layout = LAYOUTS["glm4_moe"]
    names = {name: None for name in checkpoint.weights if name.startswith(f"model.layers.{layer}.")}
    numbers = [{int(match["expert"]) for _, match in matches(template, names)} for template in layout.experts.values()]
    router = checkpoint.weights.get(layout.router.format(layer=layer))
    return set.intersection(*numbers), router.shape[0] if router and router.shape else None


PREDICTING_LAYERS = Rule(
    name="predicting-layers",
    severity="error",
    about="Layers behind the last one, which predict further tokens, have another number of experts than the others.",
    check=_predicting,
    any_architecture=True,
)
