"""Whether another daemon runs under our name: seen on our own status topic."""

from __future__ import annotations

from pydantic import ValidationError

from phid.messages import Status

_MAX_PROCESSES = 16


class Rivals:
    """Watches what is said as our status for words that are not ours.

    Two daemons with one client id throw each other out for ever, and few brokers tell them why.
    A session is named `<process>-<connection>`. The last word of a process before us may come
    late, so one foreign session proves nothing; a second one of the same process does. Of two
    rivals the one with the greater name gives way, so that one is left.
    """

    def __init__(self, process: str) -> None:
        self._process = process
        self._last: dict[str, str] = {}

    def heard(self, payload: bytes) -> bool:
        """True if this status comes from a live rival that we give way to."""
        try:
            session = Status.model_validate_json(payload).session
        except ValidationError:
            return False
        process = session.rpartition("-")[0]
        if not process or process == self._process:
            return False
        if len(self._last) >= _MAX_PROCESSES:
            self._last.clear()
        return self._last.setdefault(process, session) != session and self._process > process
