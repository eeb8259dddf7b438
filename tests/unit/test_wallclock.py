from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phid import wallclock
from phid.wallclock import WallClock

IN_2026 = 1_795_600_000.0


@dataclass
class Clocks:
    """Both clocks of a machine."""

    wall: float = 100.0
    monotonic: float = 5.0

    def pass_by(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds


def watched(clocks: Clocks) -> WallClock:
    return WallClock(lambda: clocks.wall, lambda: clocks.monotonic)


def test_time_that_passes_is_no_step() -> None:
    clocks = Clocks()
    clock = watched(clocks)
    for seconds in (0.0, 0.5, 3600.0, 86_400.0):
        clocks.pass_by(seconds)
        assert clock.look() == (clocks.wall, 0.0)


@pytest.mark.parametrize("by_s", [IN_2026, 2.5, -7200.0])
def test_a_step_is_told_once(by_s: float) -> None:
    clocks = Clocks()
    clock = watched(clocks)
    clocks.pass_by(10)
    clocks.wall += by_s
    assert clock.look() == (110 + by_s, pytest.approx(by_s))
    clocks.pass_by(10)
    assert clock.look() == (120 + by_s, 0.0)


@given(st.lists(st.floats(-1e9, 1e9), max_size=20))
def test_steps_add_up_to_where_the_clock_is(steps: list[float]) -> None:
    clocks = Clocks()
    clock, told, began = watched(clocks), 0.0, clocks.wall
    for by_s in steps:
        clocks.pass_by(1.0)
        clocks.wall += by_s
        told += clock.look()[1]
    # What is less than a step is kept until it is one.
    assert abs((clocks.wall - began - len(steps)) - told) <= 2.0 + 1e-6


@pytest.mark.parametrize(
    ("then", "now", "age"),
    [
        (IN_2026, IN_2026 + 60, 60),
        (IN_2026, IN_2026 - 60, 0),  # set back since
        (100.0, IN_2026, 0),  # not set then
        (IN_2026, 100.0, 0),  # not set now
        (100.0, 160.0, 60),  # never set: a machine without a network's time
    ],
)
def test_an_age_is_what_two_times_of_day_can_tell(then: float, now: float, age: float) -> None:
    assert wallclock.age_s(then, now) == age
