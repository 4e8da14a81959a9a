"""Which status an error of ours has in the gateway."""

import pytest

from moestro.errors import ConfigError, ConflictError, GateError, LostWorkerError, MoestroError, ResourceError
from moestro.registry import ModelChangedError
from moestro_services.gateway.errors import api_error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ModelChangedError("Somebody else changed it."), 409),
        (GateError("It is worse."), 409),
        (ConflictError("There is nothing to go back to."), 409),
        (ResourceError("MLflow cannot be reached."), 503),
        (LostWorkerError("Its machine is gone."), 503),
        (ConfigError("Unknown field."), 400),
    ],
)
def test_an_error_has_the_status_of_its_kind(error: MoestroError, status: int) -> None:
    answer = api_error(error)
    assert answer.status_code == status
    assert answer.headers.get("retry-after") == ("5" if status == 503 else None)
