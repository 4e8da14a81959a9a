"""The models that routing replay is measured on: the quickstart's own, and one whose routing is easily upset."""

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moestro.artifacts import Artifact
from moestro.config import Config, LifecycleConfig, load_lifecycle
from moestro.execution import Step, run_step
from moestro.models.checkpoint import save_model
from moestro_flows.home import Home
from moestro_flows.lifecycle import walk

CONFIG = Path("examples/quickstart.yaml")
EXPERTS, CHOSEN = 32, 4
MEASURING = ("evaluate", "profile")


def quickstart() -> tuple[LifecycleConfig, Artifact, list[Artifact]]:
    """The quickstart's config, its model as tuning leaves it, and its domains' tokens: found in the home (`make demo`),
    or made."""
    lifecycle = load_lifecycle(CONFIG)
    store, made = Home.current().store, dict[str, Artifact]()

    def run(name: str, stage: str, config: Config, **inputs: Any) -> Any:
        if stage not in MEASURING:
            made[name] = run_step(store, Step(stage, config, inputs), resources=lifecycle.resources)
        return made.get(name)

    walk(lifecycle.model_copy(update={"rl": None, "compress": None, "deploy": None}), run)
    return lifecycle, made["tune"], [one for name, one in made.items() if name.startswith("tokens ")]


def write_fragile(folder: Path, tokenizer: Path, *, seed: int) -> None:
    """A random Qwen3-MoE (6 layers, 32 experts, 4 chosen) with weights so wide that rounding often changes a route.

    It has the vocabulary of the checkpoint in `tokenizer`, whose tokenizer it carries.
    """
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=2048,
        hidden_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        max_position_embeddings=512,
        initializer_range=0.12,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    save_model(Qwen3MoeForCausalLM(config), folder, tokenizer_from=tokenizer, origins=[["seed"] * EXPERTS] * 6)
