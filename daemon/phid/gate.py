"""Remembers the pictures an engine answered last: one that looks the same is not run again."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from phid import frames, images, memory

if TYPE_CHECKING:
    from phid.jobs import Gate, Image

# A kilobyte each.
_MOST_KEYS = 2048


class ChangeGate:
    """A small picture of the last frame answered under each key.

    `memory_bytes` is the most that the process may take in all; 0: what there is.
    """

    def __init__(self, memory_bytes: int = 0) -> None:
        self._memory_bytes = memory_bytes
        self._answered: OrderedDict[str, frames.Picture] = OrderedDict()
        self._shown: tuple[str, frames.Picture] | None = None

    def change_pct(self, gate: Gate, image: Image) -> float | None:
        """How much a picture differs from the last one answered; None if there was none.

        Raises Refused for a picture that is broken, or takes more memory than there is.
        """
        facts = images.inspect(image.data)
        needed = images.decoding_bytes(facts, frames.thumbnail_shrink(facts)) + len(image.data)
        memory.check(needed, self._memory_bytes)
        small = frames.thumbnail(image.data, facts)
        self._shown = gate.key, small
        last = self._answered.get(gate.key)
        return None if last is None else frames.difference_pct(last, small)

    def answered(self) -> None:
        """Remember the picture shown last: later ones are held against it."""
        if self._shown is not None:
            key, small = self._shown
            self._answered[key] = small
            self._answered.move_to_end(key)
            while len(self._answered) > _MOST_KEYS:
                self._answered.popitem(last=False)
