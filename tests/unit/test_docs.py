"""What the documents say of the code is what the code says."""

from __future__ import annotations

import json
import re
from pathlib import Path

from phid.control import VERBS
from phid.errors import Code
from phid.health import KEYS
from phid.messages import Request
from rig import ROOT


def table(path: Path, marker: str) -> list[list[str]]:
    """The rows of the table between a marker and its end."""
    text = path.read_text()
    part = text[text.index(f"<!-- {marker}") :].partition("<!-- end -->")[0]
    rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("|").strip() for cell in row] for row in rows[2:]]


def test_the_readme_lists_every_field_of_a_request() -> None:
    expected = []
    for name, field in Request.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if hasattr(default, "model_dump"):
            default = default.model_dump()
        shown = "" if default is None else f"`{json.dumps(default)}`"
        expected.append([f"`{name}`", shown, field.description])
    assert table(ROOT / "README.md", "request fields") == expected


def test_the_architecture_lists_every_health_key() -> None:
    rows = table(ROOT / "daemon" / "ARCHITECTURE.md", "health keys")
    assert rows == [[f"`{key}`", meaning] for key, meaning in KEYS.items()]


def test_the_readme_lists_every_code_and_verb() -> None:
    text = (ROOT / "README.md").read_text()
    for code in Code:
        assert f"`{code}` {code.status}" in text
    assert re.search(" ".join(VERBS), text)
