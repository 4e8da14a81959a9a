"""Refuses requests for unknown steering profiles where vLLM takes requests in. Only vLLM imports this module.

A worker that meets an unknown profile in the middle of a batch can only end, and the engine with it.
"""

import os
from typing import Any

from vllm.v1.sample.logits_processor import LogitsProcessor

from moestro.inference.steering import KNOWN_PROFILES, PROFILE_ARGUMENT


class KnownProfiles(LogitsProcessor):
    """A logits processor that leaves logits alone; vLLM asks it about every request's parameters first."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise `ValueError`, which vLLM answers with 400, for a profile that this server does not know."""
        wanted = (sampling_params.extra_args or {}).get(PROFILE_ARGUMENT)
        if wanted is not None and wanted not in os.environ.get(KNOWN_PROFILES, "").split(","):
            raise ValueError(f"This server knows no steering profile {wanted!r}.")

    def __init__(self, _vllm_config: Any, _device: Any, _is_pin_memory: bool) -> None:
        """Needs nothing."""

    def apply(self, logits: Any) -> Any:
        """The logits as they are."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """It changes nothing, so greedy sampling may leave it out."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """Nothing depends on the batch."""
