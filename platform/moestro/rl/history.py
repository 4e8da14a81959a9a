"""The figures of every update: those that are the same in every run go into history.json, timings do not."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAME = "history.json"


@dataclass
class Timing:
    """Tokens and seconds of one phase, over all updates."""

    tokens: int = 0
    seconds: float = 0.0
    last: float = 0.0
    """Tokens per second of what was added last."""

    def add(self, tokens: int, seconds: float) -> None:
        """Add one update's share."""
        self.tokens += tokens
        self.seconds += seconds
        self.last = tokens / max(seconds, 1e-9)

    @property
    def tokens_per_second(self) -> float:
        """Over all updates."""
        return self.tokens / max(self.seconds, 1e-9)


@dataclass
class History:
    """What has happened so far."""

    steps: list[dict[str, float]] = field(default_factory=list)
    routing: dict[str, Any] = field(default_factory=dict)
    """Mode of replay, the reason for it, and the preflight's figures; empty before the first update."""
    rollout: Timing = field(default_factory=Timing)
    update: Timing = field(default_factory=Timing)

    @classmethod
    def restore(cls, state: dict[str, Any]) -> "History":
        """The history that `state` gave; empty for an empty dict."""
        if not state:
            return cls()
        return cls(state["steps"], state["routing"], Timing(**state["rollout"]), Timing(**state["update"]))

    def state(self) -> dict[str, Any]:
        """All of it as JSON values, to be kept with the training state."""
        return {
            "steps": self.steps,
            "routing": self.routing,
            "rollout": vars(self.rollout),
            "update": vars(self.update),
        }

    def publish(self, out: Path) -> None:
        """Write history.json without timings."""
        (out / NAME).write_text(json.dumps({"routing": self.routing, "steps": self.steps}, indent=1) + "\n")

    def result(self) -> Mapping[str, Any]:
        """Key figures."""
        rewards = [row["reward"] for row in self.steps]
        first, last = rewards[:2], rewards[-2:]
        return {
            "reward_first": sum(first) / len(first),
            "reward_last": sum(last) / len(last),
            "steps": len(self.steps),
            "routing": self.routing["mode"],
            "max_refresh_difference": max(row["sync/max_abs_dlogp"] for row in self.steps),
            "k3": max(row["r3/k3_kl"] for row in self.steps),
            "rollout_tokens_per_second": self.rollout.tokens_per_second,
            "update_tokens_per_second": self.update.tokens_per_second,
        }
