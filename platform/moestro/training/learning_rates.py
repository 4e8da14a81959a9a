"""Learning rates by group of parameters, and the factor of routed experts by Hunyuan-Large (arXiv 2411.02265, 2.2.3).

Of Adam-like optimisers the best learning rate at a batch of B tokens is (arXiv 2405.14578)
    lr(B) = 2 lr_max / (sqrt(B_noise / B) + sqrt(B / B_noise)).
An expert that sees a share s of the tokens trains on batches of s B, so beside everything that sees all of them its
factor is
    lr(s B) / lr(B) = sqrt(s) (1 + B / B_noise) / (1 + s B / B_noise),
between sqrt(s), for batches far below the noise scale B_noise, and 1/sqrt(s) far above it. `auto` takes sqrt(s), with
s = K / E where loads are balanced: batches that are fine-tuned on are small. (Hunyuan-Large has 1 of 16 experts per
token and reports 0.31, where sqrt(1/16) is 0.25: its B is 0.26 B_noise.)
"""

from dataclasses import dataclass

from moestro.config import ParameterRates
from moestro.models.routers import is_expert_weight, is_router_weight, is_shared_expert_weight


def expert_factor(token_share: float) -> float:
    """Factor of the learning rate of experts that each see this share of the tokens, in (0, 1]."""
    return token_share**0.5


@dataclass(frozen=True)
class RateFactors:
    """What the learning rate is multiplied by, by group of parameters; 0 means that the group does not train."""

    experts: float = 1.0
    shared_experts: float = 1.0
    routers: float = 1.0
    others: float = 1.0

    @classmethod
    def of(cls, rates: ParameterRates, token_share: float) -> "RateFactors":
        """The factors of `rates`, where a routed expert sees `token_share` of the tokens."""
        experts = expert_factor(token_share) if rates.experts == "auto" else rates.experts
        return cls(experts, rates.shared_experts, rates.routers, rates.others)

    def factor(self, name: str) -> float:
        """The factor of the parameter of that name."""
        if is_expert_weight(name):
            return self.experts
        if is_shared_expert_weight(name):
            return self.shared_experts
        return self.routers if is_router_weight(name) else self.others


ALIKE = RateFactors()
"""One learning rate for all."""
