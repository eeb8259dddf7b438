"""Whether an engine leaks: a line through what it held after each of its jobs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise

# The first jobs fill arenas and pools, which stay. So does the first job of a size not seen yet.
_WARM_UP = 8
# The most samples: when there are so many, every two become one, for a slow leak shows in days.
_MOST = 128
_FEWEST = 32
# A growth below this share of what it held at first is not worth a restart, whatever is set.
_LEAST_SHARE = 0.1
# A leak goes on: each quarter of the line must have at least this share of the whole line's slope.
# A step, or a curve that nears a limit, does not.
_STEADY = 0.6


class Growth:
    """What one engine held after each of its jobs, in bounded memory."""

    def __init__(self) -> None:
        self._held: list[int] = []
        self._jobs_each = 1
        self._least: list[int] = []
        self._warm_up = _WARM_UP
        self._largest = 0
        self._leaked: int | None = 0

    def add(self, held_bytes: int, tokens: int) -> None:
        """Count a job whose cache was made for so many tokens, and what was held after it.

        A job larger than any before may leave more behind by right, so counting begins anew: a
        conversation that grows from turn to turn is no leak.
        """
        if tokens > self._largest:
            self._largest = tokens
            self._held.clear()
            self._least.clear()
            self._jobs_each, self._warm_up = 1, _WARM_UP
        self._leaked = None
        if self._warm_up:
            self._warm_up -= 1
            return
        self._least.append(held_bytes)
        if len(self._least) < self._jobs_each:
            return
        # The least of several: what comes and goes again is no leak.
        self._held.append(min(self._least))
        self._least.clear()
        if len(self._held) == _MOST:
            self._held = [min(pair) for pair in zip(self._held[::2], self._held[1::2], strict=True)]
            self._jobs_each *= 2

    def leaked_bytes(self) -> int:
        """How much it has grown since it was warm, if steadily; else 0."""
        if self._leaked is None:  # asked for many times between two jobs
            self._leaked = leaked_bytes(self._held)
        return self._leaked


def leaked_bytes(held: Sequence[int]) -> int:
    """The rise of the least-squares line through these, if each quarter of them rises with it."""
    if len(held) < _FEWEST:
        return 0
    whole = _slope(held)
    ends = [len(held) * quarter // 4 for quarter in range(5)]
    quarters = [_slope(held[a:b]) for a, b in pairwise(ends)]
    grown = round(whole * (len(held) - 1))
    if grown < _LEAST_SHARE * held[0] or min(quarters) < _STEADY * whole:
        return 0
    return max(grown, 0)


def _slope(values: Sequence[int]) -> float:
    return statistics.linear_regression(range(len(values)), values).slope
