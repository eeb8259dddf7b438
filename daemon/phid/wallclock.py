"""The clock on the wall, which may not be set yet and may be set at any time."""

from __future__ import annotations

import time
from collections.abc import Callable

# 2026-01-01, when this program did not exist yet. A Raspberry Pi without a battery starts in 1970.
_FIRST_TS = 1_767_225_600.0
# The year 10000.
_LAST_TS = 253_402_300_800.0
# A clock that is only steered moves both of a machine's clocks alike.
_STEP_S = 2.0


def is_set(ts: float) -> bool:
    """True unless this time of day, Unix seconds, is from before there was this program."""
    return ts >= _FIRST_TS


def is_time(ts: float) -> bool:
    """False for what no clock tells: no number, or one out of all range."""
    return -_LAST_TS < ts < _LAST_TS


def age_s(then: float, now: float) -> float:
    """How long ago something was, by times of day; 0 where the two cannot be compared.

    That is where the clock was set back since, or was not set at all then, or it is no time.
    """
    if not is_time(then) or (is_set(now) and not is_set(then)):
        return 0.0
    return max(now - then, 0.0)


class WallClock:
    """Tells the time of day, and how far it was set since it was last looked at."""

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._offset = wall() - monotonic()

    def look(self) -> tuple[float, float]:
        """The time of day, Unix seconds, and by how many seconds it was set; 0.0 if it was not.

        A suspended machine counts as one whose clock was set: its deadlines have slept, too.
        """
        now = self._wall()
        step_s = now - self._monotonic() - self._offset
        if abs(step_s) < _STEP_S:
            return now, 0.0
        self._offset += step_s
        return now, step_s
