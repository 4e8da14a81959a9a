"""Weight soup: the unweighted mean of branches (arXiv 2203.05482), a dense checkpoint again."""

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moestro.artifacts import RECORD_NAME, Artifact
from moestro.models.weights import NewTensor, StoredTensor, StoredWeights, write_weights


def soup(models: Sequence[Path], out: Path) -> Artifact:
    """Write the mean of `models`, which have the same tensors, to the new folder `out`, all else as in the first."""
    shutil.copytree(models[0], out, ignore=shutil.ignore_patterns("*.safetensors", RECORD_NAME))
    stored = [StoredWeights(folder) for folder in models]
    tensors = {
        name: NewTensor(first.dtype, first.shape, _mean([weights[name] for weights in stored]))
        for name, first in stored[0].items()
    }
    write_weights(out, tensors, max_shard_bytes=sys.maxsize)
    return Artifact.open(out)


def _mean(members: Sequence[StoredTensor]) -> Callable[[], Iterator[Tensor]]:
    def make() -> Iterator[Tensor]:
        yield torch.stack([member.read().double() for member in members]).mean(dim=0).to(members[0].dtype)

    return make
