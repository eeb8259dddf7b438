"""The laws under faults: 45 seconds of scripts/chaos, as anyone runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rig import ROOT

pytestmark = pytest.mark.mosquitto


@pytest.mark.timeout(240)
def test_no_law_is_broken_while_everything_breaks(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "_chaos.py"), "--seconds", "45"]
    report = tmp_path / "figures.json"
    done = subprocess.run(
        [*command, "--seed", "1", "--every", "0.3", "1.5", "--json", str(report)],
        capture_output=True,
        text=True,
        check=False,
    )
    figures = json.loads(report.read_text())
    assert done.returncode == 0, figures
    assert figures["lost"] == figures["answered_twice"] == figures["stream_errors"] == 0
    assert (figures["turn_errors"], figures["went_on"] >= 5) == (0, True)
    assert figures["faults"] >= 10
    assert figures["answered"] >= 30
    assert figures["upload_cuts"] >= 1
    assert figures["half_opens"] >= 1
    assert figures["net_cuts"] >= 1
    assert figures["mute_brokers"] >= 1
    assert figures["conflicts"] >= 1
    # What waits may take 64 MiB (limits.backlog_bytes), and pictures of 8 come in JSON.
    assert figures["max_service_rss_mb"] < 160
