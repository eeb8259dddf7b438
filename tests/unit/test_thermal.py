from __future__ import annotations

from phid.thermal import LOOK_S, Heat, Thermal


class Board:
    """Sensors that say what they are told to."""

    def __init__(self) -> None:
        self.heat = Heat(40.0, throttled=False)
        self.thermal = Thermal(lambda: self.heat)
        self._now = 0.0

    def at(
        self, temp_c: float | None, pause_above_c: float = 80, *, throttled: bool = False
    ) -> bool:
        self.heat = Heat(temp_c, throttled)
        self._now += LOOK_S
        self.thermal.tick(self._now, pause_above_c)
        return self.thermal.waits


def test_it_waits_above_and_goes_on_when_it_is_cooler() -> None:
    board = Board()
    assert [board.at(t) for t in (79, 80, 81, 79, 75.1, 75, 79, 81)] == [
        *(False, False, True, True, True, False, False, True),
    ]
    assert board.thermal.reason == "too hot: nothing is begun above 80 C, until 75"
    board.at(40)
    assert board.thermal.reason is None


def test_without_a_limit_or_a_sensor_it_goes_on() -> None:
    board = Board()
    assert not board.at(120, 0)
    assert board.at(120)
    assert not board.at(None)


def test_a_slow_cpu_is_told_and_is_no_reason_to_wait() -> None:
    board = Board()
    assert not board.at(70, throttled=True)
    assert "slowed down" in (board.thermal.reason or "")
    board.at(90, throttled=True)
    assert "too hot" in (board.thermal.reason or "")


def test_the_sensors_are_looked_at_now_and_then() -> None:
    board = Board()
    board.at(40)
    board.heat = Heat(120.0, throttled=True)
    board.thermal.tick(board._now + LOOK_S - 0.1, 80)
    assert board.thermal.reason is None
