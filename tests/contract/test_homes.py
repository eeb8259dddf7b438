"""Each third-party library has one home: whoever else imports it breaks a rule of the design."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rig import ROOT

PACKAGE = ROOT / "daemon" / "phid"
VALUES = {
    "commands",
    "catalog",
    "decoding",
    "formats",
    "messages",
    "requests",
    "sections",
    "settings",
    "watches",
}
HOMES = {
    "paho": {"broker", "link"},
    "psutil": {"health", "memory", "sensors"},
    "onnxruntime_genai": {"native"},
    "sqlite3": {"journal", "tables"},
    "cv2": {"frames", "clips"},
    "iotcore": {"embedded"},
    "onnx": {"gguf_onnx"},
    "huggingface_hub": {"hub"},
    "httpx2": {"hub"},  # the types of its session and its errors
    "numpy": {"bandwidth", "gguf_file", "gguf_onnx", "frames", "tags", "vision"},
    "structlog": {"log"},
    "pydantic_settings": {"settings"},
    # Where the types and errors of the values' library are named.
    "pydantic": {*VALUES, "outbox", "rivals"},
    "pydantic_core": {"decoding", "formats", "messages", "requests", "watches"},
}


def third_party_imports(module: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found - (sys.stdlib_module_names - {"sqlite3"}) - {"phid", "__future__"}


@pytest.mark.parametrize("module", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_a_library_is_imported_only_in_its_home(module: Path) -> None:
    for library in third_party_imports(module):
        assert module.stem in HOMES.get(library, ()), f"{library} has no home in {module.stem}"


@pytest.mark.parametrize("program", ["engine", "trial", "runtime", "execution"])
def test_telemetry_is_off_before_the_runtime_is_imported(program: str) -> None:
    code = (
        "import os, sys\n"
        "class Look:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.partition('.')[0].startswith('onnxruntime'):\n"
        "            print(name, os.environ.get('ORT_DISABLE_TELEMETRY'))\n"
        "sys.meta_path.insert(0, Look())\n"
        f"import phid.{program}, phid.runtime\n"
    )
    environment = {n: v for n, v in os.environ.items() if n != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    said = done.stdout.splitlines()
    assert "onnxruntime_genai 1" in said
    assert {line.partition(" ")[2] for line in said} == {"1"}


@pytest.mark.parametrize("module", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_a_module_has_one_sentence_that_says_what_it_owns(module: Path) -> None:
    docstring = ast.get_docstring(ast.parse(module.read_text()))
    assert docstring
    assert docstring.partition("\n")[0].rstrip().endswith((".", ":"))
