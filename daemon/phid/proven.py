"""What was proven before: evidence by what it depends on, in a file of the state directory."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from phid import devices, log, packages, statefile
from phid.jobs import Load
from phid.proofs import Evidence, Stage, Wanted

FILE = "providers.json"
_SCHEMA = 1
_MOST = 64
# How long a failure is believed: a library may have come meanwhile, or a cable.
_REFUSAL_S = 86_400.0
_log = log.get("proven")


def fingerprint(folder: Path) -> str:
    """A model's identity by its configuration, and by the names, sizes and times of its files.

    So no gigabytes are read at each start. Empty for a folder that cannot be read.
    """
    digest = hashlib.sha256()
    try:
        digest.update((folder / "genai_config.json").read_bytes())
        for path in sorted(folder.rglob("*")):
            stat = path.stat()
            if path.is_file():
                line = f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n"
                digest.update(line.encode("utf-8", "surrogateescape"))
    except OSError:
        return ""
    return digest.hexdigest()


class Surroundings:
    """What evidence depends on beside its provider: the model, the packages, the drivers."""

    def __init__(self, load: Load, versions: Mapping[str, str], driver: str) -> None:
        self._of_small = [_SCHEMA, dict(sorted(versions.items())), driver, load.threads]
        self._of_model = [fingerprint(Path(load.path))]

    @classmethod
    def of(cls, load: Load) -> Self:
        """Those of this machine, now."""
        return cls(load, packages.versions(), devices.driver())

    def key(self, provider: str, stage: Stage, wanted: Wanted) -> str:
        """The key of a trial's evidence."""
        whole = [*self._of_small, provider, stage, sorted(wanted.options_of(provider))]
        if stage == "check":
            whole += self._of_model
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()


class Recall:
    """What the file knows of a model's trials; it is read at the first question."""

    def __init__(self, load: Load, wanted: Wanted) -> None:
        self._load = load
        self._wanted = wanted
        self._read: tuple[Proven, Surroundings] | None = None

    def __call__(self, provider: str, stage: Stage) -> Evidence | None:
        """The evidence of a trial, if it still holds."""
        if self._read is None:
            self._read = Proven(self._wanted.memory), Surroundings.of(self._load)
        known, around = self._read
        return known.find(around.key(provider, stage, self._wanted))


class Proven:
    """The evidence in the file, read once; `keep` writes it. A damaged file counts as empty."""

    def __init__(self, path: Path | None, clock: float | None = None) -> None:
        self._path = path
        self._now = time.time() if clock is None else clock
        self._entries = self._read()

    def find(self, key: str, *, refusals: bool = True) -> Evidence | None:
        """The evidence under a key, if a choice rests on it or it is less than a day old.

        Without `refusals` only if a choice rests on it.
        """
        entry = self._entries.get(key)
        if entry is None:
            return None
        rests = entry.get("passed") is True or (refusals and self._is_fresh(entry))
        return _evidence(entry.get("evidence")) if rests else None

    def keep(self, key: str, provider: str, evidence: Evidence) -> None:
        """Put it under its key, in place of what was there, and on the disk if that takes it."""
        content = asdict(evidence) | {"pieces": [piece.hex() for piece in evidence.pieces]}
        self._entries = self._read()  # another model's prover may have written meanwhile
        self._entries.pop(key, None)
        self._entries[key] = {"provider": provider, "at": self._now, "evidence": content}
        while len(self._entries) > _MOST:
            del self._entries[next(iter(self._entries))]
        self._write()

    def confirm(self, keys: Iterable[str]) -> None:
        """Hold this evidence until what it depends on changes, for a choice rests on it."""
        new = [e for key in keys if (e := self._entries.get(key)) and not e.get("passed")]
        for entry in new:
            entry["passed"] = True
        if new:
            self._write()

    def _is_fresh(self, entry: Mapping[str, Any]) -> bool:
        at = entry.get("at")
        return isinstance(at, int | float) and 0 <= self._now - at < _REFUSAL_S

    def _read(self) -> dict[str, dict[str, Any]]:
        if self._path is None:
            return getattr(self, "_entries", {})
        entries = statefile.read(self._path, _SCHEMA).get("entries")
        if not isinstance(entries, dict):
            return {}
        return {key: entry for key, entry in entries.items() if isinstance(entry, dict)}

    def _write(self) -> None:
        if self._path is None:
            return
        try:
            statefile.write(self._path, _SCHEMA, {"entries": self._entries})
        except OSError as error:
            _log.warning("proof_not_kept", path=str(self._path), reason=str(error))


def _evidence(content: Any) -> Evidence | None:
    try:
        pieces = tuple(bytes.fromhex(piece) for piece in content["pieces"])
        placement = {str(name): float(pct) for name, pct in content["placement"].items()}
        return Evidence(**{**content, "pieces": pieces, "placement": placement})
    except (LookupError, TypeError, ValueError, AttributeError):
        return None
