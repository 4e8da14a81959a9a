"""The keeper starts a lost server again, a few times."""

import threading

import pytest

from moestro.errors import ResourceError
from moestro_services.gateway.keeper import MAX_RESTARTS, Keeper

NOBODY = "http://127.0.0.1:1"


class Flaky:
    """A server that is lost `losses` times, noticed as soon as it is asked."""

    url = NOBODY

    def __init__(self, losses: int, *, starts: int = 99) -> None:
        self.losses = losses
        self.starts = starts
        self.started = 0
        self.stopped = 0
        self.recovered = threading.Event()

    def start(self, timeout: float = 1.0) -> None:  # noqa: ARG002
        self.started += 1
        if self.started > self.starts:
            raise ResourceError("No memory.\nlog")
        if self.started > self.losses:
            self.recovered.set()

    def stop(self) -> None:
        self.stopped += 1

    def healthy(self) -> bool:
        return self.started > self.losses


def test_a_lost_server_is_started_again() -> None:
    server, said = Flaky(2), []
    with Keeper(server, say=said.append, check_seconds=0.01) as keeper:
        assert server.recovered.wait(10)
        assert not keeper.gave_up.is_set()
    assert server.started == 3
    assert server.stopped == 3
    assert sum("starting it again" in line for line in said) == 2


@pytest.mark.parametrize("server", [Flaky(99), Flaky(99, starts=1)])
def test_it_gives_up_after_a_few_times(server: Flaky) -> None:
    with Keeper(server, say=lambda _: None, check_seconds=0.01) as keeper:
        assert keeper.gave_up.wait(10)
    assert server.started == 1 + MAX_RESTARTS


def test_a_server_that_does_not_start_at_all_is_an_error() -> None:
    with pytest.raises(ResourceError, match="No memory"), Keeper(Flaky(0, starts=0), say=lambda _: None):
        pass
