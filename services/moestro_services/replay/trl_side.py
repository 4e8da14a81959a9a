"""TRL's side of `moestro bench grpo-parity`: run by the interpreter of TRL's own environment, as

    python trl_side.py MODEL BATCH.safetensors VARIANTS.json OUT

For each variant, the loss of TRL's `GRPOTrainer` on the batch and its gradients, in OUT/<number>.safetensors.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # type: ignore[import-not-found,unused-ignore]
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer  # type: ignore[import-not-found,unused-ignore]


def main(model: Path, batch: Path, variants: Path, out: Path) -> None:
    """Compute all variants."""
    inputs = load_file(batch)
    for number, variant in enumerate(json.loads(variants.read_text())):
        save_file(_loss_and_gradients(model, inputs, variant), out / f"{number}.safetensors")


def _loss_and_gradients(folder: Path, inputs: dict[str, torch.Tensor], variant: dict[str, Any]) -> dict[str, Any]:
    sequences = len(inputs["completion_ids"])
    arguments = GRPOConfig(
        output_dir=str(folder.parent / "trl"),
        use_cpu=True,
        bf16=False,
        router_aux_loss_coef=0.0,
        report_to=[],
        per_device_train_batch_size=sequences,
        num_generations=sequences,
        max_completion_length=variant["max_tokens"],
        **variant["fields"],
    )
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    trainer = GRPOTrainer(
        model=network,
        args=arguments,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * sequences}),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.current_gradient_accumulation_steps = 1
    weighted = variant["weighted"]
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = weighted
    given = {name: value for name, value in inputs.items() if weighted or name != "importance_sampling_ratio"}
    loss = trainer._compute_loss(network, given)
    loss.backward()
    found = {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}
    return {"loss": loss.detach().reshape(1), **found}


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
