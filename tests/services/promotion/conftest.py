"""Promotions at work: with what they tell, and comparisons that refuse as told."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from moestro.artifacts import Artifact
from moestro.deployment import comparison
from moestro.registry import ModelRegistry
from moestro_flows.home import Home
from moestro_services.promotion import Promotions

Deploying = Any
"""`services.conftest.Deploying`."""


class Written:
    """An audit log in memory."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, str, str, dict[str, Any]]] = []

    def write(self, actor: str, action: str, target: str, **details: Any) -> None:
        self.entries.append((actor, action, target, details))

    @property
    def last(self) -> dict[str, Any]:
        actor, action, target, details = self.entries[-1]
        return {"actor": actor, "action": action, "target": target} | details


class Desk:
    """Promotions with what they tell, and a way to look at the model."""

    def __init__(self, home: Home) -> None:
        self.audit = Written()
        self.changes = 0
        self.promotions = Promotions(home, self.audit, changed=self._changed)
        self.models = ModelRegistry(home.mlflow_uri, home.mlflow_files)

    def _changed(self) -> None:
        self.changes += 1

    def register(self, *artifacts: Artifact) -> None:
        for artifact in artifacts:
            self.promotions.register(artifact, actor="test")

    def promote(self, version: str = "challenger", **options: Any) -> Any:
        return self.promotions.promote("assistant", version, actor="test", **options)

    def rollback(self, **options: Any) -> Any:
        return self.promotions.rollback("assistant", actor="test", **options)

    @property
    def state(self) -> tuple[Mapping[str, str], float]:
        model = self.models.model("assistant")
        return model.aliases, model.canary_share


@pytest.fixture
def desk(deploying: Deploying) -> Desk:
    return Desk(deploying.home)


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the comparison with the champion refuse in the given words."""

    def refuse(*words: str) -> None:
        monkeypatch.setattr(comparison, "refusals", lambda *_, **__: list(words))

    return refuse


@pytest.fixture
def desk_in() -> type[Desk]:
    return Desk
