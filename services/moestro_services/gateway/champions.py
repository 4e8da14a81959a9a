"""Whether every registered model has a champion that answers, as a time series."""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily


class Champion(Protocol):
    """Who answers for a model's bare name."""

    @property
    def serving(self) -> bool:
        """Whether it answers now."""


class Routed(Protocol):
    """A registered model."""

    @property
    def champion(self) -> Champion | None:
        """Its champion; None without one."""


class Champions:
    """A collector for a Prometheus registry over `table`, which gives the registered models by name."""

    def __init__(self, table: Callable[[], Mapping[str, Routed]]) -> None:
        self._table = table

    def collect(self) -> Iterator[Metric]:
        """One sample for every model."""
        (family,) = self.describe()
        for name, model in self._table().items():
            family.add_metric([name], float(model.champion is not None and model.champion.serving))
        yield family

    def describe(self) -> tuple[GaugeMetricFamily]:
        """The series' name."""
        about = "Whether the model has a champion that answers."
        return (GaugeMetricFamily("moestro_gateway_champion_up", about, labels=["model"]),)
