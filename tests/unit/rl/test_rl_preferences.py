"""DPO: its loss, learning, resuming, and pairs that are none."""

import json
import math
from collections.abc import Mapping

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moestro.artifacts import Artifact, Job, SilentReporter
from moestro.config import DpoConfig, OptimizerConfig, Resources
from moestro.data.tokenizer import train_bpe
from moestro.errors import InputError
from moestro.models.checkpoint import save_model
from moestro.rl import preferences, rl
from moestro.rl.preferences import preference_loss

PAIRS = [{"prompt": f"{n} =", "chosen": f" {n} yes", "rejected": f" {n} no"} for n in range(10)]


class InterruptedRunError(RuntimeError):
    pass


class Interrupting(SilentReporter):
    def metrics(self, values: Mapping[str, float], step: int) -> None:  # noqa: ARG002
        if step == 4:
            raise InterruptedRunError


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "model"
    tokenizer = train_bpe([json.dumps(PAIRS)], vocab_size=288)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = MixtralConfig(
        vocab_size=288,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=32,
    )
    save_model(MixtralForCausalLM(shape), folder, tokenizer_from=folder, origins=[["seed"] * 4] * 2)
    return folder


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return path


def run(source, pairs, out, *, reporter=None, scratch=None, **changes):
    out.mkdir()
    scratch = scratch or out.with_suffix(".scratch")
    scratch.mkdir(exist_ok=True)
    settings = {
        "pairs": str(pairs),
        "epochs": 3,
        "batch_size": 4,
        "micro_batch_size": 3,
        "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.0, schedule="constant"),
    }
    job = Job(out=out, scratch=scratch, reporter=reporter or SilentReporter(), resources=Resources(cpus=1))
    return rl(DpoConfig(**settings | changes), model=Artifact(source, "tune", "0" * 64), engine=None, job=job)


def test_the_loss_is_the_papers():
    policy, reference = torch.tensor([[-1.0, -2.0], [-3.0, -1.0]]), torch.tensor([[-1.5, -1.5], [-3.0, -1.0]])
    losses, rewards = preference_loss(policy, reference, 0.5)
    assert losses.tolist() == pytest.approx([-math.log(1 / (1 + math.exp(-0.5))), math.log(2)])
    torch.testing.assert_close(rewards, torch.tensor([[0.25, -0.25], [0.0, 0.0]]))


def test_a_run_learns_which_answer_is_better(source, pairs, tmp_path):
    result = run(source, pairs, tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "history.json").read_text())["steps"]
    assert len(rows) == result["steps"] == 9
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)
    assert result["rewards/accuracies"] == 1
    assert rows[-1]["rewards/margins"] > rows[1]["rewards/margins"] > 0
    assert result["pairs"] == 10


def test_a_mixture_of_experts_from_elsewhere_is_trained_too(source, pairs, tmp_path):
    (source / "experts.json").unlink()
    assert run(source, pairs, tmp_path / "out", epochs=1)["steps"] == 3
    assert not (tmp_path / "out" / "experts.json").exists()


def test_an_interrupted_run_ends_in_the_same_bytes(source, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(preferences, "CHECKPOINT_EVERY", 2)
    run(source, pairs, tmp_path / "whole")
    scratch = tmp_path / "scratch"
    with pytest.raises(InterruptedRunError):
        run(source, pairs, tmp_path / "first", scratch=scratch, reporter=Interrupting())
    run(source, pairs, tmp_path / "second", scratch=scratch)
    for name in ("model.safetensors", "history.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_micro_batches_do_not_change_the_first_step(source, pairs, tmp_path):
    first = [
        json.loads((tmp_path / str(size) / "history.json").read_text())["steps"][0]
        for size in (1, 4)
        if run(source, pairs, tmp_path / str(size), micro_batch_size=size, epochs=1)
    ]
    assert first[0]["grad_norm"] == pytest.approx(first[1]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a", "chosen": "b"}', "line 2: rejected: Field required"),
        ('{"prompt": "a", "chosen": 1, "rejected": "c"}', "line 2: chosen: Input should be a valid string"),
        ("not json", "line 2: the line: Invalid JSON"),
        (
            json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"}),
            "line 2: chosen and rejected are the same answer",
        ),
        (json.dumps({"prompt": "7" * 40, "chosen": "b", "rejected": "c"}), "line 2: 42 tokens, the model has 32"),
    ],
)
def test_what_is_no_pair_is_named_by_its_line(source, pairs, tmp_path, line, words):
    pairs.write_text(json.dumps(PAIRS[0]) + "\n" + line + "\n")
    with pytest.raises(InputError, match=words):
        run(source, pairs, tmp_path / "out")


def test_what_is_not_utf8_is_named_by_its_line(source, pairs, tmp_path):
    pairs.write_bytes(json.dumps(PAIRS[0]).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(InputError, match="line 2: the line: Invalid JSON"):
        run(source, pairs, tmp_path / "out")


def test_a_tokenizer_of_another_model_is_refused(source, pairs, tmp_path):
    words = "calculate whether something else is larger than everything before"
    train_bpe([words] * 3, vocab_size=400).save_pretrained(source)
    pairs.write_text(json.dumps({"prompt": words, "chosen": " yes", "rejected": " no"}) + "\n")
    with pytest.raises(InputError, match=r"line 1: .* writes it with token \d+, its model has only 288"):
        run(source, pairs, tmp_path / "out")


def test_a_file_without_pairs_is_refused(source, pairs, tmp_path):
    pairs.write_text("\n")
    with pytest.raises(InputError, match="holds no pairs"):
        run(source, pairs, tmp_path / "out")
