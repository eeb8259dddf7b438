"""The models on this machine: folders that the runtime can load."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A folder with a genai_config.json; `context` in tokens, `size_bytes` of all its files."""

    name: str
    path: Path
    type: str
    context: int
    size_bytes: int


def models(models_dir: Path) -> list[StoredModel]:
    """What is in the models folder, by name; folders that are no models are passed over."""
    if not models_dir.is_dir():
        return []
    found = [read(path) for path in sorted(models_dir.iterdir()) if not path.name.startswith(".")]
    return [model for model in found if model is not None]


def read(path: Path) -> StoredModel | None:
    """The model in a folder; None if there is none that can be read."""
    try:
        config: dict[str, Any] = json.loads((path / "genai_config.json").read_text("utf-8"))
        model = config["model"]
        size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        return StoredModel(path.name, path, str(model["type"]), int(model["context_length"]), size)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def resolve(wanted: str, models_dir: Path) -> tuple[str, Path] | None:
    """The name and folder of the model to run; the folder need not be there.

    `wanted` is a name in the models folder, or a path; empty means the only model there, and
    None comes back when there is not exactly one.
    """
    if not wanted:
        present = models(models_dir)
        return (present[0].name, present[0].path) if len(present) == 1 else None
    path = Path(wanted).expanduser()
    if path.is_absolute() or len(path.parts) > 1:
        return path.name, path
    return wanted, models_dir / wanted
