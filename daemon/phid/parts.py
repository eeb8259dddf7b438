"""Pictures that are sent apart from their request: kept, bounded, until it is complete."""

from __future__ import annotations

from dataclasses import dataclass, field

from phid.errors import Failure
from phid.ledger import Key

Part = bytes | Failure
"""A part's bytes, or why they cannot be taken: what is wrong with it is its request's outcome."""

_MAX_KEYS = 256


@dataclass(slots=True)
class _Kept:
    since: float
    parts: dict[int, Part] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        return sum(len(part) for part in self.parts.values() if isinstance(part, bytes))


class Parts:
    """The parts that have come, by request; those that nobody asks for are dropped in time.

    Parts may come before their request or after it, and one may come again: the last counts.
    """

    def __init__(self, *, limit_bytes: int, keep_s: float) -> None:
        self.limit_bytes = limit_bytes
        self.keep_s = keep_s
        self.dropped = 0
        self._kept: dict[Key, _Kept] = {}
        self._bytes = 0

    def add(self, key: Key, n: int, part: Part, now: float) -> None:
        """Keep part n of a request; the oldest requests' parts go when there is no room."""
        kept = self._kept.setdefault(key, _Kept(now))
        self._bytes -= kept.size_bytes
        kept.parts[n] = part
        self._bytes += kept.size_bytes
        while self._bytes > self.limit_bytes or len(self._kept) > _MAX_KEYS:
            self._drop(next(iter(self._kept)))

    def missing(self, key: Key, wanted: frozenset[int]) -> tuple[int, ...]:
        """Which of the parts have not come, in order."""
        kept = self._kept.get(key)
        return tuple(sorted(wanted - (kept.parts.keys() if kept else set())))

    def take(self, key: Key) -> dict[int, Part]:
        """All parts of a request, which are forgotten here."""
        kept = self._kept.pop(key, None)
        if kept is None:
            return {}
        self._bytes -= kept.size_bytes
        return kept.parts

    def prune(self, now: float) -> None:
        """Drop what has waited for its request for too long."""
        for key in [k for k, kept in self._kept.items() if kept.since + self.keep_s <= now]:
            self._drop(key)

    def _drop(self, key: Key) -> None:
        self.dropped += len(self.take(key))
