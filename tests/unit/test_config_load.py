"""Reading configs: what a user gets wrong is named with its place and the nearest valid name, all at once."""

from pathlib import Path
from typing import Any

import pytest

from moestro.config import LifecycleConfig, load_lifecycle, read_yaml, validate
from moestro.errors import ConfigError


def lifecycle(**changes: Any) -> dict[str, Any]:
    """The smallest valid lifecycle, as YAML gives it."""
    document: dict[str, Any] = {
        "name": "small",
        "data": {
            "domains": [
                {"name": "code", "source": {"type": "builtin", "name": "stdlib"}},
                {"name": "prose", "source": {"type": "builtin", "name": "docs"}},
            ]
        },
        "seed": {"type": "pretrain", "training": {"steps": 4}},
        "branch": {"training": {"steps": 2}},
    }
    return document | changes


def complaint(**changes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        validate(LifecycleConfig, lifecycle(**changes), where="walk.yaml")
    return str(error.value)


def test_smallest_lifecycle_is_valid() -> None:
    assert validate(LifecycleConfig, lifecycle(), where="walk.yaml").mix.generalist == "expert"


def test_misspelt_field_is_named_with_its_place_and_the_nearest_valid_name() -> None:
    message = complaint(tune={"training": {"steps": 2, "optimizer": {"learning_rat": 1e-3}}})
    assert message == "walk.yaml: tune.training.optimizer.learning_rat: unknown field, did you mean 'learning_rate'?"


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"seed": {"type": "pretrain", "training": {"stepz": 4}}}, "seed.training.stepz"),
        ({"data": {"domains": [{"name": "a", "source": {"type": "files", "pathz": ["x"]}}]}}, "source.pathz"),
        (
            {"branch": {"training": {"steps": 2}, "overrides": {"code": {"training": {"stepz": 2}}}}},
            "code.training.stepz",
        ),
    ],
)
def test_suggestions_reach_into_unions_lists_and_mappings(changes: dict[str, Any], place: str) -> None:
    message = complaint(**changes)
    assert f"{place}: unknown field, did you mean '{place.rpartition('.')[2].replace('z', 's')}'?" in message


def test_a_name_that_is_valid_elsewhere_only_is_not_suggested() -> None:
    assert complaint(mix={"losses": []}) == "walk.yaml: mix.losses: unknown field"


def test_where_no_name_is_like_it_the_few_there_are_are_listed() -> None:
    message = complaint(branch={"training": {"steps": 2}, "overrides": {"code": {"steps": 2}}})
    assert message == (
        "walk.yaml: branch.overrides.code.steps: unknown field; fields are general_share, trainable, training"
    )


def test_every_mistake_is_listed_at_once() -> None:
    message = complaint(mix={"generalist": "magic", "router": {"type": "centroid", "calibration_tokens": 1}}, branch={})
    assert "mix.generalist" in message
    assert "mix.router.calibration_tokens: Input should be greater than or equal to 256 (given: 1)" in message
    assert "branch.training: required field is missing" in message


def test_unknown_variant_lists_the_valid_ones() -> None:
    message = complaint(seed={"type": "pretrian", "training": {"steps": 1}})
    assert "seed:" in message
    assert "'pretrain', 'import'" in message


def test_variant_without_its_type_is_refused() -> None:
    assert "data.domains.0.source" in complaint(data={"domains": [{"name": "code", "source": {"name": "stdlib"}}]})


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinities_have_no_identity_and_are_refused(value: float) -> None:
    message = complaint(tune={"training": {"steps": 1}, "losses": [{"type": "z_loss", "coefficient": value}]})
    assert "tune.losses.0" in message
    assert "coefficient" in message


def test_missing_file_and_folder_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        load_lifecycle(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="not a readable YAML file"):
        load_lifecycle(tmp_path)


def test_syntax_error_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "walk.yaml"
    path.write_text("name: small\ndata: [\n")
    with pytest.raises(ConfigError, match=r"not valid YAML.*line 3"):
        read_yaml(path)


@pytest.mark.parametrize("line", ["path: {{home}}", "? [a, b]\n: 1"])
def test_a_key_that_is_no_word_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "walk.yaml"
    path.write_text(f"{line}\n")
    with pytest.raises(ConfigError, match=r"not valid YAML: a key must be a plain word.*line 1"):
        read_yaml(path)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "walk.yaml"
    path.write_text("mix:\n  seed: 1\nname: small\nmix:\n  seed: 2\n")
    with pytest.raises(ConfigError, match=r"'mix' stands twice.*line 4"):
        read_yaml(path)


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b\n"])
def test_a_document_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "walk.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"\(top level\)"):
        load_lifecycle(path)


def test_exponents_without_a_point_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "optimizer.yaml"
    path.write_text("learning_rate: 1e-4\n")
    from moestro.config import OptimizerConfig

    assert validate(OptimizerConfig, read_yaml(path), where=str(path)).learning_rate == 1e-4
