"""Evaluation: the loss against a count per token and a closed form, answers against plain greedy decoding."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from moestro.artifacts import Artifact, Job
from moestro.config import EvaluateConfig, TaskConfig
from moestro.data.tasks import Problem, Task
from moestro.data.tokenizer import answer_stop_ids, encode, load_tokenizer, train_bpe
from moestro.errors import InputError
from moestro.evaluation import evaluate, greedy_answers, held_out_loss, sampled_accuracy
from moestro.models.checkpoint import load_model, save_model

TASK = TaskConfig(name="chain_sum", arguments={"max_terms": 3, "max_digits": 2})
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}


pytestmark = pytest.mark.usefixtures("one_thread")


def checkpoint(folder: Path, *, moe: bool = False) -> Artifact:
    torch.manual_seed(0)
    train_bpe(["Question: 1 + 2\nAnswer: 3\n"] * 3, 300).save_pretrained(folder / "tokenizer")
    model: Any
    if moe:
        model = MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2))
        save_model(model, folder / "model", tokenizer_from=folder / "tokenizer", origins=[["a", "b", "c", "d"]] * 2)
    else:
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
        save_model(model, folder / "model", tokenizer_from=folder / "tokenizer")
    return Artifact(folder / "model", "seed", "0")


def token_file(folder: Path, ids: np.ndarray[Any, Any]) -> Artifact:
    folder.mkdir()
    np.save(folder / "held_out.npy", ids.astype(np.uint16))
    np.save(folder / "held_out_documents.npy", np.zeros(1, dtype=np.int64))
    return Artifact(folder, "tokens", "0")


def job(folder: Path) -> Job:
    (folder / "out").mkdir(parents=True)
    (folder / "scratch").mkdir()
    return Job(out=folder / "out", scratch=folder / "scratch")


@pytest.mark.parametrize("moe", [False, True])
def test_loss_equals_a_count_per_token(tmp_path: Path, moe: bool) -> None:
    model = load_model(checkpoint(tmp_path, moe=moe).path)
    windows = torch.randint(0, 300, (3, 10), generator=torch.Generator().manual_seed(1))
    total, count = 0.0, 0
    with torch.no_grad():
        for window in windows:
            for position in range(1, len(window)):
                logits = model(window[None, :position]).logits[0, -1].double()
                total -= float(torch.log_softmax(logits, -1)[window[position]])
                count += 1
    assert held_out_loss(model, windows) == pytest.approx(total / count, abs=1e-5)


def test_loss_of_a_uniform_model_is_the_logarithm_of_the_vocabulary(tmp_path: Path) -> None:
    model = load_model(checkpoint(tmp_path).path)
    torch.nn.init.zeros_(model.lm_head.weight)
    windows = torch.randint(0, 300, (40, 100), generator=torch.Generator().manual_seed(1))
    assert held_out_loss(model, windows) == pytest.approx(math.log(300), abs=1e-6)


def test_loss_refuses_what_the_model_cannot_read(tmp_path: Path) -> None:
    model = load_model(checkpoint(tmp_path).path)
    with pytest.raises(InputError, match="exceed the 128 positions"):
        held_out_loss(model, torch.zeros(1, 129, dtype=torch.long))
    with pytest.raises(InputError, match="Token 300 is outside"):
        held_out_loss(model, torch.full((1, 8), 300))
    with pytest.raises(InputError, match="two tokens"):
        held_out_loss(model, torch.zeros(3, 1, dtype=torch.long))


@pytest.mark.parametrize("moe", [False, True])
def test_batched_answers_equal_decoding_one_by_one(tmp_path: Path, moe: bool) -> None:
    path = checkpoint(tmp_path, moe=moe).path
    model, tokenizer = load_model(path), load_tokenizer(path)
    task = Task.open(TASK)
    problems = task.problems(5, split="held_out", seed=0)
    answers = greedy_answers(model, tokenizer, task, problems, 4)
    stops = answer_stop_ids(tokenizer)
    for problem, answer in zip(problems, answers, strict=True):
        ids = encode(tokenizer, [problem.prompt])[0]
        new: list[int] = []
        while len(new) < 4 and not (new and new[-1] in stops):
            with torch.no_grad():
                new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        expected = tokenizer.decode(new, skip_special_tokens=True).split("\n", 1)[0]
        assert answer.problem == problem
        assert answer.completion == expected
        assert answer.score == task.score(problem, expected)


def test_sampled_answers_are_as_likely_as_the_model_says(tmp_path: Path) -> None:
    path = checkpoint(tmp_path).path
    model, tokenizer, task = load_model(path), load_tokenizer(path), Task.open(TASK)
    (problem,) = task.problems(1, split="held_out", seed=0)
    ids = encode(tokenizer, [problem.prompt])[0]
    with torch.no_grad():
        first_V = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
    texts = [tokenizer.decode([token], skip_special_tokens=True) for token in range(len(first_V))]
    expected = sum(float(share) for text, share in zip(texts, first_V, strict=True) if text.strip()[:1].isalpha())

    class Letters:
        def score(self, _problem: Problem, completion: str) -> float:
            return float(completion.strip()[:1].isalpha())

    samples = 400
    before = torch.random.get_rng_state()
    (found,) = sampled_accuracy(model, tokenizer, Letters(), [problem], 1, samples=samples, seed=0)  # type: ignore[arg-type]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert 0.1 < expected < 0.9
    assert found == pytest.approx(expected, abs=4 * (expected * (1 - expected) / samples) ** 0.5)


def test_stage_writes_what_it_returns(tmp_path: Path) -> None:
    model = checkpoint(tmp_path)
    generator = np.random.default_rng(0)
    tokens = {name: token_file(tmp_path / name, generator.integers(0, 300, 700)) for name in ("code", "math")}
    config = EvaluateConfig(sequence_length=32, max_tokens=320, task=TASK, problems=10, max_answer_tokens=4)
    result = evaluate(config, model=model, tokens=tokens, job=job(tmp_path / "a"))
    written = json.loads((tmp_path / "a/out/evaluation.json").read_text())
    assert written["held_out_loss"] == result["held_out_loss"]
    assert set(result["held_out_loss"]) == {"code", "math"}
    assert result["tokens"] == {"code": 310, "math": 310}
    mean = sum(result["held_out_loss"].values()) / 2
    assert result["geometric_mean_perplexity"] == pytest.approx(math.exp(mean))
    accuracies = {"accuracy": result["task_accuracy"], "sampled_accuracy": result["sampled_accuracy"]}
    assert written["task"] == {"name": "chain_sum", "problems": 10, **accuracies}
    assert len(written["samples"]) == 8
    assert set(written["samples"][0]) == {"prompt", "answer", "completion", "score"}
    evaluate(config, model=model, tokens=tokens, job=job(tmp_path / "b"))
    assert (tmp_path / "a/out/evaluation.json").read_bytes() == (tmp_path / "b/out/evaluation.json").read_bytes()


def test_stage_without_a_task(tmp_path: Path) -> None:
    tokens = {"code": token_file(tmp_path / "code", np.arange(100))}
    config = EvaluateConfig(sequence_length=32)
    result = evaluate(config, model=checkpoint(tmp_path), tokens=tokens, job=job(tmp_path / "a"))
    assert result["task_accuracy"] is None
    written = json.loads((tmp_path / "a/out/evaluation.json").read_text())
    assert (written["task"], written["samples"]) == (None, [])


def test_stage_refuses_too_little_text(tmp_path: Path) -> None:
    tokens = {"code": token_file(tmp_path / "code", np.arange(20))}
    with pytest.raises(InputError, match="20 tokens do not fill one window of 256"):
        evaluate(EvaluateConfig(), model=checkpoint(tmp_path), tokens=tokens, job=job(tmp_path / "a"))
    with pytest.raises(InputError, match="no domain"):
        evaluate(EvaluateConfig(), model=checkpoint(tmp_path / "m"), tokens={}, job=job(tmp_path / "b"))
