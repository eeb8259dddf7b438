"""Nothing leaves the device but what goes to the broker: no look-up, no telemetry, no packet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rig import ROOT
from wire import PATIENCE

pytestmark = [pytest.mark.mosquitto, pytest.mark.model, pytest.mark.namespace]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> dict[str, Any]:
    """What was seen in a network namespace, of the daemon and of one who strays."""
    folder = tmp_path_factory.mktemp("alone")
    program = str(ROOT / "tests" / "egress.py")
    alone = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--net", "--map-root-user"]
    environment = {n: v for n, v in os.environ.items() if n != "ORT_DISABLE_TELEMETRY"}
    environment["PYTHONPATH"] = f"{ROOT / 'daemon'}{os.pathsep}{ROOT / 'tests'}"
    done = subprocess.run(
        [*alone, sys.executable, program, str(folder), str(models_dir)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=80 * PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_no_packet_goes_anywhere_but_to_the_broker(seen: dict[str, Any]) -> None:
    assert seen["daemon"].keys() == {"lo tcp 192.0.2.1:1883", "lo pair on 127.0.0.1"}
    assert seen["daemon"]["lo tcp 192.0.2.1:1883"] > 100


def test_one_stray_packet_or_name_or_collector_would_be_seen(seen: dict[str, Any]) -> None:
    assert "lo tcp 127.0.0.1:4318" in seen["stray"]
    assert "lo udp 198.51.100.7:9" in seen["stray"]
    assert any(where.startswith("lo udp") and where.endswith(":53") for where in seen["stray"])
