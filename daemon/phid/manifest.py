"""A model's manifest.json: what its files were when it was put here, and where they came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAME = "manifest.json"
SCHEMA = 1
"""The version of the file; one of a later version is refused, never guessed at."""

_PIECE_BYTES = 1 << 20


class Newer(Exception):  # noqa: N818 - it is an answer
    """The manifest is of a later phid; the message says so, and how to mend it."""


class Damaged(Exception):  # noqa: N818 - as Newer
    """The manifest cannot be read; the message says why."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A file as it was when it was put here."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is known of a model's folder; `source` says where it came from, pulled or imported."""

    files: dict[str, Kept]
    source: dict[str, Any] = field(default_factory=dict)
    license: str = "unknown"
    kept_at: str = ""

    def text(self) -> str:
        """As it stands in the file."""
        content = {
            "schema": SCHEMA,
            "license": self.license,
            "source": self.source,
            "kept_at": self.kept_at,
            "files": {
                name: {"bytes": kept.bytes, "sha256": kept.sha256}
                for name, kept in sorted(self.files.items())
            },
        }
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def read(folder: Path, name: str = NAME) -> Manifest | None:
    """The manifest in a model's folder; None where there is none. Raises Newer or Damaged."""
    path = folder / name
    try:
        content = json.loads(path.read_text("utf-8"))
        schema = content.get("schema", 1)  # the first manifests named no schema
        known = isinstance(schema, int) and not isinstance(schema, bool) and schema <= SCHEMA
        if not known:
            raise Newer(
                f"{path} is of schema {schema!r}, and this phid reads {SCHEMA}: use the newer phid"
                " that wrote it, or remove the model and pull it again"
            )
        files = {
            str(name): Kept(int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in content["files"].items()
        }
        return Manifest(
            files,
            dict(content.get("source") or {}),
            str(content.get("license", "unknown")),
            str(content.get("kept_at", "")),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise Damaged(f"{path} cannot be read ({type(error).__name__}: {error})") from None


def hash_file(path: Path, report: Callable[[int], None] = lambda _bytes: None) -> str:
    """The SHA-256 of a file; `report` gets the size of each piece that was read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
            report(len(piece))
    return digest.hexdigest()


def differences(
    folder: Path, manifest: Manifest, report: Callable[[int], None] = lambda _bytes: None
) -> list[str]:
    """In words, each file that is not what it was; reads all of them."""
    found = []
    for name, kept in sorted(manifest.files.items()):
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif (size := path.stat().st_size) != kept.bytes:
            found.append(f"{name} has {size} bytes and had {kept.bytes}")
        elif (sha256 := hash_file(path, report)) != kept.sha256:
            found.append(f"{name} has changed: its sha256 is {sha256}, and was {kept.sha256}")
    return found
