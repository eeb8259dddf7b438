"""Log lines: what journald is told of their weight, and what a terminal is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from rig import ROOT

SAY = """
from phid import log
log.configure("debug")
lines = log.get("part")
lines.debug("d"); lines.info("i"); lines.warning("w"); lines.error("e")
try:
    raise ValueError
except ValueError:
    lines.exception("x")
"""


def said(journal: str) -> list[str]:
    """What goes to a pipe; `journal` says what JOURNAL_STREAM names: that pipe, or another."""
    reader, writer = os.pipe()
    status = os.fstat(writer)
    stream = f"{status.st_dev}:{status.st_ino}" if journal == "here" else "1:2"
    env = {**os.environ, "JOURNAL_STREAM": stream, "PYTHONPATH": str(ROOT / "daemon")}
    subprocess.run([sys.executable, "-c", SAY], env=env, stderr=writer, check=True)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        return pipe.read().splitlines()


def test_journald_is_told_how_grave_a_line_is() -> None:
    lines = said("here")
    assert [line[:3] for line in lines] == ["<7>", "<6>", "<4>", "<3>", "<3>"]
    assert [json.loads(line[3:])["event"] for line in lines] == ["d", "i", "w", "e", "x"]


def test_another_reader_of_the_same_service_gets_json_alone() -> None:
    assert [json.loads(line)["event"] for line in said("elsewhere")] == ["d", "i", "w", "e", "x"]
