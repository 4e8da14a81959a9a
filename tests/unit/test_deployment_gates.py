"""Each gate by itself: what it measures of real tiny models and servers, what it refuses and what it lets pass."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import MixtralConfig, MixtralForCausalLM

from moestro.artifacts import Artifact
from moestro.config import DeployConfig, LatencyGate, MemoryGate, ParityGate, QualityGate, RoutingGate, TaskConfig
from moestro.data.tasks import Task
from moestro.data.tokenizer import train_bpe
from moestro.deployment.gates import GATES, Subject, latency, memory, quality, routing
from moestro.deployment.gates.gate import above
from moestro.deployment.stage import _deployment, _refusal
from moestro.inference.client import Endpoint
from moestro.inference.routes import RoutingShape
from moestro.profiling.figures import load_variation

SUM = TaskConfig(name="chain_sum", arguments={"max_terms": 2, "max_digits": 1})
NAN = float("nan")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    MixtralForCausalLM(MixtralConfig(vocab_size=288, max_position_embeddings=256, **sizes, **experts)).save_pretrained(
        folder
    )
    train_bpe(["Question: What is 1 + 2?\nAnswer: 3\n"] * 3, 288).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def network(checkpoint: Path) -> Any:
    return MixtralForCausalLM.from_pretrained(checkpoint).eval()


def subject(checkpoint: Path, folder: Path, *, shape: RoutingShape | None = None, **config: Any) -> Subject:
    tokens = {}
    for seed, domain in enumerate(("code", "math")):
        place = folder / domain
        place.mkdir()
        np.save(place / "held_out.npy", np.random.default_rng(seed).integers(1, 280, 600).astype(np.uint16))
        np.save(place / "held_out_documents.npy", np.zeros(1, np.int64))
        tokens[domain] = Artifact(place, "tokens", str(seed) * 64)
    short = DeployConfig(max_model_len=128, parity=ParityGate(sequence_length=64))
    return Subject(short.model_copy(update=config), Artifact(checkpoint, "rl", "0" * 64), tokens, shape)


def test_every_gate_is_a_field_of_the_config() -> None:
    assert set(GATES) <= set(DeployConfig.model_fields)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_model_len": 64, "parity": {"sequence_length": 32}, "latency": {"prompt_tokens": 60}}, "together exceed"),
        ({"quality": {"min_accuracy": 0.5}}, "without a task there is no accuracy"),
        ({"quality": {"max_held_out_loss": {"code": 0.0}}}, "greater than 0"),
        ({"latency": {"output_tokens": 1}}, "greater than or equal to 2"),
        ({"latency": {"max_ratio": 0.9}}, "greater than or equal to 1"),
        ({"memory": {"max_peak_gib": -1}}, "greater than 0"),
        ({"routing": {"max_load_variation": NAN}}, "finite number"),
        ({"force": "x" * 501}, "at most 500"),
    ],
)
def test_gates_that_cannot_work_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DeployConfig(**values)


def test_defaults_fit_the_shortest_deployment_and_a_blank_is_no_reason() -> None:
    config = DeployConfig(max_model_len=64, parity=ParityGate(sequence_length=32), force=" \n")
    assert config.latency == LatencyGate()
    assert config.force == ""
    assert DeployConfig(force="a reason").identity() != DeployConfig().identity()


@pytest.mark.parametrize(("figure", "bound", "refused"), [(1.0, 1.0, 0), (1.1, 1.0, 1), (9.0, None, 0), (NAN, None, 1)])
def test_a_bound_is_inclusive_and_what_is_no_number_is_refused(figure: float, bound: Any, refused: int) -> None:
    assert len(above("it", figure, bound)) == refused


def test_quality_is_measured_alike_every_time(checkpoint: Path, network: Any, tmp_path: Path) -> None:
    gate = QualityGate(sequence_length=64, max_tokens=256, task=SUM, problems=8, max_answer_tokens=4)
    part = subject(checkpoint, tmp_path, quality=gate)
    first, again = (quality.Quality(part).judge(network) for _ in range(2))
    assert first == again
    assert first.refused == ()
    assert first.figures["held_out_loss"].keys() == {"code", "math"}
    assert all(loss == pytest.approx(math.log(288), abs=0.5) for loss in first.figures["held_out_loss"].values())
    right = first.evidence["task"]["right"]
    assert first.figures["task_accuracy"] == right.count("1") / 8
    json.dumps([first.figures, first.evidence], allow_nan=False)


def test_text_and_problems_are_known_by_their_contents() -> None:
    windows = torch.arange(12).reshape(3, 4)
    assert quality.text_identity(windows) == quality.text_identity(windows.clone())
    assert quality.text_identity(windows) != quality.text_identity(windows.reshape(4, 3))
    assert quality.text_identity(windows) != quality.text_identity(windows + 1)
    problems = Task.open(SUM).problems(4, split="held_out", seed=0)
    asked = quality.problems_identity(problems, 8)
    assert asked == quality.problems_identity(list(problems), 8)
    assert asked not in {quality.problems_identity(problems, 9), quality.problems_identity(problems[::-1], 8)}


def test_quality_refuses_a_loss_that_is_no_number(checkpoint: Path, tmp_path: Path) -> None:
    broken = MixtralForCausalLM.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = NAN
    verdict = quality.Quality(subject(checkpoint, tmp_path)).judge(broken)
    assert verdict.refused == tuple(
        f"the held-out loss of {domain} is nan (it must be a finite number)" for domain in ("code", "math")
    )
    assert verdict.figures == {"held_out_loss": {"code": None, "math": None}, "task_accuracy": None}


def test_quality_has_absolute_bounds() -> None:
    gate = QualityGate(task=SUM, min_accuracy=0.5, max_held_out_loss={"code": 2.0})
    assert quality.refusals({"code": 2.0, "math": 9.0}, 0.5, gate) == []
    loss, accuracy = quality.refusals({"code": 2.25}, 0.25, gate)
    assert loss == "the held-out loss of code is 2.25 nats per token (at most 2 nats per token is allowed)"
    assert accuracy == "task accuracy is 0.25 (at least 0.5 is asked for)"
    assert len(quality.refusals({"code": math.inf}, NAN, gate)) == 2


def counts(*layers: list[int]) -> torch.Tensor:
    return torch.tensor(layers)


def test_routing_refuses_dead_experts_and_uneven_loads() -> None:
    gate = RoutingGate(max_dead_share=0.2, max_load_variation=1.0)
    assert routing.refusals(counts([50, 50, 50, 50], [1, 60, 70, 69]), gate) == []
    dead, variation = routing.refusals(counts([0, 0, 100, 100], [0, 1, 400, 3]), gate)
    assert dead == (
        "4 of 8 experts are dead (0 of layer 0, 1 of layer 0, 0 of layer 1, 1 of layer 1; at most 20% may be)"
    )
    assert variation == "the worst layer's load variation is 1.709 (at most 1 is allowed)"
    assert routing.refusals(counts([0, 0]), RoutingGate(max_dead_share=1.0)) == [
        "the worst layer's load variation is nan (it must be a finite number)"
    ]


@pytest.mark.parametrize(("experts", "chosen"), [(8, 2), (64, 8), (4, 4)])
def test_load_variation_lies_between_balance_and_all_tokens_on_the_same_experts(experts: int, chosen: int) -> None:
    worst = counts([9] * chosen + [0] * (experts - chosen))
    assert load_variation(worst) == pytest.approx(math.sqrt(experts / chosen - 1))
    assert load_variation(torch.cat([worst, counts([5] * experts)])) == pytest.approx(load_variation(worst))
    assert load_variation(counts([5] * experts)) == 0


def test_many_dead_experts_are_not_all_named() -> None:
    (words,) = routing.refusals(counts([0] * 9 + [7]), RoutingGate(max_load_variation=9))
    assert "5 of layer 0 and 3 more;" in words


def test_routes_are_counted_per_layer() -> None:
    one = np.array([[[0, 1], [2, 3]], [[0, 2], [2, 1]]], np.uint8)
    expected = counts([2, 1, 1, 0], [0, 1, 2, 1])
    torch.testing.assert_close(routing.count([one], 4), expected)
    torch.testing.assert_close(routing.count([one, one[:1]], 4), expected + counts([1, 1, 0, 0], [0, 0, 1, 1]))


def test_a_dense_model_has_no_routing_to_judge(checkpoint: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    dense.mkdir()
    fields = {"model_type": "llama", "num_hidden_layers": 2}
    (dense / "config.json").write_text(json.dumps(fields))
    gate = routing.Routing(subject(dense, tmp_path))
    gate.ask(Endpoint("http://127.0.0.1:1", "none"), 1)  # asks nothing
    verdict = gate.judge(None)
    assert (verdict.refused, verdict.figures, verdict.note) == ((), {}, "not applicable: the model is dense")


def test_latency_and_memory_have_absolute_bounds() -> None:
    assert latency.refusals(100.0, 10.0, LatencyGate()) == []
    slow = latency.refusals(0.5, 0.25, LatencyGate(max_first_token_seconds=0.4, max_per_token_seconds=0.2))
    assert slow == [
        "the median time to the first token is 0.5 s (at most 0.4 s is allowed)",
        "the median time of each later token is 0.25 s (at most 0.2 s is allowed)",
    ]
    assert len(latency.refusals(NAN, NAN, LatencyGate())) == 2
    assert memory.refusals(2**40, 2**40, MemoryGate()) == []
    large = memory.refusals(3 * 2**30, 2**31, MemoryGate(max_weights_gib=2, max_peak_gib=1.5))
    assert large == [
        "the size of the weights is 3 GiB (at most 2 GiB is allowed)",
        "the peak of resident memory is 2 GiB (at most 1.5 GiB is allowed)",
    ]


def test_a_refusal_counts_gates_and_tells_of_bfloat16_only_where_parity_failed(
    tmp_path: Path, checkpoint: Path
) -> None:
    verdicts = {
        name: latency.Verdict(refused=words, thresholds=LatencyGate())
        for name, words in {"parity": (), "memory": ("large", "larger")}.items()
    }
    error = _refusal(DeployConfig(name="tiny"), verdicts, ["memory: large", "memory: larger"])
    assert error.message == "A gate refuses tiny. memory: large; memory: larger."
    assert "bfloat16" not in error.hint


def test_forced_past_every_gate_the_deployment_says_which_refused(tmp_path: Path, checkpoint: Path) -> None:
    forced = subject(checkpoint, tmp_path, force="a rehearsal")
    gates = {name: kind(forced) for name, kind in GATES.items()}
    verdicts = {name: latency.Verdict(refused=("no",), thresholds=getattr(forced.config, name)) for name in GATES}
    told = _deployment(forced, gates, verdicts)
    assert told["forced"] == "a rehearsal"
    timed = dict.fromkeys(("latency", "memory"))
    found = {name: gate["passed"] for name, gate in told["gates"].items()}
    assert found == dict.fromkeys(GATES, False) | timed
