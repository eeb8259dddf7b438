"""A model that somebody brings while the service runs: when all of it is there."""

from __future__ import annotations

import math
from pathlib import Path

from phid import manifest, proven

# A folder is whole when so many looks, at least so far apart, have found nothing changed.
_LOOKS = 5
_LOOK_S = 1.5


class Newcomer:
    """A model's folder that has come, or has changed. Owner thread only.

    All of it is there if its files have the sizes that its manifest tells. Any other may still be
    copied, as one put there by hand, without a manifest: it is taken once nothing of it has changed
    for some looks. Looks are counted, not time: a service that was stopped has seen nothing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._whole = False
        self._look_at = -math.inf
        self._seen = ""
        self._unchanged = 0

    def is_whole(self, now: float) -> bool:
        """Whether all of it is there, as far as can be told by names, sizes and times.

        Looks at the files now and then, however often it is asked.
        """
        if now >= self._look_at:
            self._look_at = now + _LOOK_S
            seen = proven.fingerprint(self._folder)
            self._unchanged = self._unchanged + 1 if seen and seen == self._seen else 0
            self._seen = seen
            self._whole = self._unchanged >= _LOOKS or _is_as_told(self._folder)
        return self._whole


def _is_as_told(folder: Path) -> bool:
    """Whether its files have the sizes that its manifest tells."""
    try:
        made = manifest.read(folder)
        told = made.files.items() if made is not None else ()
        sizes = [(folder / name).stat().st_size == kept.bytes for name, kept in told]
    except (manifest.Newer, manifest.Damaged, OSError):
        return False
    return bool(sizes) and all(sizes)
