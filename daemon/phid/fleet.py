"""phid fleet: every device's status, info and health, gathered after a discover."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from phid import amounts, exits, messages
from phid.client import Client
from phid.sections import Mqtt
from phid.settings import Settings
from phid.topics import Topics
from phid.traffic import Inbound

_OUTS = ("status", "info", "health")
_CELL_CHARS = 160
_LAST_SECOND = 2**40


def add_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    parents: list[argparse.ArgumentParser],
) -> None:
    """Give the command line `phid fleet`."""
    fleets = commands.add_parser(
        "fleet",
        parents=parents,
        help="show the devices, their state and their numbers",
        description="Ask every device under mqtt.base for its status, info and health, and show "
        "them as a table, again and again until Ctrl-C, which is no failure (status 0).",
    )
    fleets.add_argument("--once", action="store_true", help="look once and exit")
    fleets.add_argument("--json", action="store_true", help="as a JSON array")
    fleets.add_argument(
        "--wait",
        type=amounts.time_s,
        default=3.0,
        metavar="S",
        help="gather for so long (default 3)",
    )
    fleets.add_argument(
        "--every",
        type=amounts.number,
        default=5.0,
        metavar="S",
        help="look again after (default 5)",
    )
    fleets.set_defaults(command=_run)


@dataclass(slots=True)
class Seen:
    """What one device has said."""

    device: str
    status: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    health: dict[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """What an operator wants in one line; what was published may have any form."""
        model = self.info.get("model")
        loaded = model.get("model") if isinstance(model, dict) else None
        age_s = 0.0
        told_at = self.status.get("ts")
        if isinstance(told_at, int | float) and abs(told_at) < _LAST_SECOND:
            age_s = time.time() - told_at
        return {
            "device": self.device,
            "state": self.status.get("state", "unknown"),
            "reason": self.status.get("reason"),
            "model": self.status.get("model") or loaded,
            "provider": self.status.get("provider"),
            "queue": self.health.get("queue_depth", self.status.get("queue")),
            "tokens_per_s": self.health.get("tokens_per_s_p50"),
            "temp_c": self.health.get("temp_c"),
            "seen_s_ago": max(0, round(age_s)),
            "version": self.status.get("version"),
        }


class Fleet:
    """Gathers what devices publish; knows only what it was told."""

    def __init__(self, base: str) -> None:
        self._base = base
        self._devices: dict[str, Seen] = {}

    @property
    def filters(self) -> tuple[str, ...]:
        """What to subscribe to."""
        return tuple(f"{self._base}/+/out/{out}" for out in _OUTS)

    def take(self, inbound: Inbound) -> None:
        """Remember what a device said; anything but a JSON object of ours is passed over."""
        levels = inbound.topic.removeprefix(f"{self._base}/").split("/")
        if len(levels) != 3 or levels[1] != "out" or levels[2] not in _OUTS:
            return
        try:
            content = messages.decode_report(inbound.payload)
        except ValueError:
            return
        seen = self._devices.setdefault(levels[0], Seen(levels[0]))
        if levels[2] == "status" and self._is_stale(seen.status, content):
            return
        setattr(seen, levels[2], content)

    @staticmethod
    def _is_stale(known: dict[str, Any], told: dict[str, Any]) -> bool:
        """True for the last will of a connection, if a later one has been heard of."""
        return (
            told.get("reason") == "lwt"
            and known.get("state") not in (None, "offline")
            and known.get("session") != told.get("session")
        )

    def devices(self) -> list[Seen]:
        """All that were heard of, by name."""
        return [self._devices[name] for name in sorted(self._devices)]


def look(mqtt: Mqtt, *, wait_s: float, connect_s: float = 5.0) -> Fleet:
    """The fleet as it answers a discover within `wait_s`. Raises client.Unreachable."""
    fleet = Fleet(mqtt.base)
    with Client(mqtt, fleet.filters) as client:
        client.connect(connect_s)
        client.publish(Topics(mqtt.base, "phid").discover, b"{}")
        late = time.monotonic() + wait_s
        while (inbound := client.receive(late)) is not None:
            fleet.take(inbound)
    return fleet


def table(fleet: Fleet) -> str:
    """The fleet as aligned text, a line a device."""
    columns = ("device", "state", "model", "provider", "queue", "tokens_per_s", "temp_c")
    rows = [[*(column for column in columns), "reason"]]
    rows += [
        [*(_cell(row[column]) for column in columns), _cell(row["reason"] or "")]
        for row in (seen.row() for seen in fleet.devices())
    ]
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _run(settings: Settings, options: argparse.Namespace) -> int:
    if options.once:
        return exits.OK if _show(settings, options) else exits.NO_ANSWER
    try:
        while True:
            _show(settings, options)
            sys.stdout.flush()
            time.sleep(options.every)
    except KeyboardInterrupt:
        print(file=sys.stderr)  # behind the terminal's ^C
        return exits.OK


def _show(settings: Settings, options: argparse.Namespace) -> bool:
    """Look once and print: whether anyone is there."""
    seen = look(settings.mqtt, wait_s=options.wait)
    if options.json:
        print(json.dumps([device.row() for device in seen.devices()]))
    elif seen.devices():
        print(table(seen))
    else:
        print(f"no device answered under {settings.mqtt.base}", file=sys.stderr)
    return bool(seen.devices())


def _cell(value: Any) -> str:
    """A value as a cell; characters that move the cursor or break the line become U+FFFD."""
    text = "-" if value is None else str(value)[:_CELL_CHARS]
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
