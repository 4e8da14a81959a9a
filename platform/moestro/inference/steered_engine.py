"""`SteeredEngine`: a `VllmEngine` whose requests may each follow a steering profile."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moestro.errors import InputError
from moestro.inference.engine import Completion, EngineConfig, Sampling, Scored, VllmEngine
from moestro.inference.steering import PROFILE_ARGUMENT, PROFILES_KEY, WORKER, cache_salt

Profiles = Sequence[str | None]


class SteeredEngine(VllmEngine):
    """vLLM in this process, with profiles. What names none is answered as by a `VllmEngine`, to the bit."""

    def __init__(self, folder: Path, config: EngineConfig, profiles: Mapping[str, Path]) -> None:
        """Load the checkpoint in `folder`, and `profiles`, files or folders by the id that requests give.

        Raises what `VllmEngine` does, and `InputError` for a profile that does not fit or a router that cannot be
        steered.
        """
        self._profiles = dict(profiles)
        self._wanted: Profiles | None = None
        super().__init__(folder, config)

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, profiles: Profiles | None = None
    ) -> list[list[Completion]]:
        """See `Engine`; `profiles` has one entry per prompt. Raises `InputError` for an unknown one."""
        with self._following(prompts, profiles):
            return super().generate(prompts, sampling)

    def score(self, sequences: list[list[int]], profiles: Profiles | None = None) -> list[Scored]:
        """See `Engine`; `profiles` has one entry per sequence. Raises `InputError` for an unknown one."""
        with self._following(sequences, profiles):
            return super().score(sequences)

    @contextmanager
    def _following(self, prompts: list[list[int]], profiles: Profiles | None) -> Iterator[None]:
        if profiles is not None and len(profiles) != len(prompts):
            raise InputError(f"There are {len(profiles)} profiles for {len(prompts)} prompts.")
        if unknown := sorted({name for name in profiles or () if name} - set(self._profiles)):
            raise InputError(f"The engine knows no steering profile {unknown[0]!r}.")
        self._wanted = profiles
        try:
            yield
        finally:
            self._wanted = None

    def _further_arguments(self) -> dict[str, Any]:
        files = {name: str(path) for name, path in sorted(self._profiles.items())}
        return {"worker_cls": WORKER, "additional_config": {PROFILES_KEY: files}}

    def _requests(self, prompts: list[list[int]], params: Any) -> tuple[list[Any], Any]:
        requests, own = [], []
        for prompt, profile in zip(prompts, self._wanted or [None] * len(prompts), strict=True):
            request: dict[str, Any] = {"prompt_token_ids": prompt}
            mine = copy.copy(params)
            if profile is not None:
                request["cache_salt"] = cache_salt(profile)
                mine.extra_args = {PROFILE_ARGUMENT: profile}
            requests.append(request)
            own.append(mine)
        return requests, own
