"""How much a pull puts up with, and how long it waits between two tries."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Endurance:
    """How much a pull puts up with before it gives up.

    A connection that brings less than `least_bytes_s` for `window_s` is given up for another; one
    that brought at least `least_bytes` in all resets the count of tries.
    """

    attempts: int = 6
    pause_s: float = 1.0
    pause_max_s: float = 60.0
    retry_after_max_s: float = 600.0
    timeout_s: float = 20.0
    window_s: float = 30.0
    least_bytes_s: int = 1024

    @property
    def least_bytes(self) -> float:
        """What a connection must bring in a window."""
        return self.least_bytes_s * self.window_s


class Tries:
    """Counts the failed tries in a row; the pauses between them get longer."""

    def __init__(self, endurance: Endurance) -> None:
        self._endurance = endurance
        self._failed = 0

    def pause_s(self, asked_s: float | None) -> float | None:
        """How long to wait before the next; None if there should be none.

        `asked_s` is what the server asks for.
        """
        endurance = self._endurance
        self._failed += 1
        if self._failed >= endurance.attempts:
            return None
        if asked_s is not None:
            return min(asked_s, endurance.retry_after_max_s)
        return min(endurance.pause_s * float(2 ** (self._failed - 1)), endurance.pause_max_s)
