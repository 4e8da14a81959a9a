"""A repaired copy: everything at once, nothing lost, nothing overwritten, and nothing half written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from moestro.errors import InputError
from moestro.linting import lint, repair

Make = Callable[..., Any]


def test_the_layers_of_a_longer_model_are_kept(make: Make, tmp_path: Path) -> None:
    folder = make("mixtral", num_hidden_layers=3).set(num_hidden_layers=2).path
    repair(folder, lint(folder), tmp_path / "repaired")
    assert json.loads((tmp_path / "repaired" / "config.json").read_text())["num_hidden_layers"] == 3
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "repaired"))
    assert before.keys() == after.keys()


def test_several_troubles_are_mended_at_once(make: Make, tmp_path: Path) -> None:
    checkpoint = make("qwen2_moe", qkv_bias=False, shared_expert_intermediate_size=0)
    folder = checkpoint.set(architectures=["LlamaForCausalLM"]).path
    findings = lint(folder)
    troubles = {"architectures", "missing-qkv-biases", "empty-tensors"}
    assert {finding.rule for finding in findings} == troubles
    assert findings == sorted(findings, key=lambda finding: finding.severity)
    repair(folder, findings, tmp_path / "repaired")
    assert lint(tmp_path / "repaired") == []


def test_nothing_is_overwritten_and_nothing_half_written_stays(make: Make, tmp_path: Path) -> None:
    folder = make("mixtral").narrow(".0.block_sparse_moe.experts.1.").path
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    findings = lint(folder)
    out = tmp_path / "copies" / "repaired"
    (tmp_path / "copies").mkdir()
    with pytest.raises(InputError, match="exists"):
        repair(folder, findings, tmp_path / "copies")

    def interrupt(done: int, total: int) -> None:
        if 0 < done < total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repair(folder, findings, out, progress=interrupt)
    assert list(out.parent.iterdir()) == []
    repair(folder, findings, out)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_copy_holds_every_other_file_as_it_was(make: Make, tmp_path: Path) -> None:
    folder = make("mixtral").set(architectures=["LlamaForCausalLM"]).path
    (folder / "README.md").write_text("About.")
    (folder / "pytorch_model.bin").write_bytes(b"old")
    repair(folder, lint(folder), tmp_path / "repaired")
    names = {path.name for path in folder.iterdir()} - {"pytorch_model.bin"}
    assert {path.name for path in (tmp_path / "repaired").iterdir()} == names
    for name in names - {"config.json"}:
        assert (tmp_path / "repaired" / name).read_bytes() == (folder / name).read_bytes(), name
