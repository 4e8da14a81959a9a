"""The benches' workshop: each result is made once, and it is the first failure that is told."""

from pathlib import Path

import pytest

from moestro.config import BuiltinSource, CorpusConfig, DomainConfig
from moestro.errors import InputError
from moestro_services.upcycling import bench
from moestro_services.upcycling.lab import Lab, Workshop


class FakeCluster:
    """Runs nothing: raises what it is told to, in turn."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.asked = 0

    def run(self, *_: object, **__: object) -> None:
        self.asked += 1
        raise self.errors.pop(0)


def corpus(name: str) -> CorpusConfig:
    return CorpusConfig(domain=DomainConfig(name=name, source=BuiltinSource(name="docs", max_bytes=2000)))


def test_after_a_failure_nothing_is_begun_and_it_is_the_failure_that_is_told(tmp_path: Path) -> None:
    cause = InputError("The corpus is empty.")
    cluster = FakeCluster(cause)

    def wanted(arms: bench.Arms) -> dict[str, object]:
        with pytest.raises(InputError):
            arms.lab.run("corpus", corpus("first"))
        return {"second": lambda: arms.lab.run("corpus", corpus("second"))}

    with pytest.raises(InputError, match="The corpus is empty"):
        bench.on_all_seeds(Workshop(tmp_path, cluster, bench.tell), bench.full_scale(), (0,), wanted)
    assert cluster.asked == 1


def test_whoever_asks_again_gets_the_same_failure_without_another_run(tmp_path: Path) -> None:
    cluster = FakeCluster(InputError("The corpus is empty."))
    workshop = Workshop(tmp_path, cluster, lambda _: None)
    for _ in range(2):
        with pytest.raises(InputError):
            Lab(workshop, 0).run("corpus", corpus("first"))
    assert cluster.asked == 1
    assert workshop.stop.is_set()
