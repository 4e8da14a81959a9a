"""Buckets and meters under a clock that the test sets."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moestro_services.gateway.limits import Bucket, Limits, Meter, Meters, OverLimitError

STEPS = st.lists(st.tuples(st.floats(0, 300), st.integers(0, 500)), max_size=60)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@settings(deadline=None)
@given(per_minute=st.integers(1, 10_000), steps=STEPS)
def test_no_more_than_a_minutes_worth_and_what_refilled_passes(per_minute: int, steps: list[tuple[float, int]]) -> None:
    clock = Clock()
    bucket = Bucket(per_minute, clock)
    passed = 0
    for seconds, wanted in steps:
        clock.now += seconds
        for _ in range(wanted):
            if bucket.wait():
                break
            bucket.take(1)
            passed += 1
        assert passed <= per_minute * (1 + (clock.now - 1000) / 60) + 1e-3


@settings(deadline=None)
@given(per_minute=st.integers(1, 10_000), spent=st.floats(0, 1e7), units=st.floats(0.1, 20_000))
def test_who_waits_as_long_as_told_is_let_in_and_no_sooner(per_minute: int, spent: float, units: float) -> None:
    clock = Clock()
    bucket = Bucket(per_minute, clock)
    bucket.take(spent)
    wait = bucket.wait(units)
    if wait > 1e-3:
        clock.now += wait * 0.99
        assert bucket.wait(units) > 0
        clock.now += wait * 0.01
    assert bucket.wait(units) == pytest.approx(0, abs=1e-3)


@settings(deadline=None)
@given(per_minute=st.integers(1, 10_000), steps=STEPS)
def test_a_bucket_never_holds_more_than_a_minutes_worth(per_minute: int, steps: list[tuple[float, int]]) -> None:
    clock = Clock()
    bucket = Bucket(per_minute, clock)
    for seconds, taken in steps:
        clock.now += seconds
        assert bucket.level <= per_minute
        bucket.take(taken)


def test_a_clock_that_stands_or_goes_back_gives_nothing() -> None:
    clock = Clock()
    bucket = Bucket(60, clock)
    bucket.take(60)
    clock.now -= 100
    assert bucket.level == 0
    bucket.take(-5)
    assert bucket.level == 0


def test_requests_over_the_limit_are_told_when_to_come_back() -> None:
    clock = Clock()
    meter = Meter(Limits(requests_per_minute=2), clock)
    for _ in range(2):
        with meter.request():
            pass
    with pytest.raises(OverLimitError) as raised, meter.request():
        pass
    assert (raised.value.limit, raised.value.retry_after) == ("requests_per_minute", 30)
    clock.now += 30
    with meter.request():
        pass


def test_tokens_are_a_debt_that_is_paid_off_before_the_next_request() -> None:
    clock = Clock()
    meter = Meter(Limits(tokens_per_minute=100), clock)
    with meter.request():
        meter.spend(400)
    with pytest.raises(OverLimitError) as raised, meter.request():
        pass
    assert raised.value.limit == "tokens_per_minute"
    assert raised.value.retry_after == math.ceil(301 * 60 / 100)
    clock.now += raised.value.retry_after
    with meter.request():
        pass


def test_a_place_is_free_again_whatever_ends_a_request() -> None:
    meter = Meter(Limits(concurrent_requests=1))

    def end(error: type[BaseException]) -> None:
        with meter.request():
            with pytest.raises(OverLimitError, match="at a time"), meter.request():
                pass
            raise error

    for error in (RuntimeError, KeyboardInterrupt, GeneratorExit):
        with pytest.raises(error):
            end(error)
        assert meter.in_flight == 0


def test_no_limit_is_none() -> None:
    meter = Meter(Limits(requests_per_minute=None, tokens_per_minute=None, concurrent_requests=None))
    meter.spend(10**12)
    for _ in range(1000):
        meter.request().__enter__()


def test_a_refused_request_costs_nothing() -> None:
    meter = Meter(Limits(requests_per_minute=2, concurrent_requests=1), Clock())
    with meter.request():
        for _ in range(10):
            with pytest.raises(OverLimitError, match="at a time"), meter.request():
                pass
    with meter.request():
        pass


def test_a_keys_limits_go_before_the_gateways_where_they_were_given() -> None:
    gateway = Limits(requests_per_minute=10, tokens_per_minute=20)
    own = Limits.model_validate({"tokens_per_minute": None, "concurrent_requests": 3})
    both = own.over(gateway)
    assert (both.requests_per_minute, both.tokens_per_minute, both.concurrent_requests) == (10, None, 3)
    assert Limits().over(gateway) == gateway


@pytest.mark.parametrize("field", [*Limits.model_fields])
@pytest.mark.parametrize("value", [0, -1, "many", float("nan"), float("inf")])
def test_a_limit_is_a_positive_number(field: str, value: object) -> None:
    with pytest.raises(ValidationError):
        Limits.model_validate({field: value})


def test_meters_are_kept_by_caller_until_its_limits_change() -> None:
    meters = Meters()
    first = meters.of("a", Limits())
    assert meters.of("a", Limits()) is first
    assert meters.of("b", Limits()) is not first
    assert meters.of("a", Limits(requests_per_minute=1)) is not first
