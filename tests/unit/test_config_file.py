"""config/phid.toml and the model of settings say the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from phid import operations, settings
from rig import ROOT

FILE = ROOT / "config" / "phid.toml"
# Their defaults are made from the machine, or absent: the file shows an example.
EXAMPLES = {
    *("device", "models_dir", "state_dir"),
    *("mqtt.client_id", "mqtt.username", "mqtt.password_file", "mqtt.ca_file"),
    *("mqtt.cert_file", "mqtt.key_file", "mqtt.credentials_dir"),
}


def uncommented() -> dict[str, Any]:
    text = re.sub(r"^#(?=\w+ = )", "", FILE.read_text(), flags=re.MULTILINE)
    found: dict[str, Any] = {}
    for name, value in tomllib.loads(text).items():
        if isinstance(value, dict):
            found |= {f"{name}.{key}": item for key, item in value.items()}
        else:
            found[name] = value
    return found


def test_every_key_is_in_the_file_and_no_other() -> None:
    assert list(uncommented()) == list(settings.names())


@pytest.mark.parametrize("name", sorted(set(settings.names()) - EXAMPLES))
def test_the_file_shows_the_default(name: str) -> None:
    default = settings.names()[name].default
    shown = uncommented()[name]
    assert (tuple(shown) if isinstance(shown, list) else shown) == default


@pytest.mark.parametrize("name", sorted(settings.names()))
def test_the_file_gives_the_description(name: str) -> None:
    text = " ".join(FILE.read_text().replace("\n# ", " ").split())
    assert settings.names()[name].description in text


def test_the_head_names_what_a_reload_takes_over() -> None:
    head = " ".join(FILE.read_text().partition("\n\n")[0].replace("\n# ", " ").split())
    said = re.search(r" takes over (.*); the rest needs a restart", head)
    assert said is not None
    text, exceptions = said[1], re.findall(r" but for ([\w.]+)", said[1])
    named = re.findall(r"[\w.]+", re.sub(r" but for [\w.]+| and", " ", text))
    told = {
        name
        for name in settings.names()
        if name not in exceptions and (name in named or name.partition(".")[0] in named)
    }
    assert told == {name for name in settings.names() if operations.is_live(name)}
    assert set(exceptions) <= set(settings.names())


def test_the_file_as_shipped_changes_nothing(tmp_path: Path) -> None:
    empty = tmp_path / "empty.toml"
    empty.touch()
    assert settings.load(FILE) == settings.load(empty)


def test_the_file_with_every_key_uncommented_is_taken(tmp_path: Path) -> None:
    text = re.sub(r"^#(?=\w+ = )", "", FILE.read_text(), flags=re.MULTILINE)
    full = tmp_path / "full.toml"
    full.write_text(text)
    assert settings.load(full).device == "porch"
