"""What tests share: real brokers, the real daemon as a process, the real small model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from rig import Daemon, DaemonFactory, Mosquitto
from wire import BASE, Requester

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile(
    "phid", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("phid")


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Mosquitto]:
    if shutil.which("mosquitto") is None:
        pytest.fail("mosquitto is not installed: run scripts/test, or deselect -m 'not mosquitto'")
    folder = tmp_path / "mosquitto"
    folder.mkdir()
    broker = Mosquitto(folder)
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def start_daemon(mosquitto: Mosquitto, tmp_path: Path) -> Iterator[DaemonFactory]:
    """Starts daemons on the test's broker; ends them, and shows their logs, after the test.

    Settings are given as PHID_* names: start(engine__model="x").
    """
    daemons: list[Daemon] = []

    def start(device: str = "dut", *, wait: bool = True, **settings: object) -> Daemon:
        daemon = Daemon(mosquitto.port, tmp_path, device, **settings)
        daemons.append(daemon)
        daemon.start()
        if wait:
            with Requester(mosquitto.port, device) as watcher:
                watcher.listen(f"{BASE}/{device}/out/status")
                watcher.online()
        return daemon

    yield start
    for daemon in daemons:
        daemon.close()
        print(f"--- log of {daemon.device}\n{daemon.log[-6000:]}")


@pytest.fixture
def requester(mosquitto: Mosquitto) -> Iterator[Requester]:
    with Requester(mosquitto.port) as client:
        yield client


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """The folder that holds the demo model, made if it is not there."""
    from phid import demo, settings

    named = os.environ.get("PHID_TEST_MODELS")
    folder = Path(named) if named else settings.default_models_dir()
    demo.prepare(folder)
    return folder
