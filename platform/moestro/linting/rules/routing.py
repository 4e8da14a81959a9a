"""Rules on routers: the choice of experts, and experts that no token can reach.

E experts, K chosen ones, D hidden.
"""

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from moestro.linting.checkpoint import Checkpoint
from moestro.linting.draft import Draft
from moestro.linting.rule import Rule, Trouble, counted, some
from moestro.models.weights import NewTensor


def _choice(checkpoint: Checkpoint) -> Iterator[Trouble]:
    experts, chosen = checkpoint.num_experts, checkpoint.config.num_experts_per_tok
    groups, chosen_groups = _groups(checkpoint)
    by_groups = checkpoint.own.correction_bias is not None
    problems = [
        (chosen > experts, "num_experts_per_tok", f"num_experts_per_tok is {chosen} of {experts} experts"),
        (experts % groups > 0, "n_group", f"{experts} experts do not divide into n_group = {groups}"),
        (chosen_groups > groups, "topk_group", f"topk_group is {chosen_groups} of {groups} groups"),
        (by_groups and experts // groups < 2, "n_group", "a group needs two experts to be scored by"),
    ]
    for wrong, field, what in problems:
        if wrong:
            yield Trouble(
                where=(field,),
                what=f"The choice of experts is impossible: {what}.",
                transformers="Raises an error at the first token.",
                vllm="Raises an error at the first token.",
                remedy=f"Correct {field}.",
            )
            return


def _groups(checkpoint: Checkpoint) -> tuple[int, int]:
    """Groups of experts, and how many of them are chosen: one of one where experts stand in none."""
    if checkpoint.own.correction_bias is None:
        return 1, 1
    return checkpoint.config.n_group or 1, checkpoint.config.topk_group or 1


IMPOSSIBLE_CHOICE = Rule(
    name="impossible-choice",
    severity="error",
    about="More experts or groups are to be chosen than there are, or groups do not divide.",
    check=_choice,
    of_quantised=True,
)


def _few_in_groups(checkpoint: Checkpoint) -> Iterator[Trouble]:
    config, experts = checkpoint.config, checkpoint.num_experts
    groups, chosen_groups = _groups(checkpoint)
    reachable = experts // groups * chosen_groups
    if reachable < config.num_experts_per_tok and not list(_choice(checkpoint)):
        yield Trouble(
            where=("n_group", "topk_group", "num_experts_per_tok"),
            what=f"The chosen groups hold {reachable} experts, of which {config.num_experts_per_tok} are to be chosen.",
            transformers="Fills up with experts of groups that were not chosen, in no order.",
            vllm="Fills up with experts of groups that were not chosen, in no order.",
            remedy="Raise topk_group or lower num_experts_per_tok.",
        )


SMALL_GROUPS = Rule(
    name="small-groups",
    severity="warning",
    about="The chosen groups hold fewer experts than are to be chosen.",
    check=_few_in_groups,
    of_quantised=True,
)


def _unreachable(checkpoint: Checkpoint) -> Iterator[Trouble]:
    found = {}
    for layer in checkpoint.sparse_layers:
        router, bias = (
            _read(checkpoint, name, layer) for name in (checkpoint.own.router, checkpoint.own.correction_bias)
        )
        usable = router is not None and router.isfinite().all() and (bias is None or bias.isfinite().all())
        if router is not None and usable:
            found[layer] = _never_chosen(checkpoint, router, bias)
    places = [f"layer {layer}, expert {expert}" for layer, experts in found.items() for expert in experts]
    if places:
        yield Trouble(
            where=some(places),
            what=f"{counted(len(places), 'expert is', 'experts are')} chosen for no token: enough others always "
            "score as much or more.",
            transformers="Never runs them.",
            vllm="Never runs them; where scores tie it may prefer others than transformers.",
            remedy="Train the routers or start them otherwise; a zero router is meant for identical experts.",
        )


def _read(checkpoint: Checkpoint, template: str | None, layer: int) -> Tensor | None:
    """The weight, None where there is none or it is of another shape than the model's."""
    tensor = checkpoint.weights.get(name := template.format(layer=layer)) if template else None
    return tensor.read() if tensor and tensor.shape == checkpoint.expected.get(name) else None


def _never_chosen(checkpoint: Checkpoint, router_ED: Tensor, bias_E: Tensor | None) -> list[int]:
    """Experts that K others outrank for every token: by the same row, or by a bias no sigmoid score can make up for."""
    chosen = checkpoint.config.num_experts_per_tok
    rows: dict[tuple[bytes, float], list[int]] = defaultdict(list)
    for expert, row in enumerate(router_ED.double() + 0.0):  # minus zero becomes zero
        rows[row.numpy().tobytes(), 0.0 if bias_E is None else float(bias_E[expert])].append(expert)
    tied = [expert for group in rows.values() for expert in group[chosen:]]
    if bias_E is None:
        return sorted(tied)
    count, _ = _groups(checkpoint)
    if len(bias_E) % count:
        return sorted(tied)
    groups = bias_E.double().reshape(count, -1)
    ahead = torch.stack([(group[None, :] >= group[:, None] + 1).sum(1) for group in groups]).flatten()
    return sorted({*tied, *torch.nonzero(ahead >= chosen).flatten().tolist()})


UNREACHABLE_EXPERTS = Rule(
    name="unreachable-experts",
    severity="warning",
    about="Experts that no token can be routed to: more than K experts share one router row, or a correction bias "
    "holds them down.",
    check=_unreachable,
    costly=True,
)


def _no_bias(checkpoint: Checkpoint) -> Iterator[Trouble]:
    if names := _absent_biases(checkpoint):
        yield Trouble(
            where=some(names),
            what="The correction bias of the choice is not stored.",
            transformers="Takes zeros.",
            vllm="Raises an error.",
            remedy="Store zeros.",
            affects=("vllm",),
            fixable=True,
        )


def _absent_biases(checkpoint: Checkpoint) -> list[str]:
    template = checkpoint.own.correction_bias
    names = [template.format(layer=layer) for layer in checkpoint.sparse_layers] if template else []
    return [name for name in names if name not in checkpoint.weights]


def _zero_bias(checkpoint: Checkpoint, draft: Draft) -> None:
    for name in _absent_biases(checkpoint):
        draft.tensors[name] = NewTensor.zeros((checkpoint.num_experts,), torch.float32)


MISSING_CORRECTION_BIAS = Rule(
    name="missing-correction-bias",
    severity="error",
    about="A GLM-4 MoE without stored correction biases.",
    check=_no_bias,
    mend=_zero_bias,
    mends="Zeros.",
    structural=True,
)
