"""`Profile`: a steering profile as it lies in steering.json, readable without torch."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from moestro.config import Config
from moestro.errors import InputError

STEERING = "steering.json"


class Method(StrEnum):
    """How a profile steers; `steering_rules` has the formulas."""

    SUPPRESS = "suppress"
    BOOST = "boost"
    LANGUAGE = "language"
    CONTRAST = "contrast"


PARAMETERS: dict[Method, set[str]] = {
    Method.SUPPRESS: set(),
    Method.BOOST: {"margin"},
    Method.LANGUAGE: {"strength", "threshold"},
    Method.CONTRAST: {"alpha", "beta", "weak_rank"},
}


class SteeredCheckpoint(Config):
    """The checkpoint a profile was made for."""

    stage: str
    """The stage that made it."""
    fingerprint: str
    """Its identity."""


class Profile(Config):
    """What is done to the routing of a request that names the profile."""

    name: str
    """What requests call it."""
    method: Method
    """How it steers."""
    checkpoint: SteeredCheckpoint
    """What it steers; it is refused for any other checkpoint."""
    layers: tuple[tuple[int, ...], ...]
    """Per sparse layer, the experts it names; all empty for contrast, which acts on every layer."""
    num_experts: int = Field(ge=2)
    """Routed experts of a layer."""
    top_k: int = Field(ge=1)
    """Experts chosen per token."""
    renormalises: bool
    """Whether the routers make the chosen gates add up to one."""
    parameters: dict[str, float]
    """The method's numbers."""
    gate: dict[str, Any] = Field(default_factory=dict)
    """Figures and thresholds of the gate it passed."""

    @model_validator(mode="after")
    def _consistent(self) -> "Profile":
        if set(self.parameters) != PARAMETERS[self.method]:
            raise ValueError(f"parameters: {self.method} has {sorted(PARAMETERS[self.method]) or 'none'}")
        named = [expert for experts in self.layers for expert in experts]
        if any(not 0 <= expert < self.num_experts for expert in named):
            raise ValueError(f"layers: experts are numbered 0 to {self.num_experts - 1}")
        if any(len(set(experts)) != len(experts) for experts in self.layers):
            raise ValueError("layers: an expert is named twice in a layer")
        if (self.method == Method.CONTRAST) == bool(named):
            raise ValueError(f"layers: {'no experts belong' if named else 'experts must be named'} here")
        if self.method == Method.BOOST and any(len(experts) > self.top_k for experts in self.layers):
            raise ValueError(f"layers: more than {self.top_k} experts are boosted in a layer, a token chooses no more")
        if not 1 <= self.parameters.get("weak_rank", 1) <= self.num_experts:
            raise ValueError(f"weak_rank: there are {self.num_experts} ranks")
        return self

    @classmethod
    def read(cls, path: Path) -> "Profile":
        """The profile in the file `path`, or in steering.json of the folder `path`.

        Raises `InputError` if it is missing, unreadable or contradicts itself.
        """
        file = path / STEERING if path.is_dir() else path
        try:
            return cls.model_validate(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise InputError(f"{file} holds no steering profile: {reason}.") from None

    def write(self, folder: Path) -> None:
        """Write steering.json into `folder`."""
        text = json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
        (folder / STEERING).write_text(text, encoding="utf-8")
