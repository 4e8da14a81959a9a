"""Tuning trains an MoE on all domains: its routers alone or all of it, kept in balance by the auxiliary loss."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from moestro.artifacts import Artifact, Job
from moestro.config import GlobalBatchLoss, OptimizerConfig, TrainingConfig, TuneConfig, ZLoss
from moestro.data.packed import Mixture, PackedTokens
from moestro.data.tokenizer import train_bpe
from moestro.errors import ConfigError, InputError
from moestro.models.checkpoint import load_model, save_model
from moestro.models.files import read_origins
from moestro.tuning import tune

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ORIGINS = [["code", "math", "prose", "seed"]] * 2
LOSSES = [{"type": "global_batch"}, {"type": "z_loss"}]
TRAINING = TrainingConfig(steps=6, batch_size=4, accumulation=2, sequence_length=16, log_every=2)


def saved(model: PreTrainedModel, folder: Path, origins: list[list[str]] | None) -> Artifact:
    train_bpe(["some text"], 300).save_pretrained(folder / "tokenizer")
    save_model(model, folder / "model", tokenizer_from=folder / "tokenizer", origins=origins)
    return Artifact(folder / "model", "mix", "m")


def mixed(folder: Path) -> Artifact:
    """An MoE whose routers send nearly everything to experts 0 and 1."""
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0.1  # a direction that all tokens share, and that two experts like
        for layer in model.model.layers:
            layer.mlp.gate.weight[:2, 0] = 0.2
            layer.mlp.gate.weight[2:, 0] = -0.2
    return saved(model, folder, ORIGINS)


def tokens_in(folder: Path) -> dict[str, Artifact]:
    for number, domain in enumerate(("code", "math")):
        (folder / domain).mkdir(parents=True)
        ids = np.random.default_rng(number).integers(0, 300, 800).astype(np.uint16)
        np.save(folder / domain / "train.npy", ids)
        np.save(folder / domain / "train_documents.npy", np.zeros(1, dtype=np.int64))
    return {domain: Artifact(folder / domain, "tokens", domain) for domain in ("code", "math")}


def job_in(folder: Path) -> Job:
    (folder / "out").mkdir(parents=True)
    (folder / "scratch").mkdir()
    return Job(out=folder / "out", scratch=folder / "scratch")


@pytest.mark.parametrize("trainable", ["router", "all"])
def test_what_tuning_changes(tmp_path: Path, trainable: str) -> None:
    model = mixed(tmp_path)
    config = TuneConfig.model_validate({"training": TRAINING, "trainable": trainable, "losses": LOSSES})
    result = tune(config, model=model, tokens=tokens_in(tmp_path), job=job_in(tmp_path / "job"))
    before = dict(load_model(model.path).named_parameters())
    after = dict(load_model(tmp_path / "job/out", tokenizer=True).named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if trainable == "all" or name.endswith("mlp.gate.weight")}
    assert read_origins(tmp_path / "job/out") == ORIGINS
    rows = json.loads((tmp_path / "job/out/history.json").read_text())["steps"]
    assert result["load_balancing_loss"] == rows[-1]["load_balancing_loss"]
    assert result["max_violation"] == rows[-1]["max_violation"]


def test_every_architecture_is_tuned(tiny_moe: Callable[..., PreTrainedModel], moe_kind: str, tmp_path: Path) -> None:
    """Its routers alone: with them the gate of a shared expert, and without the correction bias."""
    model = saved(tiny_moe(moe_kind), tmp_path, [["code", "math", "prose", "seed", "code", "math"]] * 2)
    config = TuneConfig(training=TRAINING, trainable="router")
    result = tune(config, model=model, tokens=tokens_in(tmp_path), job=job_in(tmp_path / "job"))
    before, after = load_model(model.path).state_dict(), load_model(tmp_path / "job/out").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    gates = {name for name in before if name.endswith(("gate.weight", "router.weight")) and "_proj" not in name}
    if moe_kind == "qwen2_moe unshared":
        gates = {name for name in gates if "shared" not in name}  # the gate of an expert without features
    assert changed == gates
    assert result["load_balancing_loss"] >= 0.8
    assert result["max_violation"] >= 0


def test_the_loss_of_a_step_is_the_models_own(
    tiny_moe: Callable[..., PreTrainedModel], moe_kind: str, tmp_path: Path
) -> None:
    """What is trained on is what transformers calls the loss, scaled logits included."""
    model = saved(tiny_moe(moe_kind), tmp_path, [["code", "math", "prose", "seed", "code", "math"]] * 2)
    config = TuneConfig(training=TRAINING.model_copy(update={"steps": 1, "log_every": 1}))
    job, tokens = job_in(tmp_path / "job"), tokens_in(tmp_path)
    tune(config, model=model, tokens=tokens, job=job)
    (row,) = json.loads((job.out / "history.json").read_text())["steps"]
    domains = {name: PackedTokens.open(artifact.path, "train") for name, artifact in tokens.items()}
    batch_BS = Mixture(domains, TRAINING.sequence_length, TRAINING.seed).batch(0, TRAINING.batch_size).tokens_BS
    with torch.no_grad():
        logits_BSV = load_model(model.path)(input_ids=batch_BS[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), batch_BS[:, 1:].flatten())
    assert row["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_sigmoid_routers_have_no_z_loss(tiny_moe: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model = saved(tiny_moe("glm4_moe"), tmp_path, [["seed"] * 6] * 2)
    config = TuneConfig(training=TRAINING, losses=(ZLoss(),))
    with pytest.raises(ConfigError, match=r"losses.*sigmoids.*Leave it out"):
        tune(config, model=model, tokens=tokens_in(tmp_path), job=job_in(tmp_path / "job"))


def test_the_balance_loss_balances(tmp_path: Path) -> None:
    """From the same start, the run with a heavy balance loss ends with its experts loaded more evenly."""
    model, tokens = mixed(tmp_path), tokens_in(tmp_path)
    optimizer = OptimizerConfig(learning_rate=2e-2, warmup_steps=0, weight_decay=0.0)
    training = TRAINING.model_copy(update={"steps": 20, "optimizer": optimizer})
    ends = {}
    for losses in ((), (GlobalBatchLoss(coefficient=10.0),)):
        config = TuneConfig(training=training, trainable="router", losses=losses)
        ends[len(losses)] = tune(config, model=model, tokens=tokens, job=job_in(tmp_path / f"job{len(losses)}"))
    assert ends[1]["max_violation"] < 0.5 * ends[0]["max_violation"]


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    dense = saved(LlamaForCausalLM(LlamaConfig(**SHAPE)), tmp_path, None)
    with pytest.raises(InputError, match="has no router to tune"):
        tune(TuneConfig(training=TRAINING), model=dense, tokens=tokens_in(tmp_path), job=job_in(tmp_path / "job"))


@pytest.mark.parametrize("missing", ["tokenizer.json", "experts.json"])
def test_what_the_result_needs_is_missed_before_training(tmp_path: Path, missing: str) -> None:
    model, job = mixed(tmp_path), job_in(tmp_path / "job")
    (model.path / missing).unlink()
    with pytest.raises(InputError, match=missing):
        tune(TuneConfig(training=TRAINING), model=model, tokens=tokens_in(tmp_path), job=job)
    assert not list(job.scratch.iterdir())


@pytest.mark.parametrize("change", [{"losses": LOSSES[:1]}, {"losses": [{**LOSSES[0], "coefficient": 0.3}, LOSSES[1]]}])
def test_a_training_checkpoint_of_other_losses_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    model, tokens, job = mixed(tmp_path), tokens_in(tmp_path), job_in(tmp_path / "job")
    config = {"training": TRAINING, "losses": LOSSES}
    tune(TuneConfig.model_validate(config), model=model, tokens=tokens, job=job)
    with pytest.raises(InputError, match="another config, model or data"):
        tune(TuneConfig.model_validate({**config, **change}), model=model, tokens=tokens, job=job)
