"""`moestro bench grpo-parity`: are the objectives TRL's, loss and gradients, on the same batch?

TRL runs in an environment of its own; the batch, the model and the log-probabilities before it are the same files for
both. A tiny Mixtral in float32, completions of unequal length, an update in which tokens are clipped on both sides.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from moestro.config import AlgorithmConfig, Cispo, Correction, Dapo, DrGrpo, Grpo, Gspo, KlPenalty, RlConfig, TaskConfig
from moestro.data.tokenizer import train_bpe
from moestro.errors import ResourceError
from moestro.rl.objectives import OBJECTIVES
from moestro.rl.rollouts import Rollouts
from moestro.rl.update import Learner, accumulate
from moestro.training.optimizer import build_optimizer
from moestro_services.peers import peer_environment

TRL = "1.16.0"
SCRIPT = Path(__file__).with_name("trl_side.py")
LIMIT = 1e-6
MAX_TOKENS = 9
PROMPT, SEQUENCES = 5, 6
KL = KlPenalty(coefficient=0.04)


@dataclass(frozen=True)
class Variant:
    """One objective in both tools' words."""

    name: str
    algorithm: AlgorithmConfig
    fields: Mapping[str, Any]
    """Of TRL's `GRPOConfig`."""
    weighted: bool = False
    """With importance weights between engine and trainer."""
    penalised: bool = False
    """With a KL penalty."""


VARIANTS = (
    Variant("grpo", Grpo(), {"loss_type": "grpo"}),
    Variant(
        "grpo, clip higher", Grpo(clip=0.1, clip_high=0.3), {"loss_type": "grpo", "epsilon": 0.1, "epsilon_high": 0.3}
    ),
    Variant(
        "grpo, k3 penalty",
        Grpo(),
        {"loss_type": "grpo", "beta": KL.coefficient, "use_bias_correction_kl": False},
        penalised=True,
    ),
    Variant("grpo, importance weights", Grpo(), {"loss_type": "grpo"}, weighted=True),
    Variant("dr_grpo", DrGrpo(), {"loss_type": "dr_grpo"}),
    Variant("dapo", Dapo(), {"loss_type": "dapo", "epsilon_high": 0.28}),
    Variant(
        "gspo",
        Gspo(clip=0.05, clip_high=0.1),
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.1},
    ),
    Variant("cispo", Cispo(max_ratio=1.3), {"loss_type": "cispo", "epsilon_high": 1.3}),
)


@dataclass(frozen=True)
class Difference:
    """Between both tools; gradients relative to the largest entry of any."""

    loss: float
    gradient: float
    clipped: int
    """Tokens held at a bound."""


def bench() -> dict[str, Any]:
    """A minute, and some more the first time, when TRL is installed into the home's folder `peers`."""
    return report(compare(peer_environment("trl", TRL)))


def compare(python: Path) -> dict[str, Difference]:
    """Every variant, by name; `python` is an interpreter that has TRL."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = _write_model(folder / "model")
        rollouts = _rollouts(model)
        save_file(_trl_inputs(rollouts), folder / "batch.safetensors")
        wanted = [
            {"max_tokens": MAX_TOKENS, "weighted": one.weighted, "fields": {"beta": 0.0, **one.fields}}
            for one in VARIANTS
        ]
        (folder / "variants.json").write_text(json.dumps(wanted))
        (folder / "out").mkdir()
        _run_trl(python, folder)
        return {
            variant.name: _difference(model, rollouts, variant, load_file(folder / "out" / f"{number}.safetensors"))
            for number, variant in enumerate(VARIANTS)
        }


def _write_model(folder: Path) -> MixtralForCausalLM:
    train_bpe(["one two three four"] * 3, 288).save_pretrained(folder)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=288,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = MixtralForCausalLM(config)
    model.save_pretrained(folder)
    model.set_experts_implementation("eager")
    return model.eval()


def _rollouts(model: MixtralForCausalLM) -> Rollouts:
    """Random tokens; log-probabilities before the update, in the engine and the reference are near the model's."""
    generator = torch.Generator().manual_seed(1)
    shape = (SEQUENCES, PROMPT + MAX_TOKENS - 1)
    tokens = torch.randint(1, 288, (SEQUENCES, PROMPT + MAX_TOKENS), generator=generator)
    lengths = torch.tensor([9, 7, 1, 4, 9, 2])
    positions = torch.arange(shape[1])
    real = positions < (PROMPT + lengths - 1)[:, None]
    mask = real & (positions >= PROMPT - 1)
    inputs, targets = tokens[:, :-1] * real, tokens[:, 1:] * real
    with torch.no_grad():
        logits = model(input_ids=inputs).logits
    now = torch.where(mask, logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0], 0.0)

    def near(width: float) -> Tensor:
        return torch.where(mask, now + width * torch.randn(shape, generator=generator), 0.0)

    old, engine, reference = near(0.3), near(0.4), near(0.5)
    return Rollouts(
        inputs, targets, mask, real, engine, torch.randn(SEQUENCES, generator=generator), None, old,
        torch.where(mask, (old - engine).exp().clamp(max=2.0), 1.0), reference,
    )  # fmt: skip


def _trl_inputs(rollouts: Rollouts) -> dict[str, Tensor]:
    """The batch in TRL's layout: prompt and completion apart, the latter from its first token."""
    first = PROMPT - 1

    def completions(values_BS: Tensor | None) -> Tensor:
        assert values_BS is not None
        return values_BS[:, first:].contiguous()

    return {
        "prompt_ids": rollouts.inputs_BS[:, :PROMPT].contiguous(),
        "prompt_mask": torch.ones(SEQUENCES, PROMPT, dtype=torch.long),
        "completion_ids": completions(rollouts.targets_BS),
        "completion_mask": completions(rollouts.mask_BS).long(),
        "advantages": rollouts.advantages_B,
        "old_per_token_logps": completions(rollouts.old_logprobs_BS),
        "ref_per_token_logps": completions(rollouts.reference_logprobs_BS),
        "importance_sampling_ratio": completions(rollouts.importance_BS),
        "num_items_in_batch": rollouts.mask_BS.sum(),
    }


def _run_trl(python: Path, folder: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    names = ("model", "batch.safetensors", "variants.json", "out")
    command = [str(python), str(SCRIPT), *(str(folder / name) for name in names)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ResourceError(f"TRL ended with code {done.returncode}:\n{done.stderr.strip()[-2000:]}")


def _difference(
    model: MixtralForCausalLM, rollouts: Rollouts, variant: Variant, theirs: dict[str, Tensor]
) -> Difference:
    config = RlConfig(
        task=TaskConfig(name="chain_sum"),
        algorithm=variant.algorithm,
        kl=KL if variant.penalised else None,
        correction=Correction() if variant.weighted else None,
        max_tokens=MAX_TOKENS,
        routing="off",
        micro_batch_size=4,
    )
    optimizer, schedule = build_optimizer(model, config.optimizer, 1)
    model.zero_grad(set_to_none=True)
    batch = rollouts if variant.weighted else Rollouts(**{**vars(rollouts), "importance_BS": None})
    sums = accumulate(Learner(model, optimizer, schedule, config, "off"), batch)
    largest = max(float(value.abs().max()) for name, value in theirs.items() if name != "loss")
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    furthest = max(float((gradient - theirs[name]).abs().max()) for name, gradient in gradients.items())
    return Difference(abs(sums.loss - float(theirs["loss"])), furthest / largest, sums.low + sums.high)


def report(found: Mapping[str, Difference]) -> dict[str, Any]:
    """The table, its bounds and notes."""
    return {
        "title": f"Objectives against TRL {TRL}, on the same batch",
        "columns": ["objective", "loss differs by", "gradients differ by", "tokens held at a bound"],
        "rows": [[name, f"{one.loss:.1e}", f"{one.gradient:.1e}", one.clipped] for name, one in found.items()],
        "bounds": [
            {"what": what, "value": value, "limit": f"<= {LIMIT:.0e}", "ok": value <= LIMIT}
            for what, value in (
                ("largest difference of losses", max(one.loss for one in found.values())),
                (
                    "largest difference of gradients, by their largest entry",
                    max(one.gradient for one in found.values()),
                ),
            )
        ],
        "notes": [
            "A tiny Mixtral in float32, eager experts on both sides; ours in two micro-batches, TRL's in one.",
            f"Known objectives: {', '.join(OBJECTIVES)}.",
        ],
    }
