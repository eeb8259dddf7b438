"""How often each client may ask: a rate with a burst, kept as one number a client."""

from __future__ import annotations

import math

_MAX_CLIENTS = 1024


class Allowance:
    """Holds clients to `rate_per_minute`, after `burst` at once; a rate of 0 lets everyone ask.

    The generic cell rate algorithm (ITU-T I.371): a client's number is when it will have earned
    all that it took, monotonic seconds. Names are the senders' to choose, so there are never more
    than so many: beyond that, the one that asked longest ago is forgotten and has a burst again.
    To bind a name to a sender is the broker's part.
    """

    def __init__(self, rate_per_minute: float, burst: int) -> None:
        self.rate_per_minute = rate_per_minute
        self.burst = burst
        self._earned_at: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._earned_at)

    def take(self, client: str, now: float) -> int | None:
        """None if this client may ask now, and has; else in how many milliseconds it may."""
        if not self.rate_per_minute:
            self._earned_at.clear()
            return None
        pause_s = 60.0 / self.rate_per_minute
        earned_at = max(self._earned_at.get(client, now), now) + pause_s
        wait_s = earned_at - now - self.burst * pause_s
        if wait_s > 1e-6:  # sums of fractions are a little off
            return math.ceil(wait_s * 1000)
        self._earned_at.pop(client, None)
        self._earned_at[client] = earned_at  # the last in the order of asking
        if len(self._earned_at) > _MAX_CLIENTS:
            del self._earned_at[next(iter(self._earned_at))]
        return None
