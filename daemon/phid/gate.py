"""Which pictures an engine has answered last: what looks the same need not be asked about again."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from phid import frames

if TYPE_CHECKING:
    from phid.jobs import Gate, Image

# A kilobyte each.
_MOST_KEYS = 2048


class ChangeGate:
    """A small picture of the last frame answered under each key."""

    def __init__(self) -> None:
        self._answered: OrderedDict[str, frames.Picture] = OrderedDict()
        self._shown: tuple[str, frames.Picture] | None = None

    def change_pct(self, gate: Gate, image: Image) -> float | None:
        """How much a picture differs from the last one answered; None if there was none.

        Raises Refused for a picture that is broken.
        """
        small = frames.thumbnail(frames.decode(image.data))
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
