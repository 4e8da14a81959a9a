"""The time series of experts, in Prometheus' terms. Figures are absent while a window holds too few tokens."""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from moestro_services.gateway.expert_metrics_sampling import Reason
from moestro_services.gateway.expert_metrics_window import Figures, Seen

VERSION = ("model", "version")
LAYER = (*VERSION, "layer")


class _Families:
    """One family of each name, empty."""

    def __init__(self) -> None:
        self.tokens = CounterMetricFamily(
            "moestro_expert_tokens", "Sampled tokens that chose the expert.", labels=(*LAYER, "expert")
        )
        self.sampled_tokens = CounterMetricFamily(
            "moestro_expert_sampled_tokens", "Tokens whose routing was seen.", labels=VERSION
        )
        self.sampled_requests = CounterMetricFamily(
            "moestro_expert_sampled_requests",
            "Requests whose routing was seen, in their answer or by asking again.",
            labels=(*VERSION, "source"),
        )
        self.skipped = CounterMetricFamily(
            "moestro_expert_skipped_requests",
            "Requests that were chosen for the sample and not counted.",
            labels=("reason",),
        )
        self.window_tokens = GaugeMetricFamily(
            "moestro_expert_window_tokens", "Tokens in the window that figures are formed over.", labels=VERSION
        )
        self.load_variation = GaugeMetricFamily(
            "moestro_expert_load_variation", "Standard deviation of experts' loads over their mean.", labels=LAYER
        )
        self.max_violation = GaugeMetricFamily(
            "moestro_expert_max_violation", "Largest load of an expert over the mean load, minus 1.", labels=LAYER
        )
        self.entropy = GaugeMetricFamily(
            "moestro_expert_entropy_ratio", "Entropy of experts' shares over that of uniform ones.", labels=LAYER
        )
        self.dead = GaugeMetricFamily("moestro_expert_dead", "Experts with almost no load.", labels=LAYER)
        self.drift = GaugeMetricFamily(
            "moestro_expert_drift_bits",
            "Jensen-Shannon divergence from the nearest mixture of the profiled domains.",
            labels=LAYER,
        )
        self.domain_share = GaugeMetricFamily(
            "moestro_expert_domain_share",
            "Share of a profiled domain in the mixture nearest to the traffic.",
            labels=(*VERSION, "domain"),
        )

    def all(self) -> Iterator[Metric]:
        yield from vars(self).values()


def describe() -> Iterator[Metric]:
    """Every family, without a sample."""
    return _Families().all()


def families(
    reports: Iterable[tuple[Seen, Figures | None]], skipped: Mapping[Reason, int], *, max_series: int
) -> Iterator[Metric]:
    """Every family; a model with more than `max_series` layers times experts has no series per expert."""
    made = _Families()
    for reason, count in skipped.items():
        made.skipped.add_metric([reason.value], count)
    for seen, figures in reports:
        version = (seen.deployment.name, seen.deployment.version)
        _add_counts(made, version, seen, max_series)
        if figures is not None:
            _add_figures(made, version, seen, figures)
    return made.all()


def _add_counts(made: _Families, version: tuple[str, str], seen: Seen, max_series: int) -> None:
    made.sampled_tokens.add_metric(version, seen.total_tokens)
    made.window_tokens.add_metric(version, seen.window.tokens)
    for source in ("answer", "asked_again"):
        made.sampled_requests.add_metric((*version, source), seen.requests.get(source, 0))
    if seen.total_LE.size <= max_series:
        for (layer, expert), count in np.ndenumerate(seen.total_LE):
            made.tokens.add_metric((*version, str(layer), str(expert)), float(count))


def _add_figures(made: _Families, version: tuple[str, str], seen: Seen, figures: Figures) -> None:
    per_layer = [
        (made.load_variation, figures.load_variation_L),
        (made.max_violation, figures.max_violation_L),
        (made.entropy, figures.entropy_L),
        (made.dead, figures.dead_LE.sum(axis=1)),
    ]
    if figures.drift is not None and seen.profile is not None:
        per_layer.append((made.drift, figures.drift.bits_L))
        for domain, weight in zip(seen.profile.domains, figures.drift.weights_D, strict=True):
            made.domain_share.add_metric((*version, domain), float(weight))
    for family, values_L in per_layer:
        for layer, value in enumerate(values_L):
            family.add_metric((*version, str(layer)), float(value))
