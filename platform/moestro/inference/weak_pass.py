"""The weak pass of self-contrast (SCMoE, arXiv 2405.14507) in vLLM's worker: a second KV cache, and mixed logits.

The model runner keeps a step's hidden states and asks the model for logits of some of their rows, to sample from or for
prompts' log-probabilities. While a step has contrasted requests, hidden states of both passes travel side by side,
[T, D | D | 1] with the profile's number in the last column, and `compute_logits` mixes what it makes of the two.

T tokens of a step, D hidden, R contrasted rows, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moestro.errors import InputError
from moestro.models.steering_profiles import Profile
from moestro.models.steering_rules import contrast

MOST_PROFILES = 255
"""Numbers up to 256 are exact in bfloat16."""


class WeakPass:
    """What a worker with contrast profiles has besides its model runner's own."""

    def __init__(self, model_runner: Any, profiles: Mapping[str, Profile]) -> None:
        """`profiles` are those of contrast, by id. Raises `InputError` for too many."""
        if len(profiles) > MOST_PROFILES:
            raise InputError(f"A server takes {MOST_PROFILES} contrast profiles, there are {len(profiles)}.")
        self.profiles = list(profiles)
        self._runner = model_runner
        numbers = [(1.0, 0.0), *((item.parameters["alpha"], item.parameters["beta"]) for item in profiles.values())]
        self._alpha_beta = torch.tensor(numbers, device=model_runner.device)
        self._caches: list[tuple[Any, Tensor]] = []

    def install(self) -> None:
        """Make the model mix logits where two hidden states lie side by side."""
        model = self._runner.get_model()
        model.compute_logits = self._mixing(model.compute_logits)

    def allocate(self) -> None:
        """A second KV cache, as large as the first; raises `InputError` where layers keep something else."""
        seen: dict[tuple[int, torch.Size], Tensor] = {}
        for name, layer in self._runner.compilation_config.static_forward_context.items():
            own = getattr(layer, "kv_cache", None)
            if own is None:
                continue
            if not isinstance(own, Tensor):
                raise InputError(f"Contrast cannot be served: {name} keeps more than keys and values.")
            weak = seen.setdefault((own.data_ptr(), own.shape), torch.zeros_like(own))
            self._caches.append((layer, weak))

    @contextmanager
    def cache(self) -> Iterator[None]:
        """In the block, attention reads and writes the second cache."""
        strong = [layer.kv_cache for layer, _ in self._caches]
        try:
            for layer, weak in self._caches:
                layer.kv_cache = weak
            yield
        finally:
            for (layer, _), own in zip(self._caches, strong, strict=True):
                layer.kv_cache = own

    def join(self, strong_TD: Tensor, weak_TD: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Both passes' hidden states and the profiles' numbers, [T, 2D + 1]."""
        number_T1 = strong_TD.new_zeros(len(strong_TD), 1)
        for name, chosen in rows.items():
            number_T1[chosen] = float(self.profiles.index(name) + 1)
        return torch.cat([strong_TD, weak_TD, number_T1], dim=-1)

    def _mixing(self, compute: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        width = self._runner.model_config.get_hidden_size()

        def run(hidden: Tensor, *further: Any, **options: Any) -> Tensor | None:
            if hidden.shape[-1] == width:
                return compute(hidden, *further, **options)
            strong, weak, number = hidden.split([width, width, 1], dim=-1)
            numbers_T = number[:, 0].round().long()
            rows = numbers_T.nonzero()[:, 0]
            logits_TV = compute(strong.contiguous(), *further, **options)
            if not len(rows):
                return logits_TV
            weak_RV = compute(weak.index_select(0, rows), *further, **options)
            if logits_TV is None or weak_RV is None:  # another rank has them
                return None
            alpha_R1, beta_R1 = self._alpha_beta[numbers_T[rows]].split(1, dim=-1)
            mixed_TV = logits_TV.float()
            mixed_TV.index_copy_(0, rows, contrast(mixed_TV.index_select(0, rows), weak_RV, alpha_R1, beta_R1))
            return mixed_TV

        return run
