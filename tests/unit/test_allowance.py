from __future__ import annotations

import statistics
import time

from hypothesis import given
from hypothesis import strategies as st

from phid.allowance import Allowance

pauses = st.lists(st.floats(0, 30, allow_nan=False), max_size=200)


def taken(allowance: Allowance, times: list[float], client: str = "c") -> list[float]:
    return [now for now in times if allowance.take(client, now) is None]


def times_of(gaps: list[float]) -> list[float]:
    now, times = 1000.0, []
    for gap in gaps:
        now += gap
        times.append(now)
    return times


@given(pauses, st.floats(0.5, 600), st.integers(1, 20))
def test_no_span_holds_more_than_a_burst_and_the_rate(
    gaps: list[float], rate: float, burst: int
) -> None:
    got = taken(Allowance(rate, burst), times_of(gaps))
    for first, begin in enumerate(got):
        for count, end in enumerate(got[first:], 1):
            assert count <= burst + (end - begin) * rate / 60 + 1e-3


@given(pauses, st.floats(0.5, 600), st.integers(1, 20))
def test_who_comes_again_when_told_is_let_in_and_not_before(
    gaps: list[float], rate: float, burst: int
) -> None:
    allowance = Allowance(rate, burst)
    for now in times_of(gaps):
        wait_ms = allowance.take("c", now)
        if wait_ms is not None:
            assert wait_ms > 0
            early = now + (wait_ms - 2) / 1000
            assert early <= now or allowance.take("c", early) is not None
            assert allowance.take("c", now + wait_ms / 1000) is None
            return


@given(pauses, st.floats(0.5, 600), st.integers(1, 20))
def test_who_keeps_to_the_rate_is_never_refused(gaps: list[float], rate: float, burst: int) -> None:
    allowance = Allowance(rate, burst)
    times = times_of([gap + 60 / rate for gap in gaps])
    assert taken(allowance, times) == times


@given(st.lists(st.sampled_from("abc"), max_size=100))
def test_one_client_costs_another_nothing(askers: list[str]) -> None:
    allowance = Allowance(6, 3)
    for n, client in enumerate(askers):
        allowed = allowance.take(client, 5.0) is None
        assert allowed == (askers[:n].count(client) < 3)


def test_names_without_end_take_memory_with_an_end() -> None:
    allowance = Allowance(1, 1)
    assert allowance.take("steady", 0.0) is None
    for n in range(1000):
        assert allowance.take(f"c{n}", 0.0) is None
    assert allowance.take("steady", 0.0) is not None, "the table has room for it still"
    for n in range(100_000):
        allowance.take(f"d{n}", 0.0)
    assert len(allowance) == 1024


def test_a_rate_of_zero_is_none_and_may_come_and_go() -> None:
    allowance = Allowance(0, 1)
    assert taken(allowance, [1.0] * 1000) == [1.0] * 1000
    assert len(allowance) == 0
    allowance.rate_per_minute = 60
    assert taken(allowance, [1.0] * 1000) == [1.0]


def test_to_ask_costs_next_to_nothing() -> None:
    allowance, took = Allowance(60, 1), []
    for n in range(2000):
        began = time.thread_time()
        allowance.take(f"c{n % 1500}", 0.0)
        took.append(time.thread_time() - began)
    assert statistics.median(took) < 0.0001
