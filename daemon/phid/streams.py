"""The text of a running answer: gathered in full, and cut into deltas at a bounded rate."""

from __future__ import annotations

from phid.messages import Delta


class DeltaStream:
    """Turns tokens into deltas: the first at once, the others at least `interval_s` apart.

    When deltas cannot be sent they are not queued: the text waits and goes out as one larger
    delta later. Once one may have been lost the stream is muted, for whatever came after it
    would break the promise that joined deltas are a prefix of the answer.
    """

    def __init__(self, request_id: str, *, wanted: bool, interval_s: float) -> None:
        self._id = request_id
        self._interval_s = interval_s
        self._wanted = wanted
        self._pending: list[str] = []
        self._pieces: list[str] = []
        self._next_at = float("-inf")
        self.published = 0
        self.dropped = 0

    @property
    def text(self) -> str:
        """The whole answer so far."""
        return "".join(self._pieces)

    @property
    def due_at(self) -> float | None:
        """When there is a delta to send; None while there is no text for one."""
        return self._next_at if self._pending else None

    def add(self, text: str) -> None:
        """Append what a token brought."""
        if text:
            self._pieces.append(text)
            if self._wanted:
                self._pending.append(text)

    def due(self, now: float, *, last: bool = False) -> Delta | None:
        """The delta that is due, if one is; `sent` says that it was published.

        The last one of an answer does not wait for its time.
        """
        if not self._pending or (now < self._next_at and not last):
            return None
        return Delta(id=self._id, seq=self.published, text="".join(self._pending))

    def sent(self, now: float) -> None:
        """The delta that was due is published: go on after it."""
        self._pending.clear()
        self._next_at = now + self._interval_s
        self.published += 1

    def mute(self) -> None:
        """Send no more deltas: the connection they went to is lost."""
        if self.published:
            self.stop()

    def stop(self) -> None:
        """Send no more deltas, whatever has been sent."""
        self.end()
        self._wanted = False

    def end(self) -> None:
        """No delta follows: what is pending is in the outcome's text."""
        if self._pending:
            self.dropped += 1
            self._pending.clear()
