"""Memory stays flat: a short scripts/soak, as anyone runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rig import ROOT

pytestmark = pytest.mark.mosquitto


@pytest.mark.timeout(240)
def test_a_thousand_requests_leave_no_more_memory_taken_than_a_few_hundred(tmp_path: Path) -> None:
    report = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "scripts" / "_soak.py"), "--json", str(report)]
    done = subprocess.run(
        [*command, "--scripted", "1000", "--real", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert report.exists(), done.stderr
    figures = json.loads(report.read_text())
    assert done.returncode == 0, figures
    assert (figures["scripted.answered"], figures["scripted.errors"]) == (1000, 0)
    assert figures["scripted.service_growth_pct"] < 2
    assert figures["scripted.engine_growth_pct"] < 5
