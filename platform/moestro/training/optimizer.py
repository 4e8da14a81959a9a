"""AdamW (arXiv 1711.05101) and its learning-rate schedule.

Weight decay acts on matrices only. Embeddings (also where they serve as the output head), norms and biases are
exempt, and so are routers: decay would draw their logits towards uniform routing, which is the balance loss's task.
"""

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel

from moestro.config import OptimizerConfig
from moestro.models.routers import is_router_weight
from moestro.training.learning_rates import ALIKE, RateFactors


def build_optimizer(
    model: PreTrainedModel, config: OptimizerConfig, total_steps: int, factors: RateFactors = ALIKE
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """AdamW over the parameters of `model` that require gradients, and its schedule, stepped once per step.

    `factors` multiply the learning rate, hence also what weight decay takes off per step.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = []
    for parameters, decay in zip(parameter_groups(model), (config.weight_decay, 0.0), strict=True):
        by_factor: dict[float, list[nn.Parameter]] = {}
        for parameter in parameters:
            by_factor.setdefault(factors.factor(names[id(parameter)]), []).append(parameter)
        groups += [
            {"params": group, "weight_decay": decay, "lr": factor * config.learning_rate}
            for factor, group in by_factor.items()
        ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
    return optimizer, LambdaLR(optimizer, lambda step: schedule_factor(config, step, total_steps))


def parameter_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters that weight decay acts on, and those it does not act on."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.dim() >= 2 and id(parameter) not in embeddings and not is_router_weight(name)
            (decayed if matrix else exempt).append(parameter)
    return decayed, exempt


def schedule_factor(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Share of the peak learning rate at `step` (from 0).

    It rises linearly to 1 at the last step of the warm-up, then decays to `min_learning_rate_ratio` at the last step.
    """
    warmup = config.warmup
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step + 1 - warmup) / max(1, total_steps - warmup))
    floor = config.min_learning_rate_ratio
    match config.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - (1.0 - floor) * progress
        case "cosine":
            return floor + (1.0 - floor) * (1 + math.cos(math.pi * progress)) / 2
