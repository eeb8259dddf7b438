"""What an interrupted pull leaves for the next: which files are whole, and hashes as they grow."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from phid import manifest
from phid.manifest import Kept

NAME = "pull.json"


class Digest:
    """The hashes of a file as it grows: SHA-256, and git's, which begins with the length."""

    def __init__(self, whole_bytes: int) -> None:
        self.restart(whole_bytes)

    def restart(self, whole_bytes: int) -> None:
        """Begin with an empty file."""
        self.size = 0
        self.sha256 = hashlib.sha256()
        # Not for safety: it is how git names a file's content.
        self._blob = hashlib.sha1(b"blob %d\0" % whole_bytes, usedforsecurity=False)

    def take(self, piece: bytes) -> None:
        """Go on with these bytes."""
        self.size += len(piece)
        self.sha256.update(piece)
        self._blob.update(piece)

    def take_all(self, file: BinaryIO) -> None:
        """Go on with all that is left of an open file."""
        while piece := file.read(1 << 20):
            self.take(piece)

    def faults(self, sha256: tuple[str | None, ...], blob: str | None) -> str:
        """Which hash is wrong, in words; "" if none is. A hash that is None is not known."""
        found = self.sha256.hexdigest(), self._blob.hexdigest()
        for wanted, is_ in (*((one, found[0]) for one in sha256), (blob, found[1])):
            if wanted is not None and wanted != is_:
                return f"its hash is {is_}, not {wanted}"
        return ""


@dataclass(slots=True)
class Unfinished:
    """What an interrupted pull left, beside its files: those that are whole, the others' ETags."""

    path: Path
    commit: str
    done: dict[str, Kept] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, work: Path, commit: str) -> Unfinished:
        """Read it; what belongs to another commit, or cannot be read, is thrown away."""
        state = cls(work / NAME, commit)
        try:
            content: dict[str, Any] = json.loads(state.path.read_text("utf-8"))
            if content["schema"] == manifest.SCHEMA and content["commit"] == commit:
                done = {name: Kept(*entry) for name, entry in content["done"].items()}
                whole = {n: k for n, k in done.items() if size(work / n) == k.bytes}
                state.done, state.etags = whole, dict(content["etags"])
                return state
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            pass
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        state.write()
        return state

    def write(self) -> None:
        """Put it beside the files, in one step."""
        done = {name: [kept.bytes, kept.sha256] for name, kept in self.done.items()}
        content = {
            "schema": manifest.SCHEMA,
            "commit": self.commit,
            "done": done,
            "etags": self.etags,
        }
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps(content), encoding="utf-8")
        fresh.rename(self.path)


def size(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
