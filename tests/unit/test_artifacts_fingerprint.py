"""Identity: the same thing always has the same fingerprint, and what has no stable identity is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moestro.artifacts import canonical_json, content_fingerprint, fingerprint
from moestro.config import FileSource


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (lambda: 0, "value is a function"),
        ({"a": [1, {2}]}, r"value\.a\[1\] is a set"),
        ({"path": Path("x")}, r"value\.path is a PosixPath"),
        ({"loss": float("nan")}, r"value\.loss is nan"),
        ([float("-inf")], r"value\[0\] is -inf"),
        ({1: "one"}, "keys that are not strings"),
        ({"n": np.int64(3)}, r"value\.n is a int64"),
        (torch.zeros(1), "value is a Tensor"),
        (b"bytes", "value is a bytes"),
    ],
)
def test_values_without_a_stable_identity_raise_and_say_where(value: Any, where: str) -> None:
    with pytest.raises(TypeError, match=where):
        canonical_json(value)


def test_json_is_canonical() -> None:
    assert canonical_json({"b": (1, 2.0, None), "a": "ü"}) == '{"a":"ü","b":[1,2.0,null]}'


def test_a_config_stands_for_its_identity() -> None:
    assert canonical_json(FileSource(paths=("a",))) == canonical_json(FileSource(paths=("b",)))


def test_fingerprints_are_the_same_in_every_version() -> None:
    """A golden value: were it to change, every store in the world would be made again."""
    made = fingerprint("mix", "1", {"num_experts_per_tok": 2, "rate": 0.1}, {"seed": "ab", "branches/code": "cd"})
    assert made == "af6a9fc8f4c3ca2a16acedaf196f61322ebee2f63b96de6a8cabfbb486ef6774"


def test_order_is_not_identity_but_every_part_is() -> None:
    base = fingerprint("mix", "1", {"a": 1, "b": 2}, {"x": "1", "y": "2"})
    assert fingerprint("mix", "1", {"b": 2, "a": 1}, {"y": "2", "x": "1"}) == base
    others = [
        fingerprint("tune", "1", {"a": 1, "b": 2}, {"x": "1", "y": "2"}),
        fingerprint("mix", "2", {"a": 1, "b": 2}, {"x": "1", "y": "2"}),
        fingerprint("mix", "1", {"a": 1, "b": 3}, {"x": "1", "y": "2"}),
        fingerprint("mix", "1", {"a": 1, "b": 2}, {"x": "2", "y": "1"}),
    ]
    assert len({base, *others}) == 5


def test_files_are_identified_by_name_and_content_not_by_place(tmp_path: Path) -> None:
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.txt").write_text("same")
    here, there = tmp_path / "here" / "a.txt", tmp_path / "there" / "a.txt"
    assert content_fingerprint({"a.txt": here}) == content_fingerprint({"a.txt": there})
    there.write_text("other")
    assert content_fingerprint({"a.txt": here}) != content_fingerprint({"a.txt": there})
