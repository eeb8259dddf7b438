"""Whether another daemon runs under our name: seen on our own status topic."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

from phid.messages import Status

_MAX_PROCESSES = 16
# All that an ended process left on its way has come within this time.
_ALIVE_AFTER_S = 10.0


@dataclass(frozen=True, slots=True)
class _Word:
    """The first that a process itself said: its session, when that was, and when we heard it."""

    session: str
    ts: int
    heard_at: float


class Rivals:
    """Watches our status topic for words of another process.

    Two daemons with one client id throw each other out for ever, and few brokers tell them why; two
    of one device id with different client ids both stay, and answer every request twice. A session
    is named `<process>-<connection>`. One foreign word proves nothing: a process before us may have
    said it. A second session of that process proves that it lives, or a later word of it when all
    that it left behind must have come. Nothing counts before we have heard ourselves: the broker
    may have kept any number of words for us, and sends them first. `offline` never counts: the
    broker says it for each connection that a process lost, even one long dead. Of two rivals the
    one with the greater name gives way, so that one is left.
    """

    def __init__(self, process: str) -> None:
        self._process = process
        self._first: dict[str, _Word] = {}
        self._heard_ourselves = False

    def heard(self, payload: bytes, now: float) -> bool:
        """True if this status, heard at `now` (monotonic), is of a rival that we give way to."""
        try:
            status = Status.model_validate_json(payload)
        except ValidationError:
            return False
        process = status.session.rpartition("-")[0]
        if not process or status.state == "offline":
            return False
        if process == self._process:
            self._heard_ourselves = True
            return False
        if len(self._first) >= _MAX_PROCESSES:
            self._first.clear()
        first = self._first.setdefault(process, _Word(status.session, status.ts, now))
        lives = status.ts > first.ts and now - first.heard_at >= _ALIVE_AFTER_S
        spoke_again = lives or status.session != first.session
        return spoke_again and self._heard_ourselves and self._process > process
