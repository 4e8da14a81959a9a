"""How much a caller may ask of the gateway: `Limits`, and the `Meter` that holds one caller to them.

Requests and tokens are buckets: a full one holds a minute's worth and refills steadily, so that over any time t at most
limit * (1 + t / 60 s) pass. What a request costs in tokens is known when it is answered; a bucket may therefore fall
below nothing, and the caller then waits until it has paid.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Clock = Callable[[], float]
Count = Annotated[int, Field(gt=0, strict=True)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]

CODE = "rate_limit_exceeded"


class Limits(BaseModel):
    """What one key may use; None: no limit. A key's own limits, where they were given, go before the gateway's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_minute: Count | None = 60_000
    """Requests, answered or not."""
    tokens_per_minute: Count | None = None
    """Tokens of prompts and answers together, as the model's server counts them."""
    concurrent_requests: Count | None = 512
    """Requests being answered at a time."""
    max_body_bytes: Count | None = 4 << 20
    """Size of a request's body."""
    body_seconds: Seconds | None = 30.0
    """Time in which a request's body must have come."""
    request_seconds: Seconds | None = 1800.0
    """Time until a model's last byte; elsewhere, where a client may follow events for days, until the first."""

    def over(self, defaults: "Limits") -> "Limits":
        """These limits where they were given, `defaults` elsewhere."""
        return defaults.model_copy(update=self.given())

    def given(self) -> dict[str, int | float | None]:
        """The limits that were given, by name."""
        return self.model_dump(exclude_unset=True)


class OverLimitError(Exception):
    """A request more than the caller may make now."""

    def __init__(self, limit: str, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.limit = limit
        """The field of `Limits` that it is over."""
        self.message = message
        self.retry_after = max(1, math.ceil(retry_after))
        """Whole seconds after which to ask again."""


class Bucket:
    """So many units a minute. Not for use by several threads."""

    def __init__(self, per_minute: int, clock: Clock = time.monotonic) -> None:
        self._capacity = float(per_minute)
        self._clock = clock
        self._level = self._capacity
        self._at = clock()

    @property
    def level(self) -> float:
        """Units in it now, less than nothing if more was taken than there was."""
        now = self._clock()
        filled = self._level + max(0.0, now - self._at) * self._capacity / 60
        self._level, self._at = min(self._capacity, filled), now
        return self._level

    def wait(self, units: float = 1.0) -> float:
        """Seconds until it holds `units`, at most its capacity; 0 if it does."""
        missing = min(units, self._capacity) - self.level
        return max(0.0, missing * 60 / self._capacity)

    def take(self, units: float) -> None:
        """Take `units`, whether or not it holds them."""
        self._level = self.level - max(0.0, units)


class Meter:
    """What one caller has used of `limits`. All its methods belong to the event loop's thread."""

    def __init__(self, limits: Limits, clock: Clock = time.monotonic) -> None:
        self.limits = limits
        self.in_flight = 0
        self._requests = Bucket(limits.requests_per_minute, clock) if limits.requests_per_minute else None
        self._tokens = Bucket(limits.tokens_per_minute, clock) if limits.tokens_per_minute else None

    @contextmanager
    def request(self) -> Iterator[None]:
        """One request while in the block; raises `OverLimitError` before it if there may be no more now."""
        self._check()
        if self._requests:
            self._requests.take(1)
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def spend(self, tokens: int) -> None:
        """Charge tokens that were used, also after the request's end."""
        if self._tokens:
            self._tokens.take(tokens)

    def _check(self) -> None:
        most = self.limits.concurrent_requests
        if most is not None and self.in_flight >= most:
            raise OverLimitError("concurrent_requests", f"More than {most} requests at a time.", 1)
        for name, bucket in (("requests_per_minute", self._requests), ("tokens_per_minute", self._tokens)):
            if bucket is not None and (wait := bucket.wait()):
                what = name.replace("_", " ")
                raise OverLimitError(name, f"More than {getattr(self.limits, name)} {what}.", wait)


class Meters:
    """The meters of all callers."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._meters: dict[str, Meter] = {}

    def of(self, caller: str, limits: Limits) -> Meter:
        """The caller's meter, a new one if its limits were changed."""
        meter = self._meters.get(caller)
        if meter is None or meter.limits != limits:
            meter = self._meters[caller] = Meter(limits, self._clock)
        return meter
