"""A Mixture-of-Experts checkpoint as it lies in its folder, and what becomes of it when its experts change.

Whatever is no layer's router, correction bias or routed expert is copied byte for byte. So is every expert and router
row that stays: in a layout that keeps all experts of a layer in one tensor, its slice of that tensor. Layers behind
the last one (GLM-4.5's draft layer for predicting several tokens) have experts of their own; transformers reads none
of them and no branch has them: they are left out. What is copied must be finite.
E experts, D hidden, F intermediate.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moestro.artifacts import Job
from moestro.errors import InputError
from moestro.models.checkpoint import load_config, save_files_beside
from moestro.models.files import CONFIG, ORIGINS, check_folder, read_origins
from moestro.models.layouts import DRAFT_LAYERS, LAYOUTS, PROJECTIONS, Layout, layer_part, layout_of, routed_experts
from moestro.models.weights import NewTensor, StoredTensor, StoredWeights, write_weights

UNKNOWN = ""
"""Origin of an expert of a checkpoint that does not say what its experts were made from."""
BLOCK_DEPTH = 4
"""Parts of a name that lead to a layer's sparse block: model, layers, number, block."""


@dataclass(frozen=True)
class AddedExpert:
    """An expert of one layer that stands behind all others."""

    projections: Mapping[str, NewTensor]
    """gate_proj and up_proj [F, D], down_proj [D, F], in the type of the others'."""
    row: Tensor
    """Its router row [D], float32."""
    correction: float = 0.0
    """Its correction bias, where the layout has one."""


@dataclass(frozen=True)
class ExistingMoe:
    """A checkpoint whose tensors have been found where its layout says."""

    folder: Path
    stored: Mapping[str, Any]
    """config.json as it stands there."""
    config: Any
    """The transformers config."""
    layout: Layout
    weights: StoredWeights
    layers: tuple[int, ...]
    """Numbers of the layers that have experts."""
    draft_layers: tuple[int, ...]
    """Numbers of the layers behind the last one, which the changed checkpoint does without."""
    origins: tuple[tuple[str, ...], ...]
    """What each expert was made from, for each of these layers."""

    @classmethod
    def open(cls, folder: Path) -> "ExistingMoe":
        """The MoE in `folder`; reads headers only.

        Raises `InputError` for a dense or incomplete checkpoint, an architecture without a known layout, or tensors
        that lie elsewhere, or are of another shape, than the layout has them.
        """
        stored = check_folder(folder, tokenizer=True)
        if not routed_experts(stored):
            raise InputError(f"{folder} is a dense model, it has no experts to change.", hint="Mix it first.")
        layout, config = layout_of(stored), load_config(folder, stored)
        candidates = range(config.num_hidden_layers)
        # Lint tells of minus infinity; the expert that it takes out of the choice may leave like any other.
        biases = [layout.correction_bias.format(layer=layer) for layer in candidates] if layout.correction_bias else []
        weights = StoredWeights(folder, finite=True, but=biases)
        layers = tuple(layer for layer in candidates if layout.router.format(layer=layer) in weights)
        numbers = {place[0] for name in weights if (place := layer_part(name))}
        moe = cls(folder, stored, config, layout, weights, layers, tuple(sorted(numbers - set(candidates))), origins=())
        if misfits := list(_misfits(moe)):
            raise InputError(
                f"{folder} does not keep its experts as a {layout.model_type} checkpoint does: {misfits[0]}.",
                hint="Load it with transformers and save it again: that writes the names and shapes vLLM reads.",
            )
        return replace(moe, origins=_origins(folder, len(layers), moe.num_experts))

    @property
    def num_experts(self) -> int:
        """Routed experts of each layer."""
        return int(getattr(self.config, self.layout.num_experts))

    @property
    def num_experts_per_tok(self) -> int:
        """Routed experts chosen per token."""
        return int(self.config.num_experts_per_tok)

    @property
    def num_groups(self) -> int:
        """Groups of experts, one after the other, of which only some are chosen from."""
        return int(getattr(self.config, "n_group", None) or 1)

    @property
    def has_shared_expert(self) -> bool:
        """Whether every token also passes a shared expert; one of zeros, which only fills its place, is none."""
        if not self.layout.shared or not getattr(self.config, str(self.layout.shared_width)):
            return False
        down = self.layout.shared["down_proj"]
        return any(bool(self.weights[down.format(layer=layer)].read().any()) for layer in self.layers)

    @property
    def expert_width(self) -> int:
        """F."""
        return int(getattr(self.config, self.layout.expert_width))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the experts' weights."""
        return self.weights[self.layout.experts["down_proj"].format(layer=self.layers[0], expert=0)].dtype

    def router(self, layer: int) -> Tensor:
        """The router's rows [E, D] in a layer, float32."""
        return self.weights[self.layout.router.format(layer=layer)].read().float()

    def correction_bias(self, layer: int) -> Tensor | None:
        """The correction bias [E] in a layer, None in layouts that have none."""
        template = self.layout.correction_bias
        return self.weights[template.format(layer=layer)].read() if template else None

    def changed(
        self, kept: Mapping[int, Sequence[int]], added: Mapping[int, AddedExpert] | None = None
    ) -> dict[str, NewTensor]:
        """All tensors of the checkpoint that has the experts `kept`, in that order, and behind them `added`.

        Both by layer; `kept` by number. Nothing is read yet.
        """
        replaced = {name for layer in self.layers for name in _experts_and_router(self.layout, layer, self.num_experts)}
        behind = tuple(f"model.layers.{layer}." for layer in self.draft_layers)
        tensors = {
            name: NewTensor.copy(tensor)
            for name, tensor in self.weights.items()
            if name not in replaced and not name.startswith(behind)
        }
        for layer in self.layers:
            tensors.update(self._layer(layer, kept[layer], (added or {}).get(layer)))
        return tensors

    def _layer(self, layer: int, kept: Sequence[int], new: AddedExpert | None) -> Iterator[tuple[str, NewTensor]]:
        layout = self.layout

        def entries(template: str, last: Callable[[AddedExpert], Tensor]) -> tuple[str, NewTensor]:
            name = template.format(layer=layer)
            return name, _entries(self.weights[name], kept, None if new is None else lambda: last(new))

        yield entries(layout.router, lambda expert: expert.row)
        if layout.correction_bias:
            yield entries(layout.correction_bias, lambda expert: torch.tensor(expert.correction))
        if layout.fused:
            yield entries(layout.experts["gate_up_proj"], _gate_above_up)
            yield entries(layout.experts["down_proj"], lambda expert: expert.projections["down_proj"].read())
            return
        for projection, template in layout.experts.items():
            for number, old in enumerate(kept):
                yield (
                    template.format(layer=layer, expert=number),
                    NewTensor.copy(self.weights[template.format(layer=layer, expert=old)]),
                )
            if new is not None:
                yield template.format(layer=layer, expert=len(kept)), new.projections[projection]

    def write(
        self, job: Job, tensors: Mapping[str, NewTensor], origins: Sequence[Sequence[str]], *, max_shard_bytes: int
    ) -> None:
        """Write a checkpoint of `tensors` to `job.out`, with this one's config and tokenizer.

        `origins` says per layer what its experts come from.
        """
        digests = write_weights(
            job.out,
            tensors,
            max_shard_bytes=max_shard_bytes,
            progress=lambda done, total: job.reporter.progress(done, total, "writing"),
        )
        job.digests.update(digests)
        # Some classes store the number under another name than their attribute's.
        fields = {layout.num_experts for layout in LAYOUTS.values()} & self.stored.keys() or {self.layout.num_experts}
        drafts = dict.fromkeys(self.stored.keys() & set(DRAFT_LAYERS), 0) if self.draft_layers else {}
        config = {**self.stored, **dict.fromkeys(sorted(fields), len(origins[0])), **drafts}
        (job.out / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        known = any(name != UNKNOWN for layer in origins for name in layer)
        by_layer = [list(layer) for layer in origins] if known else None
        save_files_beside(job.out, tokenizer_from=self.folder, origins=by_layer)

    def parameter_counts(self, tensors: Mapping[str, NewTensor], num_experts: int) -> dict[str, int]:
        """`parameters` of a checkpoint of `tensors`; `active_parameters`: those that one token passes through."""
        total = sum(prod(tensor.shape) for tensor in tensors.values())
        expert = len(PROJECTIONS) * self.expert_width * self.config.hidden_size
        idle = len(self.layers) * (num_experts - self.num_experts_per_tok) * expert
        return {"parameters": total, "active_parameters": total - idle}


def _gate_above_up(expert: AddedExpert) -> Tensor:
    return torch.cat([expert.projections["gate_proj"].read(), expert.projections["up_proj"].read()])


def _entries(stored: StoredTensor, kept: Sequence[int], last: Callable[[], Tensor] | None) -> NewTensor:
    """The entries `kept` of the first axis, and behind them `last`."""
    if last is None and list(kept) == list(range(stored.shape[0])):
        return NewTensor.copy(stored)

    def blocks() -> Iterator[Tensor]:
        for number in kept:
            yield stored.rows(number, number + 1)
        if last is not None:
            yield last()[None].to(stored.dtype)

    return NewTensor(stored.dtype, (len(kept) + (last is not None), *stored.shape[1:]), blocks)


def _origins(folder: Path, layers: int, count: int) -> tuple[tuple[str, ...], ...]:
    if not (folder / ORIGINS).exists():
        return ((UNKNOWN,) * count,) * layers
    origins = tuple(tuple(layer) for layer in read_origins(folder))
    if [len(layer) for layer in origins] != [count] * layers:
        raise InputError(
            f"{folder / ORIGINS} names {[len(layer) for layer in origins]} experts per layer, the model has "
            f"{layers} layers of {count}.",
            hint="It belongs to another checkpoint: delete it, and experts go by their numbers.",
        )
    return origins


def _experts_and_router(layout: Layout, layer: int, count: int) -> Iterator[str]:
    """Names of a layer's tensors that have an entry, or are one, per routed expert."""
    yield layout.router.format(layer=layer)
    if layout.correction_bias:
        yield layout.correction_bias.format(layer=layer)
    for template in layout.experts.values():
        if layout.fused:
            yield template.format(layer=layer)
        else:
            yield from (template.format(layer=layer, expert=expert) for expert in range(count))


def _misfits(moe: ExistingMoe) -> Iterator[str]:
    if not moe.layers:
        yield f"there is no {moe.layout.router.format(layer=0)}"
    for layer in moe.layers:
        shapes = dict(_expected_shapes(moe, layer))
        for name, shape in shapes.items():
            if name not in moe.weights:
                yield f"there is no {name}"
            elif moe.weights[name].shape != shape:
                yield f"{name} is {list(moe.weights[name].shape)}, not {list(shape)}"
        block = ".".join(moe.layout.router.format(layer=layer).split(".")[:BLOCK_DEPTH]) + "."
        passed = [*(moe.layout.shared or {}).values(), moe.layout.shared_gate or ""]
        known = shapes.keys() | {template.format(layer=layer) for template in passed}
        yield from (
            f"{name} is none of its parts" for name in moe.weights if name.startswith(block) and name not in known
        )


def _expected_shapes(moe: ExistingMoe, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    count, width, hidden = moe.num_experts, moe.expert_width, moe.config.hidden_size
    rows: dict[str, tuple[int, ...]] = {moe.layout.router.format(layer=layer): (count, hidden)}
    if moe.layout.correction_bias:
        rows[moe.layout.correction_bias.format(layer=layer)] = (count,)
    one = {
        "gate_proj": (width, hidden),
        "up_proj": (width, hidden),
        "gate_up_proj": (2 * width, hidden),
        "down_proj": (hidden, width),
    }
    yield from rows.items()
    for projection, template in moe.layout.experts.items():
        if moe.layout.fused:
            yield template.format(layer=layer), (count, *one[projection])
        else:
            for expert in range(count):
                yield template.format(layer=layer, expert=expert), one[projection]
