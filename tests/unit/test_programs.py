"""phid's own programs run phid's own code, wherever they are started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from phid import programs
from rig import ROOT

BANDWIDTH = "from phid import bandwidth; print(bandwidth.measure(1).threads)"
ENGINE = """
from phid import channel
from phid.jobs import Load
child, line = channel.spawn(channel.ENGINE)
line.send(Load("scripted", "a", "a"))
said = line.recv()
while type(said).__name__ == "Loading":
    said = line.recv()
print(type(said).__name__)
child.kill()
child.wait()
"""


@pytest.mark.parametrize(("code", "says"), [(BANDWIDTH, "1"), (ENGINE, "Ready")])
def test_what_lies_in_the_current_folder_is_not_run(tmp_path: Path, code: str, says: str) -> None:
    (tmp_path / "phid").mkdir()
    for name in ("phid/__init__.py", "phid/__main__.py", "json.py", "queue.py"):
        (tmp_path / name).write_text("raise SystemExit('a stranger was run')\n")
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT / "daemon")},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == says, done.stderr


def test_another_start_makes_the_path_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/somewhere", "/else"]))
    once = programs.environment()["PYTHONPATH"]
    assert once.split(os.pathsep) == [str(ROOT / "daemon"), "/somewhere", "/else"]
    monkeypatch.setenv("PYTHONPATH", once)
    assert programs.environment()["PYTHONPATH"] == once
