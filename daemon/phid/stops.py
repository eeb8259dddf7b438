"""Stop strings in a stream of text: what may be shown, what is held back, where the answer ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class StopFilter:
    """Passes text on up to the first stop string, wherever the pieces are cut.

    The first is the one that is complete first; of two that end together, the longer. So the
    result does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._heads = frozenset(stop[0] for stop in self._stops)
        self._reach = max(map(len, self._stops), default=1) - 1
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Return the text that may be shown now, and whether a stop string is complete.

        Once it is, what follows it is dropped and nothing is held back any more.
        """
        if not self._stops:
            return text, False
        seen = self._held + text
        found = min(
            ((at + len(stop), at) for stop in self._stops if (at := seen.find(stop)) >= 0),
            default=None,
        )
        if found is not None:
            self._held = ""
            return seen[: found[1]], True
        cut = self._first_open(seen)
        self._held = seen[cut:]
        return seen[:cut], False

    def flush(self) -> str:
        """Return the text held back, which turned out to be no stop string."""
        held, self._held = self._held, ""
        return held

    def _first_open(self, seen: str) -> int:
        for at in range(max(0, len(seen) - self._reach), len(seen)):
            if seen[at] in self._heads:
                rest = seen[at:]
                if any(stop.startswith(rest) for stop in self._stops):
                    return at
        return len(seen)
