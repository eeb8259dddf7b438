"""How long an engine may be silent, by what it is doing: longer is a hang."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Literal

from phid.jobs import (
    Event,
    Failed,
    Finished,
    LoadFailed,
    Loading,
    Prefilled,
    Ready,
    Started,
    Tokens,
    Unchanged,
)

Phase = Literal["idle", "loading", "starting", "prefill", "decode"]

# In multiples of `floor_s`. Loading gigabytes is one native call; so is a picture's prefill.
_LOAD, _START, _PREFILL, _FIRST_PREFILL, _FIRST_TOKENS = 60, 6, 3, 60, 3
_PREFILL_TIMES, _DECODE_TIMES = 10, 20
_SAMPLES = 32


class Patience:
    """The engine's clock: what it does now, and when its silence is too long.

    `floor_s` is the shortest silence of a decoding engine that counts. A prefill may take ten times
    what it took so far for as many tokens, a token twenty times the median; before there is
    anything to go by, the limit is many floors.
    """

    def __init__(self, floor_s: float) -> None:
        self.phase: Phase = "idle"
        self._floor_s = floor_s
        self._gather_s = 0.0
        self._since = 0.0
        self._limit_s = 0.0
        self._left = 0
        self._told = 0
        self._token_s: deque[float] = deque(maxlen=_SAMPLES)
        self._gaps_s: deque[float] = deque(maxlen=_SAMPLES)

    def loading(self, now: float) -> None:
        """An engine was spawned."""
        self._enter("loading", now, _LOAD * self._floor_s)

    def handed(self, now: float, gather_s: float = 0.0) -> None:
        """It was given a job; it tells of tokens at most once in `gather_s`."""
        self._gather_s = gather_s
        self._enter("starting", now, _START * self._floor_s)

    def ended(self) -> None:
        """It is gone."""
        self.phase = "idle"

    def heard(self, event: Event, now: float) -> None:
        """It gave a sign of life."""
        match event:
            case Loading():
                self.loading(now)
            case Started(_, prompt_tokens, _, cached_tokens):
                self._left, self._told = prompt_tokens - cached_tokens, cached_tokens
                self._enter("prefill", now, self._prefill_s)
            case Prefilled(_, tokens) if self.phase == "prefill":
                self._computed(tokens - self._told, now)
                self._told = tokens
                self._enter("prefill", now, self._prefill_s)
            case Tokens() if self.phase == "prefill":
                self._computed(self._left, now)
                self._enter("decode", now, _FIRST_TOKENS * self._decode_floor_s)
            case Tokens() if self.phase == "decode":
                self._gaps_s.append(now - self._since)
                limit_s = _DECODE_TIMES * statistics.median(self._gaps_s)
                self._enter("decode", now, max(self._decode_floor_s, limit_s))
            case Ready() | LoadFailed() | Finished() | Failed() | Unchanged():
                self.phase = "idle"
            case _:
                pass

    def forgive(self, now: float) -> None:
        """Count its silence anew: we have not listened."""
        self._since = now

    def silence_s(self, now: float) -> float | None:
        """How long nothing came of it, if that is too long."""
        silent_s = now - self._since
        return silent_s if self.phase != "idle" and silent_s > self._limit_s else None

    def _computed(self, tokens: int, now: float) -> None:
        self._token_s.append((now - self._since) / max(tokens, 1))
        self._left -= tokens

    @property
    def _decode_floor_s(self) -> float:
        # We ask it to be silent for `gather_s`; the token that ends the silence takes time, too.
        return max(self._floor_s, 2 * self._gather_s)

    @property
    def _prefill_s(self) -> float:
        if not self._token_s:
            return _FIRST_PREFILL * self._floor_s
        return max(
            _PREFILL * self._floor_s, _PREFILL_TIMES * max(self._token_s) * max(self._left, 1)
        )

    def _enter(self, phase: Phase, now: float, limit_s: float) -> None:
        self.phase, self._since, self._limit_s = phase, now, limit_s
