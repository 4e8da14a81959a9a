"""Pre-training a seed from corpora: a loadable checkpoint, the same bytes every time, clear refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from moestro.artifacts import Artifact, Job, file_digest
from moestro.config import ModelConfig, PretrainSeed, TrainingConfig
from moestro.data.tokenizer import load_tokenizer
from moestro.errors import ConfigError, InputError
from moestro.models.checkpoint import load_model
from moestro.seeding import pretrain, seed
from moestro.seeding.pretrain import build_model

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
CONFIG = PretrainSeed(model=MODEL, training=TrainingConfig(steps=10, batch_size=4, sequence_length=16, log_every=5))


def corpora_in(folder: Path) -> dict[str, Artifact]:
    texts = {
        "code": [f"def function_{number}(value):\n    return value + {number}\n" for number in range(60)],
        "prose": [f"The tenant of house {number} watered the garden every evening." for number in range(20)],
    }
    for name, documents in texts.items():
        (folder / name).mkdir(parents=True)
        pq.write_table(pa.table({"text": documents}), folder / name / "train.parquet")
    return {name: Artifact(folder / name, "corpus", name) for name in texts}


def job_in(folder: Path) -> Job:
    (folder / "out").mkdir(parents=True, exist_ok=True)
    (folder / "scratch").mkdir(exist_ok=True)
    return Job(out=folder / "out", scratch=folder / "scratch")


def test_the_seed_is_a_checkpoint_with_its_tokenizer(tmp_path: Path) -> None:
    result = seed(CONFIG, corpora=corpora_in(tmp_path / "corpora"), job=job_in(tmp_path))
    model, tokenizer = load_model(tmp_path / "out"), load_tokenizer(tmp_path / "out")
    assert result["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert result["vocabulary"] == len(tokenizer) == model.config.vocab_size == 300
    assert result["tokens"] == 10 * 4 * 16
    assert result["final_loss"] < 5.8
    assert {"tokens_per_second", "loss_flatness"} <= set(result)
    json.dumps(result)
    text = "def function_1(value):"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tmp_path / "out/history.json").exists()


@pytest.mark.slow
def test_every_process_makes_the_same_bytes(tmp_path: Path) -> None:
    seed(CONFIG, corpora=corpora_in(tmp_path / "corpora"), job=job_in(tmp_path / "one"))
    script = (
        "import sys; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from test_seeding_pretrain import CONFIG, corpora_in, job_in, seed\n"
        "folder = Path(sys.argv[2]); seed(CONFIG, corpora=corpora_in(folder / 'corpora'), job=job_in(folder))\n"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path / "other")]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "7"})
    names = sorted(path.name for path in (tmp_path / "one/out").iterdir())
    assert {"model.safetensors", "history.json", "tokenizer.json", "config.json"} <= set(names)
    for name in names:
        assert file_digest(tmp_path / "one/out" / name) == file_digest(tmp_path / "other/out" / name), name


def test_a_resume_does_not_tokenise_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpora = corpora_in(tmp_path / "corpora")
    seed(CONFIG, corpora=corpora, job=job_in(tmp_path))
    digest = file_digest(tmp_path / "out/model.safetensors")

    def again(*_: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(pretrain, "_prepare", again)
    seed(CONFIG, corpora=corpora, job=job_in(tmp_path))
    assert file_digest(tmp_path / "out/model.safetensors") == digest


def test_initialisation_is_seeded_small_and_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    one, other = build_model(MODEL, seed=1), build_model(MODEL, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(one.model.embed_tokens.weight, other.model.embed_tokens.weight)
    std = (2 / (5 * 32)) ** 0.5
    assert float(one.model.embed_tokens.weight.detach().std()) == pytest.approx(std, rel=0.05)
    assert float(one.model.layers[0].mlp.down_proj.weight.detach().std()) == pytest.approx(std / 2, rel=0.1)


def test_a_vocabulary_that_the_text_does_not_fill_is_refused(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"model": MODEL.model_copy(update={"vocab_size": 4096})})
    with pytest.raises(ConfigError, match=r"vocab_size: the text of code, prose fills only \d+ of 4096"):
        seed(config, corpora=corpora_in(tmp_path / "corpora"), job=job_in(tmp_path))


def test_a_folder_that_is_no_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a corpus"):
        seed(CONFIG, corpora={"code": Artifact(tmp_path, "corpus", "x")}, job=job_in(tmp_path))


def test_corpora_other_than_the_named_domains_are_refused(tmp_path: Path) -> None:
    config = PretrainSeed.model_validate({"training": {"steps": 1}, "domains": ["prose", "law"]})
    with pytest.raises(InputError, match=r"seed\.domains are prose, law, the corpora handed in are"):
        seed(config, corpora=corpora_in(tmp_path), job=job_in(tmp_path / "job"))
