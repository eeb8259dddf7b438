"""Pictures that are sent apart from their request: kept, bounded, until it is complete."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from phid.errors import Code, Failure
from phid.ledger import Key

Part = bytes | Failure
"""A part's bytes, or why they cannot be taken, which becomes its request's outcome."""

_MAX_KEYS = 256
# What a part that cannot be taken counts as: its bytes are not kept, but such parts may be many.
_FAILURE_BYTES = 1024


@dataclass(slots=True)
class _Kept:
    since: float
    parts: dict[int, Part] = field(default_factory=dict)
    size_bytes: int = 0
    on_disk: bool = False

    def put(self, n: int, part: Part) -> int:
        """Keep part n: by how many bytes this has grown."""
        grown = _size_bytes(part) - _size_bytes(self.parts.get(n, b""))
        self.parts[n] = part
        self.size_bytes += grown
        return grown


@dataclass(frozen=True, slots=True)
class _Dropped:
    """Which parts of a request there was no room for; `alone`: not even if it were the only one."""

    since: float
    parts: frozenset[int]
    alone: bool


class Parts:
    """The parts that have come, by request; those that nobody asks for are dropped in time.

    Parts may come before their request or after it, and one may come again: the last counts.
    Once their request has come they live as long as it does.
    `on_drop` is called with a request whose parts are kept on the disk, and need not be any more.
    """

    def __init__(
        self, *, limit_bytes: int, keep_s: float, on_drop: Callable[[Key], None] = lambda _: None
    ) -> None:
        self.on_drop = on_drop
        self.limit_bytes = limit_bytes
        self.keep_s = keep_s
        self.dropped = 0
        self._kept: dict[Key, _Kept] = {}
        self._awaited: set[Key] = set()
        self._roomless: dict[Key, _Dropped] = {}
        self._bytes = 0

    def put_back(self, key: Key, n: int, part: Part, now: float) -> None:
        """Keep part n of an accepted request, whatever room there is; it is on the disk, too."""
        self._put(key, n, part, now, kept=True)

    def add(self, key: Key, n: int, part: Part, now: float, *, kept: bool) -> None:
        """Keep part n of a request; `kept` on the disk, too.

        When there is no room, the client that has most loses its oldest, first those whose request
        has not come: a client that floods loses its own.
        """
        self._put(key, n, part, now, kept=kept)
        while self._bytes > self.limit_bytes or len(self._kept) > _MAX_KEYS:
            self._make_room(self._first_to_go(), now)

    def wait_on(self, key: Key) -> None:
        """Note that the request of these parts has come: it waits for the rest, then takes them."""
        self._awaited.add(key)

    def missing(self, key: Key, wanted: frozenset[int]) -> tuple[int, ...]:
        """Which of the parts have not come, in order."""
        kept = self._kept.get(key)
        return tuple(sorted(wanted - (kept.parts.keys() if kept else set())))

    def lost(self, key: Key, wanted: frozenset[int]) -> Failure | None:
        """Why a request fails, if parts of it were dropped for lack of room; None if none was."""
        dropped = self._roomless.get(key)
        if dropped is None:
            return None
        lost = [n for n in self.missing(key, wanted) if n in dropped.parts]
        if not lost:
            return None
        if dropped.alone:
            says = f"its parts have more than {self.limit_bytes} bytes together"
            return Failure(Code.TOO_LARGE, says, field="images")
        says = f"there was no room to keep these parts: {', '.join(map(str, lost))}"
        # By then the parts whose requests never come have been dropped.
        retry_after_ms = round(self.keep_s * 1000)
        return Failure(Code.BUSY, says, field="images", retry_after_ms=retry_after_ms)

    def take(self, key: Key, *, for_good: bool = True) -> dict[int, Part]:
        """All parts of a request, which are forgotten here, and on the disk if it is `for_good`."""
        self._awaited.discard(key)
        self._roomless.pop(key, None)
        return self._remove(key, for_good=for_good)

    def prune(self, now: float) -> None:
        """Drop what has waited for its request for too long."""
        late = [k for k, kept in self._kept.items() if kept.since + self.keep_s <= now]
        for key in late:
            if key not in self._awaited:
                self._drop(key)
        past = [k for k, dropped in self._roomless.items() if dropped.since + self.keep_s <= now]
        for key in past:
            if key not in self._awaited:
                del self._roomless[key]

    def _first_to_go(self) -> Key:
        held: Counter[str] = Counter()
        for (client, _), kept in self._kept.items():
            held[client] += kept.size_bytes + 1
        ((most, _),) = held.most_common(1)
        of_client = [key for key in self._kept if key[0] == most]
        return next((key for key in of_client if key not in self._awaited), of_client[0])

    def _put(self, key: Key, n: int, part: Part, now: float, *, kept: bool) -> None:
        of_request = self._kept.setdefault(key, _Kept(now))
        of_request.on_disk |= kept
        self._bytes += of_request.put(n, part)

    def _make_room(self, key: Key, now: float) -> None:
        kept, before = self._kept[key], self._roomless.pop(key, None)
        numbers = frozenset(kept.parts) | (before.parts if before else frozenset())
        self._roomless[key] = _Dropped(now, numbers, kept.size_bytes > self.limit_bytes)
        if len(self._roomless) > _MAX_KEYS:
            del self._roomless[next(iter(self._roomless))]
        self._drop(key)

    def _drop(self, key: Key) -> None:
        self.dropped += len(self._remove(key, for_good=True))

    def _remove(self, key: Key, *, for_good: bool) -> dict[int, Part]:
        kept = self._kept.pop(key, None)
        if kept is None:
            return {}
        self._bytes -= kept.size_bytes
        if for_good and kept.on_disk:
            self.on_drop(key)
        return kept.parts


def _size_bytes(part: Part) -> int:
    return len(part) if isinstance(part, bytes) else _FAILURE_BYTES
