"""GET /api/traffic/experts/{model}: how the experts of a served model are used now."""

from typing import Any

from fastapi import APIRouter

from moestro.artifacts import Input
from moestro.config import Config
from moestro.errors import InputError
from moestro_services.gateway.expert_metrics import ExpertMetrics, Report
from moestro_services.gateway.schemas import ErrorResponse


class LayerTraffic(Config):
    """One layer with experts, over the window. Figures are null while the window holds too few tokens."""

    layer: int
    """Its number among the layers with experts, from 0."""
    tokens: tuple[int, ...]
    """Sampled tokens that chose each expert."""
    load_variation: float | None
    """Standard deviation of the experts' loads over their mean."""
    max_violation: float | None
    """Largest load over the mean load, minus 1."""
    entropy_ratio: float | None
    """Entropy of the experts' shares over that of uniform ones."""
    dead: tuple[int, ...] | None
    """Experts with almost no load."""
    drift_bits: float | None
    """Jensen-Shannon divergence from the nearest mixture of the profiled domains; null without a profile."""


class VersionExperts(Config):
    """One version of the model."""

    version: str
    """Its number in the model registry."""
    fingerprint: str
    """The deployment's artifact."""
    checkpoint: Input
    """What is served."""
    profile: str | None
    """The profile artifact that drift is measured from."""
    sampled_requests: int
    """Requests whose routing was seen since the gateway first sampled this version."""
    sampled_tokens: int
    """Tokens of these."""
    window_tokens: int
    """Tokens in the window."""
    domain_shares: dict[str, float] | None
    """Shares of the profiled domains in the mixture nearest to the window's traffic."""
    layers: tuple[LayerTraffic, ...]
    """Layer by layer."""


class ExpertTraffic(Config):
    """The sampled traffic of a model."""

    model: str
    """The model's name."""
    window_seconds: float
    """Time over which the window's figures are formed."""
    min_tokens: int
    """Tokens that a window needs for figures."""
    skipped_requests: dict[str, int]
    """Requests of all models that were chosen for the sample and not counted, by reason."""
    versions: tuple[VersionExperts, ...]
    """The versions that were sampled."""


def expert_traffic(metrics: ExpertMetrics) -> APIRouter:
    """The route under /api over `metrics`."""
    refusals: dict[int | str, dict[str, Any]] = {status: {"model": ErrorResponse} for status in (400, 404)}
    router = APIRouter(prefix="/api", tags=["traffic"], responses=refusals)

    @router.get("/traffic/experts/{model}", operation_id="read_expert_traffic")
    def experts_of_model(model: str) -> ExpertTraffic:
        """How the experts of a served model are used, from sampled requests; `name@version` for one version."""
        found = [
            report
            for report in metrics.reports()
            if model in (report.seen.deployment.name, report.seen.deployment.label)
        ]
        if not found:
            raise InputError(
                f"No request to {model!r} was sampled since this gateway started.",
                hint="`moestro serve --expert-share` says how many are; GET /v1/models lists the models.",
            )
        return ExpertTraffic(
            model=found[0].seen.deployment.name,
            window_seconds=metrics.sampling.window_seconds,
            min_tokens=metrics.sampling.min_tokens,
            skipped_requests={reason.value: count for reason, count in metrics.skipped().items()},
            versions=tuple(_version(report) for report in found),
        )

    return router


def _version(report: Report) -> VersionExperts:
    seen, figures = report.seen, report.figures
    shares = None
    if seen.profile and figures and figures.drift:
        shares = dict(zip(seen.profile.domains, figures.drift.weights_D.tolist(), strict=True))
    return VersionExperts(
        version=seen.deployment.version,
        fingerprint=seen.deployment.fingerprint,
        checkpoint=seen.deployment.checkpoint,
        profile=seen.profile.fingerprint if seen.profile else None,
        sampled_requests=sum(seen.requests.values()),
        sampled_tokens=seen.total_tokens,
        window_tokens=seen.window.tokens,
        domain_shares=shares,
        layers=tuple(_layer(report, layer) for layer in range(len(seen.total_LE))),
    )


def _layer(report: Report, layer: int) -> LayerTraffic:
    figures = report.figures
    return LayerTraffic(
        layer=layer,
        tokens=tuple(report.seen.window.counts_LE[layer].tolist()),
        load_variation=float(figures.load_variation_L[layer]) if figures else None,
        max_violation=float(figures.max_violation_L[layer]) if figures else None,
        entropy_ratio=float(figures.entropy_L[layer]) if figures else None,
        dead=tuple(figures.dead_LE[layer].nonzero()[0].tolist()) if figures else None,
        drift_bits=float(figures.drift.bits_L[layer]) if figures and figures.drift else None,
    )
