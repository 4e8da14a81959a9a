"""Steering profiles: which experts a request's tokens shall take or leave, gated by what that costs.

`stage` makes a profile, `selection` finds the experts, `reference` is steering in transformers. Formulas are in
`moestro.models.steering_rules`, vLLM's part in `moestro.inference.steering_worker`.
"""

from moestro.steering.stage import steer

__all__ = ["steer"]
