"""The bias on the choice that some routers have (DeepSeek-V3, arXiv 2412.19437, eq. 16): sigmoid(x) + b is chosen by,
sigmoid(x) makes the gates.

It is a stored buffer: saved with the weights, in training checkpoints too, and heeded where the model is served.
E experts.
"""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from moestro.errors import ConfigError
from moestro.models.routers import routers

NAME = "e_score_correction_bias"


def biased_routers(model: PreTrainedModel, loss: str) -> list[Any]:
    """The routers in layer order. Raises `ConfigError` if they have no correction bias for `loss` to move."""
    found = routers(model)
    without = [router for router in found if not hasattr(router, NAME)]
    if without:
        raise ConfigError(
            f"tune.losses: {loss} moves a correction bias, and the model's routers ({type(without[0]).__name__}) "
            "have none.",
            hint="Mix with `mix.selection: loss_free`, or balance by `global_batch`.",
        )
    return found


def biases(found: list[Any]) -> list[Tensor]:
    """Each router's bias, [E] float32, to be changed in place."""
    return [router.e_score_correction_bias for router in found]


def spread(found: list[Any]) -> float:
    """Largest less smallest bias, of the layer where that is most: how far choices depart from scores."""
    return max(float(bias_E.max() - bias_E.min()) for bias_E in biases(found))
