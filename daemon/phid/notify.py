"""Word to systemd: ready, alive, stopping. A no-op where nobody listens."""

from __future__ import annotations

import os
import socket


def notify(*lines: str) -> None:
    """Send `READY=1` and its kin to $NOTIFY_SOCKET; see sd_notify(3)."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
            out.connect(address)
            out.sendall("\n".join(lines).encode())
    except OSError:
        pass  # systemd draws its own conclusions from silence


class Watchdog:
    """Tells systemd's watchdog, twice in the time it waits, that the loop calling `tick` turns.

    `due_at` is when `tick` has something to do; None where no watchdog waits for us.
    """

    def __init__(self) -> None:
        self._interval_s = _watchdog_interval_s()
        self.due_at = None if self._interval_s is None else 0.0

    def tick(self, now: float) -> None:
        """Send `WATCHDOG=1` if it is due."""
        if self._interval_s is not None and self.due_at is not None and now >= self.due_at:
            self.due_at = now + self._interval_s
            notify("WATCHDOG=1")


def _watchdog_interval_s() -> float | None:
    """How often `WATCHDOG=1` is to be sent: half of what systemd waits for; None if it does not."""
    if os.environ.get("WATCHDOG_PID") not in (None, str(os.getpid())):
        return None
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 2e6 if microseconds.isdigit() and int(microseconds) else None
