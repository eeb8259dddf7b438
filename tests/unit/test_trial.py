"""What a trial measures."""

from __future__ import annotations

import time

from phid.trial import _decode


class Stream:
    """Loads a kernel at its third token, as a GPU does."""

    def __init__(self) -> None:
        self._steps = iter([0.0, 0.002, 0.4, *[0.002] * 8])

    def step(self) -> bytes | None:
        pause_s = next(self._steps, None)
        if pause_s is None:
            return None
        time.sleep(pause_s)
        return b"x"


def test_one_slow_token_does_not_make_a_provider_slow() -> None:
    pieces, rate = _decode(Stream(), 16)  # type: ignore[arg-type]
    assert len(pieces) == 11
    assert rate is not None
    assert rate > 100
    assert _decode(Stream(), 1)[1] is None  # type: ignore[arg-type]
