"""Whether another daemon runs under our name: seen on our own status topic."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

from phid.messages import Status

_MAX_PROCESSES = 16
# What a process that has ended left on its way comes at once.
_ALIVE_AFTER_S = 10.0


@dataclass(frozen=True, slots=True)
class _Word:
    """The first that a process itself said: its session, when that was, and when we heard it."""

    session: str
    ts: int
    heard_at: float


class Rivals:
    """Watches what is said as our status for words that are not ours.

    Two daemons with one client id throw each other out for ever, and few brokers tell them why; two
    of one device id with different client ids both stay, and answer every request twice. A session
    is named `<process>-<connection>`. The last word of a process before us may come late, so one
    foreign word proves nothing; a second session of the same process does, or a later word of it
    when all it had left behind must have come. Neither does before we have heard ourselves: the
    broker may have kept any number for us, which come in front of that. `offline` is no word of the
    living: a broker says it, for each connection that one who is long dead had lost. Of two rivals
    the one with the greater name gives way, so that one is left.
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
