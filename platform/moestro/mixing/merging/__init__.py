"""What becomes of the weights that are no expert's: one file a method, `METHODS` is the registry.

A method is a function `(config, sources) -> merge`. `sources` (see `Sources`) is one weight in all models; the method
may read through its blocks beforehand. `merge` makes the result's rows, float64, of a `Block`; it is asked for those
alone that the seed has and on which not all models agree. Rows that all agree on are kept bit for bit, and rows that
the seed lacks are the mean of the branches that have them, whatever the method. Memory is that of a few blocks.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moestro.config import Mean, MergeConfig, RestConfig
from moestro.mixing.merging.dare import dare
from moestro.mixing.merging.mean import mean
from moestro.mixing.merging.report import MergeReport
from moestro.mixing.merging.seed import keep_seed
from moestro.mixing.merging.sources import Block, Sources, Span
from moestro.mixing.merging.ties import ties
from moestro.models.vocabulary import VOCABULARY_WEIGHTS, Vocabulary
from moestro.models.weights import NewTensor, StoredWeights, check_fits

SEED = "seed"
Merge = Callable[[Block], Tensor]
Method = Callable[[Any, Sources], Merge]

METHODS: dict[str, Method] = {
    "seed": keep_seed,
    "mean": mean,
    "ties": ties,
    "dare": dare,
}
"""By `type` of the config."""


def group_of(name: str) -> str:
    """The module group that the dense weight `name` belongs to: a field of `RestConfig`."""
    if ".self_attn." in name:
        return "attention"
    return "norms" if "norm" in name else "embeddings"


@dataclass(frozen=True)
class Merger:
    """Merges the weights that are no expert's, one by one, and reports how much the models differed."""

    config: RestConfig
    seed: StoredWeights
    branches: Mapping[str, StoredWeights]
    """By name, in order."""
    vocabulary: Vocabulary
    report: MergeReport = field(default_factory=MergeReport)
    """Filled while the weights are written."""

    def weight(self, name: str, dtype: torch.dtype) -> NewTensor:
        """The dense weight `name` of all models, to be written in `dtype`; raises `InputError` if one lacks it."""
        branches = tuple(branch[name] for branch in self.branches.values())
        spans = self._spans() if name in VOCABULARY_WEIGHTS else ()
        sources = Sources(name, self.seed[name], branches, spans)
        return NewTensor(dtype, sources.shape, lambda: self._blocks(sources, dtype))

    def _spans(self) -> tuple[Span, ...]:
        return tuple(
            Span(start, stop, SEED in having, tuple(i for i, name in enumerate(self.branches) if name in having))
            for start, stop, having in self.vocabulary.spans()
        )

    def _blocks(self, sources: Sources, dtype: torch.dtype) -> Iterator[Tensor]:
        group = group_of(sources.name)
        config: MergeConfig = getattr(self.config, group)
        counts = self.report.begin(group, sources.name)
        merge: Merge | None = None
        for block in sources.blocks():
            counts.add(block)
            if block.agrees:
                yield check_fits(block.members[0].to(dtype), sources.name)
            elif block.seed is None:
                yield check_fits(mean(Mean(), sources)(block).to(dtype), f"The mean of all {sources.name}")
            else:
                merge = merge or METHODS[config.type](config, sources)
                yield check_fits(merge(block).to(dtype), f"What {config.type} makes of {sources.name}")
