"""How often each client may ask: a rate with a burst, kept as one number a client."""

from __future__ import annotations

import math

_MAX_CLIENTS = 1024


class Allowance:
    """Holds clients to `rate_per_minute`, after `burst` at once; a rate of 0 lets everyone ask.

    The generic cell rate algorithm (ITU-T I.371): a client's number is the time (monotonic seconds)
    at which it will have earned all that it took. Senders choose their names, so at most
    _MAX_CLIENTS are kept: beyond that, the one that asked longest ago is forgotten, and has a burst
    again. Binding a name to a sender is the broker's part.
    """

    def __init__(self, rate_per_minute: float, burst: int) -> None:
        self.rate_per_minute = rate_per_minute
        self.burst = burst
        self._earned_at: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._earned_at)

    def wait_ms(self, client: str, now: float) -> int | None:
        """None if this client may ask now; else in how many milliseconds it may."""
        if not self.rate_per_minute:
            return None
        wait_s = self._earns_at(client, now) - now - self.burst * self._pause_s
        return math.ceil(wait_s * 1000) if wait_s > 1e-6 else None  # sums of floats are inexact

    def take(self, client: str, now: float) -> int | None:
        """As `wait_ms`; if the client may ask, this counts as asked."""
        if not self.rate_per_minute:
            self._earned_at.clear()
            return None
        if (wait_ms := self.wait_ms(client, now)) is not None:
            return wait_ms
        earned_at = self._earns_at(client, now)
        self._earned_at.pop(client, None)
        self._earned_at[client] = earned_at  # moved to the end: the dict is in the order of asking
        if len(self._earned_at) > _MAX_CLIENTS:
            del self._earned_at[next(iter(self._earned_at))]
        return None

    @property
    def _pause_s(self) -> float:
        return 60.0 / self.rate_per_minute

    def _earns_at(self, client: str, now: float) -> float:
        """When the client will have earned one request more than it took."""
        return max(self._earned_at.get(client, now), now) + self._pause_s
