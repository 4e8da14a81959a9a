"""The rule on sliding windows.

L layers.
"""

from collections.abc import Iterator

from moestro.linting.checkpoint import Checkpoint
from moestro.linting.draft import Draft
from moestro.linting.rule import Rule, Trouble

WINDOWS_IN_ALL_LAYERS = {"mixtral", "qwen3_moe"}
WINDOW_FIELDS = ("sliding_window", "use_sliding_window", "layer_types", "max_window_layers")


def _layer_windows(checkpoint: Checkpoint) -> tuple[list[int | None], list[int | None]]:
    """The window of each layer in transformers and in vLLM; None: a layer attends to everything."""
    config = checkpoint.config
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    count = config.num_hidden_layers
    theirs: list[int | None] = [None] * count
    if kinds is None or set(kinds) == {"sliding_attention"}:
        theirs = [window or None] * count
    elif checkpoint.model_type in {"granitemoe", "flex_olmo"}:
        theirs = [window if kind == "sliding_attention" else None for kind in kinds]
    if checkpoint.model_type in WINDOWS_IN_ALL_LAYERS:
        return [window] * count, theirs
    if checkpoint.model_type == "qwen2_moe" and kinds:
        return [window if kind == "sliding_attention" else None for kind in kinds], theirs
    return [None] * count, theirs


def _shown(windows_L: list[int | None]) -> str:
    if len(set(windows_L)) == 1:
        return f"{windows_L[0]} positions in every layer" if windows_L[0] is not None else "all positions"
    return f"all positions in {windows_L.count(None)} of {len(windows_L)} layers, a window in the others"


def _windows(checkpoint: Checkpoint) -> Iterator[Trouble]:
    ours, theirs = _layer_windows(checkpoint)
    longest = checkpoint.config.max_position_embeddings
    reach = [[longest if window is None else min(window, longest) for window in windows] for windows in (ours, theirs)]
    if reach[0] != reach[1]:
        yield Trouble(
            where=WINDOW_FIELDS,
            what="The engines see different sliding windows in this config.",
            transformers=f"Attends to {_shown(ours)}." if 0 not in ours else "Raises an error for a window of 0.",
            vllm=f"Attends to {_shown(theirs)}.",
            remedy="Remove the window where the architecture has none; "
            'where only some layers have one, serve it with model_impl="transformers".',
            affects=("transformers",) if 0 in ours else ("vllm",),
            fixable=_without_windows(ours),
        )


def _without_windows(windows_L: list[int | None]) -> bool:
    return not any(windows_L)


def _no_window(_checkpoint: Checkpoint, draft: Draft) -> None:
    for name in WINDOW_FIELDS:
        draft.config.pop(name, None)


SLIDING_WINDOWS = Rule(
    name="sliding-windows",
    severity="error",
    about="Sliding windows that the engines read differently: in architectures without, in some layers only, or of 0.",
    check=_windows,
    mend=_no_window,
    mends="The fields are left out where transformers attends to everything.",
    of_quantised=True,
)
