"""The row of a deployment in a run's table."""

from datetime import UTC, datetime
from typing import Any

from moestro.artifacts import Record
from moestro_flows.summary import figures

RESULT = {
    "max_logprob_difference": 8e-06,
    "routing_agreement": 1.0,
    "held_out_loss": {"code": 3.7},
    "task_accuracy": 0.277,
    "dead_experts": 0,
    "load_variation": 0.356,
    "first_token_seconds": 0.0297,
    "per_token_seconds": 0.00591,
    "peak_memory_bytes": 3_600_277_504,
}


def row(**result: Any) -> str:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    known = {"stage": "deploy", "version": "2", "fingerprint": "f" * 64, "code_version": "0", "created_at": moment}
    return figures(Record(**known, inputs={}, config={}, result=result, files={}, seconds=1.0))


def test_it_shows_what_the_gates_found() -> None:
    assert row(**RESULT) == (
        "max |dlogp| 8e-06; routes equal 1; accuracy 0.277; dead experts 0; load variation 0.356; first token 0.030 s; "
        "per token 0.0059 s; peak 3.60 GB"
    )


def test_a_dense_model_has_fewer_figures_and_force_is_told() -> None:
    sparse = {"routing_agreement", "dead_experts", "load_variation", "task_accuracy"}
    dense = {name: value for name, value in RESULT.items() if name not in sparse}
    assert row(**dense, refused=["latency: slow", "memory: large"]) == (
        "max |dlogp| 8e-06; first token 0.030 s; per token 0.0059 s; peak 3.60 GB; forced past 2 refusals"
    )
