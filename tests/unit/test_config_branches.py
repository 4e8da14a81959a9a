"""Plans of branches: roles of domains, what differs for single ones, branches that exist, and what refuses them."""

from typing import Any

import pytest

from moestro.config import BranchConfig, CorpusConfig, DomainConfig, ImportBranch, LifecycleConfig, validate
from moestro.errors import ConfigError

BRANCH = {"training": {"steps": 2}}
NAMES = ("code", "math", "web")


def domain(name: str, role: str = "expert") -> dict[str, Any]:
    return {"name": name, "source": {"type": "builtin", "name": "docs"}, "role": role}


def lifecycle(branch: dict[str, Any], *, general: tuple[str, ...] = (), **more: Any) -> LifecycleConfig:
    data = {
        "name": "small",
        "data": {"domains": [domain(name, "general" if name in general else "expert") for name in NAMES]},
        "seed": {"type": "pretrain", "training": {"steps": 1}},
        "branch": branch,
    }
    return validate(LifecycleConfig, data | more, where="walk.yaml")


def test_a_general_domain_has_neither_branch_nor_expert() -> None:
    config = lifecycle(BRANCH | {"general_share": 0.25}, general=("web",))
    assert list(config.branch_configs()) == ["code", "math"]
    assert config.general_text("code") == config.general_text("math") == ("web",)
    assert list(config.data.corpus_configs()) == list(NAMES)
    too_many = {"mix": {"num_experts_per_tok": 4}}
    assert lifecycle(BRANCH, **too_many).mix.num_experts_per_tok == 4
    with pytest.raises(ConfigError, match="chooses 4 of only 3 experts"):
        lifecycle(BRANCH, general=("web",), **too_many)


def test_without_a_general_domain_general_text_is_that_of_all_others() -> None:
    config = lifecycle(BRANCH | {"general_share": 0.25})
    assert config.general_text("math") == ("code", "web")
    assert lifecycle(BRANCH).general_text("math") == ()


def test_an_override_changes_what_it_names_and_nothing_else() -> None:
    overrides = {"code": {"trainable": "all"}, "math": {"training": {"steps": 7}, "general_share": 0.5}}
    configs = lifecycle(BRANCH | {"general_share": 0.1, "overrides": overrides}).branch_configs()
    plans = {
        name: (branch.training.steps, branch.trainable, branch.general_share)
        for name, branch in configs.items()
        if isinstance(branch, BranchConfig)
    }
    assert plans == {"code": (2, "all", 0.1), "math": (7, "ffn", 0.5), "web": (2, "ffn", 0.1)}


def test_an_override_can_turn_general_text_off() -> None:
    config = lifecycle(BRANCH | {"general_share": 0.1, "overrides": {"code": {"general_share": 0.0}}})
    assert config.general_text("code") == ()
    assert config.general_text("math") == ("code", "web")


def test_an_existing_branch_is_brought_in_and_its_path_is_no_identity() -> None:
    def branch(path: str, **mix: Any) -> Any:
        return lifecycle(BRANCH | {"existing": {"code": {"path": path}}}, mix=mix).branch_configs()["code"]

    config = branch("models/code")
    assert isinstance(config, ImportBranch)
    assert config.path == "models/code"
    assert config.identity() == branch("elsewhere").identity()
    assert not config.unify_vocabulary
    assert branch("models/code", unify_vocabulary=True).unify_vocabulary


def test_where_all_branches_exist_no_training_is_needed() -> None:
    existing = {name: {"path": name} for name in NAMES}
    configs = lifecycle({"existing": existing, "general_share": 0.5}).branch_configs()
    assert {branch.type for branch in configs.values()} == {"import"}
    assert lifecycle({"existing": existing, "general_share": 0.5}).general_text("code") == ()


def test_a_seed_is_pretrained_on_all_domains_or_on_those_named() -> None:
    assert lifecycle(BRANCH).seed_text() == NAMES
    named = {"type": "pretrain", "training": {"steps": 1}, "domains": ["web", "code"]}
    config = lifecycle(BRANCH, seed=named)
    assert config.seed_text() == ("web", "code")
    assert config.seed.identity() == lifecycle(BRANCH).seed.identity()
    assert lifecycle(BRANCH, seed={"type": "import", "path": "base"}).seed_text() == ()


def test_a_domains_role_is_no_identity_of_its_corpus() -> None:
    one, other = (
        CorpusConfig(domain=DomainConfig.model_validate(domain("web", role))) for role in ("expert", "general")
    )
    assert one.identity() == other.identity()
    assert one.identity()["domain"] == {"name": "web", "source": one.domain.source.identity()}


@pytest.mark.parametrize(
    ("branch", "general", "message"),
    [
        ({}, (), "branch.training: required field is missing"),
        ({"existing": {"code": {"path": "x"}}}, (), "branch.training: required field is missing: the branch of math"),
        (BRANCH | {"overrides": {"code": {}}}, (), "branch.overrides.code: changes nothing; give training, trainable"),
        (BRANCH | {"overrides": {"law": {"trainable": "all"}}}, (), r"branch.overrides: no domain named \['law'\]"),
        (BRANCH | {"existing": {"law": {"path": "x"}}}, (), r"branch.existing: no domain named \['law'\]"),
        (BRANCH | {"existing": {"web": {"path": "x"}}}, ("web",), "branch.existing: web is general text, it has no"),
        (BRANCH | {"overrides": {"web": {"trainable": "all"}}}, ("web",), "branch.overrides: web is general text"),
        (
            BRANCH | {"existing": {"code": {"path": "x"}}, "overrides": {"code": {"trainable": "all"}}},
            (),
            "branch.overrides: code is not trained, its branch exists",
        ),
        (BRANCH | {"general_share": 1.0}, (), "branch.general_share: Input should be less than 1"),
        (BRANCH, NAMES, "mix.experts: those of type 'domains' need at least one branch"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused(
    branch: dict[str, Any], general: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        lifecycle(branch, general=general)


def test_general_text_needs_another_domain() -> None:
    data = {"domains": [domain("code")]}
    with pytest.raises(ConfigError, match=r"branch\.general_share: there is no domain but code"):
        lifecycle(BRANCH | {"general_share": 0.5}, data=data)


@pytest.mark.parametrize(
    ("domains", "message"), [(["law"], r"seed.domains: no domain named \['law'\]"), ([], "seed.domains: .*at least 1")]
)
def test_the_seeds_domains_must_be_there(domains: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lifecycle(BRANCH, seed={"type": "pretrain", "training": {"steps": 1}, "domains": domains})
