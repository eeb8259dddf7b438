"""The mode the service is in, with an engine to hand requests to and no broker."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phid import lineup
from phid.intake import RequestArrived
from phid.sections import Engine, Health, Journal
from phid.service import Service
from phid.settings import Settings
from phid.thermal import Heat, Thermal
from phid.traffic import Decision, Inbound
from rig import until


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """One whose engine is ready; the test is its owner."""
    settings = Settings(
        device="dev",
        state_dir=tmp_path,
        models_dir=tmp_path,
        engine=Engine(runtime="scripted"),
        journal=Journal(enabled=False),
        health=Health(pause_above_c=80),
    )
    service = Service(settings, lambda: settings, lineup.read(settings))
    service._crew.start()
    until(lambda: service._turn() or service._crew.ready("scripted"), what="an engine")
    yield service
    service._crew.stop()
    service._mailbox.close()


def test_what_waited_for_the_machine_to_cool_goes_on_though_the_state_stays_degraded(
    service: Service,
) -> None:
    heat = Heat(90.0, throttled=None)
    service._thermal = Thermal(lambda: heat)
    service._bulletin.refused_filters = ("phid/v1/all/in/ctl/discover",)
    service._tick(time.monotonic())
    asked = Inbound(service._topics.text("me"), b'{"prompt": "x"}', qos=0, retain=False, dup=False)
    arrived = service._operations.intake.read(asked)
    assert isinstance(arrived, RequestArrived)
    service._desk.take(arrived, time.monotonic(), Decision(awaited=False))
    service._tick(time.monotonic())
    assert len(service._desk.backlog) == 1
    heat = Heat(40.0, throttled=None)
    service._tick(time.monotonic() + 60)
    assert len(service._desk.backlog) == 0
    assert service._bulletin.state.name == "degraded"
