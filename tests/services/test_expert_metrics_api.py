"""/api/traffic/experts: closed answers, and a 404 that says what to do."""

import base64
import io
import json
from collections.abc import Iterator

import numpy as np
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient

from moestro.artifacts import Input
from moestro.errors import MoestroError
from moestro.inference.routes import RoutingShape
from moestro_services.gateway.deployments import Deployment
from moestro_services.gateway.errors import api_error
from moestro_services.gateway.expert_metrics import ExpertMetrics
from moestro_services.gateway.expert_metrics_api import ExpertTraffic, expert_traffic
from moestro_services.gateway.expert_metrics_known import DomainProfile
from moestro_services.gateway.expert_metrics_sampling import Sampling


class Known:
    def shape(self, _: Deployment) -> RoutingShape:
        return RoutingShape(num_layers=1, num_experts=4, num_experts_per_tok=2)

    def profile(self, deployment: Deployment) -> DomainProfile | None:
        counts_DLE = np.array([[[4, 4, 0, 0]], [[0, 4, 4, 0]]])
        return DomainProfile("p" * 64, ("code", "prose"), counts_DLE) if deployment.version == "2" else None


def deployed(version: str) -> Deployment:
    return Deployment(
        name="assistant",
        version=version,
        fingerprint="d" * 64,
        checkpoint=Input(stage="compress", fingerprint="c" * 64),
        dtype="float32",
        max_model_len=512,
        created=1_700_000_000,
    )


def answer(rows: list[list[int]]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array(rows, np.uint8)[:, None])
    choice = {"routed_experts": base64.b64encode(stream.getvalue()).decode()}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": len(rows), "completion_tokens": 1}}).encode()


@pytest.fixture
def client() -> Iterator[TestClient]:
    app = FastAPI()

    @app.exception_handler(MoestroError)
    async def mistake(_request: Request, error: MoestroError) -> JSONResponse:
        return api_error(error)

    with ExpertMetrics(Known(), sampling=Sampling(share=1, min_tokens=4)) as metrics:
        app.include_router(expert_traffic(metrics))
        thin, full = [[0, 1]], [[0, 1], [0, 1], [0, 1], [1, 2]]
        for version, rows in (("2", full), ("1", thin)):
            metrics.answered(deployed(version), "/v1/completions", b"{}", answer(rows))
        metrics.answered(deployed("1"), "/v1/completions", b"{}", b"{}")
        metrics.drain()
        yield TestClient(app)


def test_the_window_of_every_version_is_told(client: TestClient) -> None:
    told = ExpertTraffic.model_validate(client.get("/api/traffic/experts/assistant").json())
    assert (told.model, told.min_tokens, told.window_seconds) == ("assistant", 4, 900)
    assert told.skipped_requests["no_answer"] == 1
    thin, full = told.versions
    assert (thin.version, thin.sampled_requests, thin.sampled_tokens, thin.profile) == ("1", 1, 1, None)
    assert thin.domain_shares is None
    (layer,) = thin.layers
    assert layer.tokens == (1, 1, 0, 0)
    assert {layer.load_variation, layer.max_violation, layer.entropy_ratio, layer.dead, layer.drift_bits} == {None}
    (layer,) = full.layers
    assert layer.tokens == (3, 4, 1, 0)
    assert (layer.dead, layer.max_violation) == ((3,), 1)
    assert layer.drift_bits == pytest.approx(0, abs=1e-4)
    assert full.domain_shares == pytest.approx({"code": 0.75, "prose": 0.25}, abs=1e-2)
    assert (full.profile, full.checkpoint.stage) == ("p" * 64, "compress")


def test_one_version_can_be_asked_for(client: TestClient) -> None:
    told = client.get("/api/traffic/experts/assistant@2").json()
    assert [version["version"] for version in told["versions"]] == ["2"]


@pytest.mark.parametrize("model", ["other", "assistant@9", "%20", "..%2f"])
def test_a_model_that_was_not_sampled_is_a_404(client: TestClient, model: str) -> None:
    refused = client.get(f"/api/traffic/experts/{model}")
    assert refused.status_code == 404


def test_the_schema_is_closed_and_described(client: TestClient) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    for name in ("ExpertTraffic", "VersionExperts", "LayerTraffic"):
        assert schemas[name]["additionalProperties"] is False
        assert all(field.get("description") for field in schemas[name]["properties"].values())
