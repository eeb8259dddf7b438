"""Heat: whether the CPU is slowed down for it, and whether to wait until it is cooler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

LOOK_S = 5.0
"""Between two looks at the sensors, seconds."""

# How much cooler it must be before work goes on: else it would go on and off.
_COOLER_C = 5.0


@dataclass(frozen=True, slots=True)
class Heat:
    """What the sensors say; a sensor that is absent says None."""

    temp_c: float | None
    throttled: bool | None


class Thermal:
    """Looks at the sensors now and then; `waits` says that nothing is to be begun."""

    def __init__(self, read: Callable[[], Heat]) -> None:
        self.waits = False
        self.reason: str | None = None
        self._read = read
        self._look_at = 0.0

    def tick(self, now: float, pause_above_c: float) -> None:
        """Look if it is time. Above `pause_above_c` (0: never) it waits."""
        if now < self._look_at:
            return
        self._look_at = now + LOOK_S
        heat = self._read()
        temp_c = heat.temp_c
        if not pause_above_c or temp_c is None:
            self.waits = False
        else:
            self.waits = temp_c > pause_above_c - (_COOLER_C if self.waits else 0.0)
        self.reason = None
        if self.waits:
            goes_on_c = pause_above_c - _COOLER_C
            self.reason = (
                f"too hot: nothing is begun above {pause_above_c:g} C, until {goes_on_c:g}"
            )
        elif heat.throttled:
            self.reason = "the CPU is slowed down for heat, or its power supply is too weak"
