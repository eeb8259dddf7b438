"""What tests share: real brokers, the real daemon as a process, the real small model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from rig import ROOT, Daemon, DaemonFactory, Mosquitto
from wire import BASE, Requester

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile(
    "phid", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("phid")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--measuring",
        choices=["too", "no", "only"],
        default="too",
        help="whether tests marked 'measures' run: scripts/test has the others run side by side",
    )


# With -n 2 one worker begins at this list's beginning, where real models run on as many threads as
# there are cores, and the other at its end, where most of a test is waiting; they meet in between.
FOLDERS = ("contract", "acceptance", "unit", "integration")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each worker whole files, for many share a daemon among their tests."""
    from xdist.scheduler import LoadFileScheduling

    class FromBothEnds(LoadFileScheduling):
        def _assign_work_unit(self, node: Any) -> None:
            if node is not self.nodes[0]:
                self.workqueue.move_to_end(next(reversed(self.workqueue)), last=False)
            super()._assign_work_unit(node)

    config.option.loadscopereorder = False
    return FromBothEnds(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what --measuring says."""
    items.sort(key=lambda item: FOLDERS.index(item.path.relative_to(ROOT / "tests").parts[0]))
    wanted = config.getoption("--measuring")
    if wanted != "too":
        kept, left = [], []
        for item in items:
            is_asked_for = (item.get_closest_marker("measures") is None) == (wanted == "no")
            (kept if is_asked_for else left).append(item)
        config.hook.pytest_deselected(items=left)
        items[:] = kept


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
