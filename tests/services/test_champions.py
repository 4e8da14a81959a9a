"""A model whose champion does not answer, or that has none, is told."""

from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from moestro_services.gateway.champions import Champions


@dataclass
class Replica:
    serving: bool


@dataclass
class Route:
    champion: Replica | None


def test_a_champion_that_answers_is_up_and_anything_else_is_not() -> None:
    table = {"a": Route(Replica(True)), "b": Route(Replica(False)), "c": Route(None)}
    registry = CollectorRegistry()
    registry.register(Champions(lambda: table))
    seen = {name: registry.get_sample_value("moestro_gateway_champion_up", {"model": name}) for name in table}
    assert seen == {"a": 1, "b": 0, "c": 0}
    del table["b"]
    assert registry.get_sample_value("moestro_gateway_champion_up", {"model": "b"}) is None
