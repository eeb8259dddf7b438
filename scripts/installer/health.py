"""Whether the daemon that was started is well: what systemd and what the broker says of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from installer import units
from installer.acts import answer
from installer.layout import Layout

# A state that does not change for so long is not one that is passed through.
_SETTLED_S = 15.0
_PAUSE_S = 0.5
_CRASHES = 3
_STATUSES = {
    "75": "another client has connected with its MQTT client id",
    "78": "the settings cannot be used",
}


@dataclass(frozen=True, slots=True)
class Seen:
    """One look: systemd's word on the unit, the daemon's own on out/status, if it came."""

    active: str
    restarts: int
    exit_status: str
    state: str | None = None
    version: str | None = None
    reason: str | None = None

    @property
    def online(self) -> bool:
        """True for a daemon that takes requests."""
        return self.active == "active" and self.state == "online"

    @property
    def says(self) -> str:
        """What to tell of it."""
        if self.active == "failed":
            why = _STATUSES.get(self.exit_status, f"status {self.exit_status}")
            return f"{units.UNIT} has failed: {why}"
        if self.active != "active":
            return f"{units.UNIT} is {self.active}, started again {self.restarts} times"
        if self.state is None:
            return "it runs, and no broker has heard of it"
        return f"it is {self.state}" + (f": {self.reason}" if self.reason else "")


def look(layout: Layout, device: str) -> Seen:
    """What is to be seen of the daemon now; waits for the broker, some seconds at most."""
    told = units.properties("ActiveState", "NRestarts", "ExecMainStatus")
    seen = Seen(
        told.get("ActiveState", "unknown"),
        int(told.get("NRestarts") or 0),
        told.get("ExecMainStatus", ""),
    )
    row = _row(layout, device)
    return Seen(
        seen.active, seen.restarts, seen.exit_status,
        row.get("state"), row.get("version"), row.get("reason"),
    )  # fmt: skip


def wait(
    see: Callable[[], Seen],
    limit_s: float,
    *,
    wanted_online: bool,
    version: str | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[bool, Seen]:
    """Whether the daemon becomes well within the limit, and how it was last seen.

    Not `wanted_online`: it was not before either, for want of a broker or a model; then it is
    enough that it stays up. With a `version` no other one's word counts as its own.
    """
    began = since = clock()
    first = last = see()
    while True:
        if last.online and version in (None, last.version):
            return True, last
        if last.active == "failed" or last.restarts - first.restarts >= _CRASHES:
            return False, last
        now = clock()
        stays = last.active == "active" and now - since >= _SETTLED_S
        if stays and last.state not in ("loading", "offline"):
            if not wanted_online:
                return True, last
            if last.state is not None:  # degraded or paused: what mends it is not to wait
                return False, last
        if now - began >= limit_s:
            return not wanted_online and last.active == "active", last
        sleep(_PAUSE_S)
        seen = see()
        if (seen.active, seen.state, seen.restarts) != (last.active, last.state, last.restarts):
            since = clock()
        last = seen


def findings(layout: Layout, phid: Path) -> dict[str, Any]:
    """This doctor's, as JSON; nothing where it does not say."""
    _, out, _ = answer(phid, "doctor", "--json", "--config", layout.config, env=secrets(layout))
    try:
        content = json.loads(out)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def secrets(layout: Layout) -> dict[str, str]:
    """The environment in which a command of root finds what the unit is given."""
    return {
        "CREDENTIALS_DIRECTORY": str(layout.credentials),
        "STATE_DIRECTORY": str(layout.state),
    }


def _row(layout: Layout, device: str) -> dict[str, Any]:
    status, out, _ = answer(
        layout.phid, "fleet", "--once", "--json", "--wait", "0.7", "--config", layout.config,
        env=secrets(layout),
    )  # fmt: skip
    if status:
        return {}
    rows = json.loads(out)
    return next((row for row in rows if row["device"] == device), {})
