"""The model registry: aliases say who gets traffic, and whoever dies while writing them leaves something to serve."""

import itertools
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.artifacts import Artifact
from moestro.errors import BusyError, InputError, ResourceError
from moestro.registry import ModelChangedError, ModelRegistry, RegisteredModel, Tracker, model_registry
from moestro.registry.model_registry import INTRODUCED_TAG
from moestro.registry.model_versions import CHALLENGER, CHAMPION, PREVIOUS
from moestro.registry.model_writes import ordered, share_of, share_tag
from moestro.registry.tracked_run import client

NAMES = (CHAMPION, CHALLENGER, PREVIOUS)
CHANGE = """
import sys
from moestro.registry import ModelRegistry
registry = ModelRegistry(sys.argv[1], sys.argv[2])
registry.models()
print("ready", flush=True)
sys.stdin.readline()
for number in range(5):
    registry.change("assistant", aliases={sys.argv[3]: str(1 + number % 2)})
"""
DIE = """
import os, signal, sys
from moestro.registry import ModelRegistry, model_registry
class Deadly:
    def __init__(self, real):
        self.real = real
    def __getattr__(self, name):
        return getattr(self.real, name)
    def set_registered_model_alias(self, *arguments):
        self.real.set_registered_model_alias(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)
real = model_registry.client
model_registry.client = lambda uri: Deadly(real(uri))
registry = ModelRegistry(sys.argv[1], sys.argv[2])
registry.change("assistant", aliases={"champion": "2", "previous": "1", "challenger": None})
"""


class Interrupted(BaseException):
    """Stands for the end of the process."""


class Mortal:
    """An MLflow client that makes `writes` writes and no more."""

    def __init__(self, real: Any, writes: int) -> None:
        self.real = real
        self.left = writes

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.real, name)
        if not name.startswith(("set_", "delete_", "create_", "log_", "finalize_")):
            return method

        def write(*arguments: Any, **named: Any) -> Any:
            if not self.left:
                raise Interrupted
            self.left -= 1
            return method(*arguments, **named)

        return write


@pytest.fixture
def registry(tmp_path: Path, prepare_mlflow: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> ModelRegistry:
    """A registry without models; the working directory must stay clean."""
    prepare_mlflow(tmp_path / "home")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return ModelRegistry(f"sqlite:///{tmp_path / 'home' / 'mlflow.db'}", (tmp_path / "home" / "mlflow").as_uri())


def deployment(letter: str) -> Artifact:
    """A deployment, as far as the registry looks at it."""
    return Artifact(Path("nowhere"), "deploy", letter * 64)


def assistant(registry: ModelRegistry, versions: int = 4, **aliases: str) -> RegisteredModel:
    """The model `assistant` with so many versions, and the aliases."""
    for letter in "abcdef"[:versions]:
        registry.register("assistant", deployment(letter))
    return registry.change("assistant", aliases=aliases)


def interrupted(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> Iterator[int]:
    """Does `act` with a client that dies after 0, 1, 2 … writes, until it needs no more; yields after each death."""
    real = model_registry.client
    for writes in itertools.count():
        mortal: Any = None

        def dying(uri: str, writes: int = writes) -> Any:
            nonlocal mortal
            mortal = mortal or Mortal(real(uri), writes)
            return mortal

        with monkeypatch.context() as patch:
            patch.setattr(model_registry, "client", dying)
            patch.setattr("moestro.registry.model_creation.client", dying)
            try:
                act()
            except Interrupted:
                pass
            else:
                assert writes
                return
        yield writes


def test_a_home_without_mlflow_has_no_models_and_gets_no_database(tmp_path: Path) -> None:
    registry = ModelRegistry(f"sqlite:///{tmp_path / 'mlflow.db'}", (tmp_path / "mlflow").as_uri())
    assert registry.models() == ()
    with pytest.raises(InputError, match="No model 'assistant' is registered") as refused:
        registry.model("assistant")
    assert "A lifecycle that ends in deploy" in refused.value.hint
    assert list(tmp_path.iterdir()) == []
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("create table experiments (name text)")
    assert registry.models() == ()
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        assert database.execute("select name from sqlite_master").fetchall() == [("experiments",)]


def test_a_version_stands_for_a_deployment_and_is_made_once(registry: ModelRegistry) -> None:
    first = registry.register("assistant", deployment("a"))
    assert (first.name, first.version, first.stage, first.fingerprint) == ("assistant", "1", "deploy", "a" * 64)
    assert registry.register("assistant", deployment("a")) == first
    assert registry.register("assistant", deployment("b")).version == "2"
    assert registry.register("other", deployment("a")).version == "1"
    assert [model.name for model in registry.models()] == ["assistant", "other"]
    model = registry.model("assistant")
    assert [version.version for version in model.versions] == ["2", "1"]
    assert (model.aliases, model.canary_share) == ({}, 0.0)
    found = client(registry.uri).get_model_version("assistant", "1")
    assert (found.status, found.tags) == ("READY", {"moestro.stage": "deploy", "moestro.fingerprint": "a" * 64})
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("name", "stage", "words"),
    [
        ("assistant", "tune", "is no deployment"),
        ("a/b", "deploy", "cannot be the name"),
        ("", "deploy", "cannot be the name"),
        ("x' OR name != '", "deploy", "cannot be the name"),
    ],
)
def test_what_is_no_version_is_refused(registry: ModelRegistry, name: str, stage: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        registry.register(name, Artifact(Path("nowhere"), stage, "a" * 64))
    assert registry.models() == ()


def test_models_and_versions_of_others_are_not_seen(registry: ModelRegistry, tmp_path: Path) -> None:
    assistant(registry, 1, champion="1")
    mlflow = client(registry.uri)
    mlflow.create_registered_model("theirs")
    mlflow.create_model_version("theirs", tmp_path.as_uri())
    mlflow.create_model_version("assistant", tmp_path.as_uri(), tags={"moestro.stage": "rl"})
    mlflow.set_registered_model_alias("assistant", "best", "2")
    mlflow.set_registered_model_alias("assistant", CHALLENGER, "2")
    assert [model.name for model in registry.models()] == ["assistant"]
    model = registry.model("assistant")
    assert [version.version for version in model.versions] == ["1"]
    assert model.aliases == {CHAMPION: "1"}
    with pytest.raises(InputError, match="No model 'theirs'") as refused:
        registry.model("theirs")
    assert refused.value.hint == "There are assistant."


def test_a_change_moves_aliases_share_and_tags(registry: ModelRegistry) -> None:
    assistant(registry, 3, champion="1")
    tags = {"2": {"moestro.forced": "because"}}
    model = registry.change("assistant", aliases={CHALLENGER: "2"}, canary_share=0.1, tags=tags)
    assert (model.aliases, model.canary_share) == ({CHAMPION: "1", CHALLENGER: "2"}, 0.1)
    challenger = model.aliased(CHALLENGER)
    assert challenger
    assert challenger.tags["moestro.forced"] == "because"
    assert registry.change("assistant", aliases={CHAMPION: "3"}).canary_share == 0.1
    assert registry.change("assistant", aliases={}, canary_share=0.25).canary_share == 0.25
    assert registry.change("assistant", aliases={CHALLENGER: "1"}).canary_share == 0
    assert registry.change("assistant", aliases={CHALLENGER: "2"}).canary_share == 0
    model = registry.change("assistant", aliases={CHALLENGER: None, "not there": None}, canary_share=0)
    assert model.aliases == {CHAMPION: "3"}


def test_a_share_that_nobody_gave_to_this_challenger_is_none(registry: ModelRegistry) -> None:
    """Whoever moves the alias in MLflow's own page ends the canary, and nothing brings it back by chance."""
    assistant(registry, 3, champion="1")
    registry.change("assistant", aliases={CHALLENGER: "2"}, canary_share=0.5)
    client(registry.uri).set_registered_model_alias("assistant", CHALLENGER, "3")
    assert registry.model("assistant").canary_share == 0
    assert registry.change("assistant", aliases={CHALLENGER: "2"}).canary_share == 0


@pytest.mark.parametrize(
    "tag", ["", "0.5", "2", "2:", "2:x", "2:nan", "2:inf", "2:0", "2:1", "2:-0.1", "3:0.5", ":0.5"]
)
def test_a_share_tag_that_makes_no_sense_gives_no_traffic(tag: str) -> None:
    assert share_of(tag, "2") == 0
    assert share_of("2:0.5", "2") == 0.5
    assert share_of("2:0.5", None) == 0


@pytest.mark.parametrize("share", [-0.1, 1.0, 2.0, float("nan"), float("inf")])
def test_a_share_outside_its_range_is_refused(registry: ModelRegistry, share: float) -> None:
    before = assistant(registry, 2, champion="1", challenger="2")
    with pytest.raises(InputError, match="between 0 and 1"):
        registry.change("assistant", aliases={PREVIOUS: "2"}, canary_share=share)
    assert registry.model("assistant") == before
    with pytest.raises(InputError, match="needs a @challenger"):
        share_tag(None, 0.5)


def test_a_change_to_a_version_that_is_not_there_changes_nothing(registry: ModelRegistry) -> None:
    before = assistant(registry, 2, champion="1")
    with pytest.raises(InputError, match="no version '7'") as refused:
        registry.change("assistant", aliases={PREVIOUS: "1", CHAMPION: "7"}, tags={"1": {"k": "v"}})
    assert refused.value.hint == "There are 2, 1."
    with pytest.raises(InputError, match="no version '9'"):
        registry.change("assistant", aliases={CHAMPION: "2"}, tags={"9": {"k": "v"}})
    assert registry.model("assistant") == before


def test_a_decision_on_what_is_past_is_refused(registry: ModelRegistry) -> None:
    seen = assistant(registry, 3, champion="1")
    registry.register("assistant", deployment("f"))
    seen = registry.change("assistant", aliases={CHALLENGER: "2"}, canary_share=0.1, seen=seen)
    registry.change("assistant", aliases={}, canary_share=0.2, seen=seen)
    with pytest.raises(ModelChangedError, match="Somebody else changed assistant"):
        registry.change("assistant", aliases={CHAMPION: "3"}, seen=seen)
    assert registry.model("assistant").aliases[CHAMPION] == "1"


def test_an_aliased_version_cannot_be_deleted_and_a_number_is_not_used_again(registry: ModelRegistry) -> None:
    assistant(registry, 3, champion="1", challenger="2", previous="1")
    with pytest.raises(BusyError, match=r"assistant@1 is @champion and @previous and cannot be deleted"):
        registry.delete("assistant", "1")
    with pytest.raises(BusyError, match="@challenger"):
        registry.delete("assistant", "2")
    registry.delete("assistant", "3")
    with pytest.raises(InputError, match="no version '3'"):
        registry.delete("assistant", "3")
    assert [version.version for version in registry.model("assistant").versions] == ["2", "1"]
    assert registry.register("assistant", deployment("c")).version == "4"


def test_introducing_gives_the_first_champion_then_challengers_and_each_only_once(registry: ModelRegistry) -> None:
    first = registry.introduce("assistant", deployment("a"))
    assert (first.version, first.tags[INTRODUCED_TAG]) == ("1", CHAMPION)
    assert registry.introduce("assistant", deployment("a")) == first
    assert registry.introduce("assistant", deployment("b")).tags[INTRODUCED_TAG] == CHALLENGER
    assert registry.model("assistant").aliases == {CHAMPION: "1", CHALLENGER: "2"}
    registry.change("assistant", aliases={CHALLENGER: None})
    registry.introduce("assistant", deployment("b"))
    assert registry.model("assistant").aliases == {CHAMPION: "1"}
    registry.change("assistant", aliases={CHALLENGER: "2"}, canary_share=0.1)
    assert registry.introduce("assistant", deployment("c")).tags[INTRODUCED_TAG] == "version"
    model = registry.model("assistant")
    assert (model.aliases, model.canary_share) == ({CHAMPION: "1", CHALLENGER: "2"}, 0.1)


def test_introducing_that_was_interrupted_anywhere_is_completed(
    registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for writes in interrupted(monkeypatch, lambda: registry.introduce("assistant", deployment("a"))):
        models = registry.models()
        assert [dict(model.aliases) for model in models] in ([], [{}], [{CHAMPION: "1"}]), writes
    registry.introduce("assistant", deployment("a"))
    model = registry.model("assistant")
    assert ([version.version for version in model.versions], model.aliases) == (["1"], {CHAMPION: "1"})
    for _ in interrupted(monkeypatch, lambda: registry.introduce("assistant", deployment("b"))):
        assert registry.model("assistant").aliases[CHAMPION] == "1"
    assert registry.model("assistant").aliases == {CHAMPION: "1", CHALLENGER: "2"}
    assert len(registry.model("assistant").versions) == 2


PROMOTION: dict[str, str | None] = {CHAMPION: "2", CHALLENGER: None, PREVIOUS: "1"}
CHANGES: list[tuple[str, dict[str, str], float, dict[str, str | None], float]] = [
    ("promotion", {CHAMPION: "1", CHALLENGER: "2", PREVIOUS: "3"}, 0.1, PROMOTION, 0),
    ("rollback", {CHAMPION: "2", PREVIOUS: "1"}, 0, {CHAMPION: "1", PREVIOUS: "2"}, 0),
    ("canary", {CHAMPION: "1", CHALLENGER: "2"}, 0, {CHALLENGER: "3"}, 0.1),
    ("another canary", {CHAMPION: "1", CHALLENGER: "2"}, 0.5, {CHALLENGER: "3"}, 0.1),
    ("canary ended", {CHAMPION: "1", CHALLENGER: "2"}, 0.5, {CHALLENGER: None}, 0),
]


@pytest.mark.parametrize(("what", "before", "share", "change", "share_after"), CHANGES, ids=lambda item: str(item)[:14])
def test_a_change_that_died_after_any_write_left_something_to_serve(
    registry: ModelRegistry,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    before: dict[str, str],
    share: float,
    change: dict[str, str | None],
    share_after: float,
) -> None:
    assistant(registry, 3)
    cleared: dict[str, str | None] = dict.fromkeys(NAMES)
    after = {alias: target for alias, target in {**before, **change}.items() if target}
    shares = {(before.get(CHALLENGER), share), (after.get(CHALLENGER), share_after)}

    def act() -> None:
        registry.change("assistant", aliases=cleared | before, canary_share=share)
        registry.change("assistant", aliases=change, canary_share=share_after, tags={"2": {"note": what}})

    registry.change("assistant", aliases=cleared | before, canary_share=share)
    deaths = 0
    for _ in interrupted(monkeypatch, act):
        deaths += 1
        model = registry.model("assistant")
        assert model.aliases[CHAMPION] in {before[CHAMPION], after[CHAMPION]}
        assert set(model.aliases.values()) <= set(before.values()) | set(after.values())
        if model.canary_share:
            assert (model.aliases[CHALLENGER], model.canary_share) in shares
        done = registry.change("assistant", aliases=change, canary_share=share_after)
        assert (done.aliases, done.canary_share) == (after, share_after)
        registry.change("assistant", aliases=cleared | before, canary_share=share)
    assert deaths >= 2
    assert registry.model("assistant").aliases == after


VERSIONS = st.sampled_from(["1", "2", "3", "4"])


@given(
    now=st.dictionaries(st.sampled_from(NAMES), VERSIONS),
    wanted=st.dictionaries(st.sampled_from(NAMES), VERSIONS | st.none()),
)
def test_the_order_of_writes_keeps_every_version_named_that_can_be(
    now: dict[str, str], wanted: dict[str, str | None]
) -> None:
    after = {alias: target for alias, target in {**now, **wanted}.items() if target}
    state, nameless = dict(now), False
    writes = ordered(now, wanted)
    for alias, target in writes:
        before = set(state.values())
        if target is None:
            del state[alias]
        else:
            state[alias] = target
        lost = (before & set(after.values())) - set(state.values())
        nameless = nameless or bool(lost)
        assert CHAMPION in state or not (CHAMPION in now and CHAMPION in after)
    assert state == after
    assert len(writes) == sum(now.get(alias) != target for alias, target in wanted.items())
    if nameless:  # versions change places, so one has to give way
        moved = {target for alias, target in now.items() if after.get(alias) != target}
        assert len(moved & set(after.values())) >= 2


def in_process(script: str, registry: ModelRegistry, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, registry.uri, registry.files.as_uri(), *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_kill_9_in_a_change_leaves_a_valid_model_and_a_free_lock(registry: ModelRegistry) -> None:
    assistant(registry, 2, champion="1", challenger="2")
    with in_process(DIE, registry) as process:
        assert process.wait(120) == -9, process.stderr and process.stderr.read()
    assert registry.model("assistant").aliases == {CHAMPION: "1", CHALLENGER: "2", PREVIOUS: "1"}
    registry.change("assistant", aliases={CHAMPION: "2", CHALLENGER: None})
    assert registry.model("assistant").aliases == {CHAMPION: "2", PREVIOUS: "1"}


@pytest.mark.slow
def test_processes_that_change_one_model_at_once_lose_nothing(registry: ModelRegistry) -> None:
    assistant(registry, 2, champion="1")
    processes = [in_process(CHANGE, registry, alias) for alias in (CHALLENGER, PREVIOUS)]
    try:
        for process in processes:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
        results = [process.communicate("\n", timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], results
    assert registry.model("assistant").aliases == {CHAMPION: "1", CHALLENGER: "1", PREVIOUS: "1"}


def test_a_server_that_cannot_be_reached_is_one_error(tmp_path: Path) -> None:
    registry = ModelRegistry("http://user:secret@127.0.0.1:1", (tmp_path / "mlflow").as_uri())
    with pytest.raises(ResourceError, match="cannot be reached") as refused:
        registry.models()
    assert "secret" not in str(refused.value)


def test_many_models_and_versions_are_read_page_by_page(
    registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moestro.registry.model_reading.PAGE", 2)
    for name, letter in itertools.product(("one", "three", "two"), "abc"):
        registry.register(name, deployment(letter))
    found: Mapping[str, list[str]] = {
        model.name: [version.version for version in model.versions] for model in registry.models()
    }
    assert found == {name: ["3", "2", "1"] for name in ("one", "three", "two")}


def test_a_reader_asks_again_only_after_a_write_and_misses_none(
    registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    assistant(registry, 2, champion="1")
    reader = ModelRegistry(registry.uri, registry.files.as_uri())
    reads: list[str] = []
    real = model_registry.read_models
    monkeypatch.setattr(model_registry, "read_models", lambda uri: reads.append(uri) or real(uri))
    assert [reader.models() for _ in range(5)] == [reader.models()] * 5
    assert len(reads) == 1
    for version in "21212":
        client(registry.uri).set_registered_model_alias("assistant", CHAMPION, version)
        assert reader.model("assistant").aliases == {CHAMPION: version}
    assert len(reads) == 6
    database = Path(str(registry.files.parent / "mlflow.db"))
    for path in database.parent.glob("mlflow.db*"):
        path.unlink()
    assert reader.models() == ()


def test_a_registry_that_no_tracker_prepared_says_so(tmp_path: Path) -> None:
    registry = ModelRegistry(f"sqlite:///{tmp_path / 'mlflow.db'}", (tmp_path / "mlflow").as_uri())
    with pytest.raises(ResourceError, match="Prepare the tracker first"):
        registry.register("assistant", deployment("a"))
    Tracker(registry.uri, registry.files.as_uri()).prepare()
    assert registry.register("assistant", deployment("a")).version == "1"
