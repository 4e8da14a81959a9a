"""Rollouts on disk: the same when read, refused when damaged."""

import dataclasses

import numpy as np
import pytest
import torch

from moestro.errors import InputError
from moestro.inference.engine import Completion
from moestro.rl.records import Provenance, RolloutRecord, find_record, read_record, write_record
from moestro.rl.rewards import Verdicts
from moestro.rl.rollouts import collate

PROMPTS = [[5, 6, 7], [8, 9]]
PROVENANCE = Provenance(step=3, policy_version=2, model="abc", dtype="bfloat16", temperature=0.7, max_tokens=4, seed=11)


def record(*, experts: int = 8, routes: bool = True) -> RolloutRecord:
    generator = np.random.default_rng(0)

    def answer(prompt: list[int], length: int) -> Completion:
        rows = len(prompt) + length - 1
        ids = generator.permuted(np.tile(np.arange(experts), (rows, 2, 1)), axis=-1)[..., :2]
        kind = np.uint8 if experts <= 256 else np.uint16
        return Completion(
            generator.integers(0, 99, length).tolist(),
            generator.standard_normal(length).astype(np.float32),
            ids.astype(kind) if routes else None,
            "stop" if length < 4 else "length",
        )

    groups = [[answer(prompt, length) for length in (1, 4, 2)] for prompt in PROMPTS]
    rewards = torch.tensor([[[1.0, 0.0, torch.nan], [0.5, 0.0, 1.0]]])
    return RolloutRecord(PROMPTS, groups, Verdicts(rewards, rewards[0], 1), PROVENANCE)


@pytest.mark.parametrize("experts", [8, 300])
@pytest.mark.parametrize("routes", [True, False])
def test_what_is_read_is_what_was_written(tmp_path, experts, routes):
    written = record(experts=experts, routes=routes)
    path = write_record(tmp_path / "rollouts", written)
    assert find_record(tmp_path / "rollouts", 3) == path
    assert find_record(tmp_path / "rollouts", 2) is None
    found = read_record(path)
    assert (found.prompts, found.provenance, found.verdicts.failures) == (PROMPTS, PROVENANCE, 1)
    assert torch.equal(found.verdicts.total_NG.nan_to_num(9), written.verdicts.total_NG.nan_to_num(9))
    scores = torch.zeros(2, 3)
    one, other = (collate(PROMPTS, item.groups, scores) for item in (written, found))
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert a is b is None or torch.equal(a, b), field.name
    reasons = [answer.finish_reason for group in found.groups for answer in group]
    assert reasons == ["stop", "length", "stop"] * 2


def test_the_same_rollouts_are_the_same_file(tmp_path):
    assert write_record(tmp_path / "a", record()).name == write_record(tmp_path / "b", record()).name


def test_routes_are_stored_compressed(tmp_path):
    completions = [answer for group in record().groups for answer in group]
    plain = dataclasses.replace(
        record(), groups=[[dataclasses.replace(a, routes=np.repeat(a.routes[:1], 900, 0)) for a in completions]]
    )
    size = sum(answer.routes.nbytes for group in plain.groups for answer in group)
    assert write_record(tmp_path, plain).stat().st_size < size / 4


def test_a_damaged_file_is_refused(tmp_path):
    path = write_record(tmp_path, record())
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(bytes(contents))
    with pytest.raises(InputError, match="damaged"):
        read_record(path)


def test_another_file_is_no_record(tmp_path):
    other = tmp_path / "step-1.npz"
    other.write_bytes(b"")
    with pytest.raises(InputError, match="no record"):
        read_record(other)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*_args, **_fields):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(Exception, match=r"disk|space"):
        write_record(tmp_path, record())
    assert not list(tmp_path.iterdir())
