"""Rules on gates: whether those of the chosen experts add up to one, and whether they should."""

from collections.abc import Iterator

from moestro.linting.checkpoint import Checkpoint
from moestro.linting.draft import Draft
from moestro.linting.rule import Rule, Trouble
from moestro.linting.rules.experts import first_experts_differ_by

RELATED = 0.7
"""First experts less than this far apart started from one network."""
RENORMALISE = "norm_topk_prob"


def _ignored(checkpoint: Checkpoint) -> Iterator[Trouble]:
    config = checkpoint.config
    some_left_out = config.num_experts_per_tok < checkpoint.num_experts
    if checkpoint.model_type == "olmoe" and config.norm_topk_prob and some_left_out:
        yield Trouble(
            where=(RENORMALISE,),
            what="The gates of the chosen experts are to add up to one.",
            transformers="Makes them add up to one.",
            vllm="Leaves them as they are: every sparse layer's output is too small (measured: more than 1 nat).",
            remedy='Serve it with model_impl="transformers"; no other layout that vLLM knows has OLMoE\'s attention.',
            affects=("vllm",),
        )


IGNORED_RENORMALISATION = Rule(
    name="ignored-renormalisation",
    severity="error",
    about="An OLMoE whose gates are to add up to one, which vLLM does not do.",
    check=_ignored,
    of_quantised=True,
)


def _copies(checkpoint: Checkpoint) -> Iterator[Trouble]:
    if _unnormalised(checkpoint) and first_experts_differ_by(checkpoint) == 0:
        yield Trouble(
            where=(RENORMALISE,),
            what=f"Experts are copies of one network, and {_told(checkpoint)}: their gates add up to less than one.",
            transformers="Adds a fraction of the network's output.",
            vllm="Adds a fraction of the network's output.",
            remedy=f"Set {RENORMALISE} to true: copies then compute what the network did.",
            fixable=checkpoint.model_type != "olmoe",
        )


def _renormalise(_checkpoint: Checkpoint, draft: Draft) -> None:
    draft.config[RENORMALISE] = True


UNNORMALISED_COPIES = Rule(
    name="unnormalised-copies",
    severity="error",
    about=f"Experts are copies of one network, and `{RENORMALISE}` is false, the default of most architectures.",
    check=_copies,
    mend=_renormalise,
    mends=f"`{RENORMALISE}` is true.",
    costly=True,
)


def _related(checkpoint: Checkpoint) -> Iterator[Trouble]:
    if not _unnormalised(checkpoint) or checkpoint.model_type == "olmoe":
        return
    apart = first_experts_differ_by(checkpoint)
    absent = RENORMALISE not in checkpoint.parsed
    related = checkpoint.has_origins or (apart is not None and apart < RELATED)
    if apart == 0 or not (absent or related):
        return
    why = " Experts started from one network." if related else ""
    yield Trouble(
        where=(RENORMALISE,),
        what=f"{_told(checkpoint)}: gates of the chosen experts add up to less than one.{why}",
        transformers="Leaves them as they are.",
        vllm="Leaves them as they are.",
        remedy=f"Set {RENORMALISE} to true, unless the experts were trained without.",
    )


UNNORMALISED_GATES = Rule(
    name="unnormalised-gates",
    severity="warning",
    about=f"`{RENORMALISE}` is missing, or false for experts that started from one network.",
    check=_related,
    costly=True,
)


def _unnormalised(checkpoint: Checkpoint) -> bool:
    field = checkpoint.own.renormalises
    chosen = checkpoint.config.num_experts_per_tok
    softmax = checkpoint.own.correction_bias is None
    return bool(softmax and field and not getattr(checkpoint.config, field) and chosen < checkpoint.num_experts)


def _told(checkpoint: Checkpoint) -> str:
    return (
        f"{RENORMALISE} is false" if RENORMALISE in checkpoint.parsed else f"{RENORMALISE} is not given, so it is false"
    )
