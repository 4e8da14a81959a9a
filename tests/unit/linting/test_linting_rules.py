"""Rules find nothing in sound checkpoints, each has a trap, and findings say what and whom they concern."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.errors import InputError
from moestro.linting import RULES, lint, refuse_errors, refuse_faulty
from moestro.models.layouts import LAYOUTS

Make = Callable[..., Any]


def rules(folder: Path, **options: Any) -> set[str]:
    return {finding.rule for finding in lint(folder, **options)}


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_clean_checkpoint_has_no_findings(family: str, make: Make) -> None:
    assert lint(make(family).path) == []


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "flex_olmo", "granitemoe"])
def test_a_tied_head_is_clean_where_both_engines_tie_it(family: str, make: Make) -> None:
    assert lint(make(family, tie_word_embeddings=True).path) == []


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_window_that_both_engines_see_is_clean(family: str, make: Make) -> None:
    assert lint(make(family).set(sliding_window=8, use_sliding_window=True).path) == []


def test_layouts_that_both_engines_read_are_clean(make: Make) -> None:
    checkpoint = make("granitemoe").rename("input_linear.weight", "experts.gate_up_proj")
    checkpoint.rename("output_linear.weight", "experts.down_proj").rename("router.layer.weight", "router.weight")
    assert lint(checkpoint.path) == []


def test_every_rule_has_a_trap() -> None:
    modules = [runpy.run_path(str(path)) for path in Path(__file__).parent.glob("test_linting_*_traps.py")]
    caught = {rule for module in modules for rule, _ in (module["MENDED"] | module["LEFT"]).values()}
    assert set(RULES) - caught == {"unknown-architecture"}
    mendable = {name for name, rule in RULES.items() if rule.mend}
    assert {rule for module in modules for rule, _ in module["MENDED"].values()} == mendable
    assert all(bool(rule.mends) == bool(rule.mend) for rule in RULES.values())


def test_an_unknown_architecture_is_checked_for_what_can_be(make: Make) -> None:
    checkpoint = make("phimoe", num_local_experts=4, intermediate_size=24, head_dim=32)
    assert rules(checkpoint.path) == {"unknown-architecture"}
    checkpoint.fill("lm_head.weight", torch.nan)
    assert rules(checkpoint.path) == {"unknown-architecture", "not-finite"}


def test_findings_can_be_kept_to_one_engine(make: Make) -> None:
    folder = make("mixtral", num_attention_heads=4).path
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert rules(folder, engines=["vllm"]) == {"cpu-head-size"}
    assert rules(folder, engines=["transformers"]) == {"end-of-text"}


def test_what_is_made_here_is_refused_by_the_rules_name(make: Make) -> None:
    checkpoint = make("olmoe")
    refuse_errors(checkpoint.path)
    checkpoint.set(norm_topk_prob=True)
    with pytest.raises(InputError, match="ignored-renormalisation"):
        refuse_errors(checkpoint.path)


def test_experts_may_join_and_leave_whatever_an_engine_makes_of_the_rest(make: Make) -> None:
    checkpoint = make("olmoe", norm_topk_prob=True)
    assert refuse_faulty(checkpoint.path) == {"ignored-renormalisation"}
    refuse_errors(checkpoint.path, but=refuse_faulty(checkpoint.path))
    checkpoint.without("layers.1.input_layernorm")
    with pytest.raises(InputError, match=r"wrong already \(missing-tensors"):
        refuse_faulty(checkpoint.path)


def test_findings_name_what_is_in_the_file(make: Make) -> None:
    checkpoint = make("qwen3_moe")
    (field,) = {"num_experts", "num_local_experts"} & json.loads(checkpoint.config.read_text()).keys()
    checkpoint.set(**{field: 6})
    assert [finding.where for finding in lint(checkpoint.path)] == [(field,)]
    checkpoint.set(num_experts_per_tok=5, **{field: 4})
    (finding,) = lint(checkpoint.path)
    assert finding.where == ("num_experts_per_tok",)


def test_dense_models_and_empty_folders_are_refused(make: Make, tmp_path: Path) -> None:
    checkpoint = make("mixtral").drop("num_local_experts")
    with pytest.raises(InputError, match="dense"):
        lint(checkpoint.path)
    with pytest.raises(InputError, match=r"config\.json"):
        lint(tmp_path)
