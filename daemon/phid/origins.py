"""phid config: the settings as they are in force, where each comes from, and what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phid import credentials
from phid import settings as settings_module
from phid.catalog import Build
from phid.settings import Settings
from phid.watches import Watch

_MASK = "********"


@dataclass(frozen=True, slots=True)
class Origin:
    """A setting in force and its source; `value` is masked where it is a secret."""

    name: str
    value: Any
    source: str


def of(settings: Settings, path: Path | None, command_line: Iterable[str]) -> list[Origin]:
    """Every setting with its source: default, file PATH, environment NAME or command line.

    `command_line` names the settings that it has put over the others.
    """
    file = settings_module.source(path)
    in_file = set(_dotted(settings_module.read_file(path)))
    in_environment = settings_module.environment()
    on_command_line = set(command_line)
    found = []
    for name in settings_module.names():
        value = settings_module.get(settings, name)
        if name in on_command_line:
            source = "command line"
        elif name in in_environment:
            source = f"environment {in_environment[name]}"
        elif name in in_file:
            source = f"file {file}"
        else:
            source = "default"
            value, source = _from_directory(settings, name, value, source)
        found.append(Origin(name, _shown(name, value), source))
    return found


def as_toml(origins: list[Origin]) -> str:
    """The settings as TOML: a line each, with its source in a comment."""
    lines = []
    for origin in origins:
        value = "" if origin.value is None else _toml(origin.value)
        # Commented out: no value (TOML has no null), or a file that was found and not set.
        mark = "#" if origin.value is None or origin.source.startswith("credentials") else ""
        lines.append((f"{mark}{origin.name} = {value}".rstrip(), origin.source))
    width = max(len(line) for line, _ in lines if len(line) < 60)
    return "\n".join(f"{line.ljust(width)}  # {source}" for line, source in lines)


def as_json(origins: list[Origin]) -> str:
    """One JSON object: value and source of each setting, by its name."""
    whole = {o.name: {"value": o.value, "from": o.source} for o in origins}
    return json.dumps(whole, ensure_ascii=False)


def _from_directory(settings: Settings, name: str, value: Any, source: str) -> tuple[Any, str]:
    section, _, key = name.partition(".")
    if section == "mqtt" and key in credentials.NAMES:
        path = credentials.find(settings.mqtt, key)
        if path is not None:
            return path, "credentials directory"
    return value, source


def _shown(name: str, value: Any) -> Any:
    if value is not None and name.endswith(("password", "secret", "token")):
        return _MASK
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [
            item.model_dump(mode="json", exclude_defaults=True)
            if isinstance(item, Watch | Build)
            else item
            for item in value
        ]
    return value


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _dotted(content: dict[str, Any]) -> Iterable[str]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from (f"{name}.{key}" for key in value)
        else:
            yield name
