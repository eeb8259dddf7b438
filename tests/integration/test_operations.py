"""The mode the service is in, with an engine to hand requests to."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from phid.bulletin import Bulletin
from phid.crew import Crew
from phid.desk import Desk
from phid.gallery import Gallery, Rules
from phid.health import Health
from phid.intake import RequestArrived
from phid.jobs import Load
from phid.lineup import Lineup, Model
from phid.lookout import Lookout
from phid.operations import Operations
from phid.outbox import Outbox
from phid.records import Records
from phid.roster import Notebook, Roster
from phid.settings import Settings
from phid.traffic import Decision, Inbound
from phid.worker import EngineSaid, Worker, WorkerEvent
from wire import PATIENCE

SETTINGS = Settings(device="dev")
Parts = tuple[Operations, Desk, Bulletin]


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    """What there is of a service whose engine is ready."""
    mail: queue.SimpleQueue[WorkerEvent] = queue.SimpleQueue()
    health, outbox = Health(tmp_path), Outbox()
    crew = Crew(
        Lineup((Model(Load("scripted", "m", "")),), "m", "m"),
        partial(Worker, post=mail.put, restart_max_s=1),
    )
    bulletin = Bulletin(SETTINGS, outbox, health, crew)
    desk = Desk(
        SETTINGS,
        crew,
        outbox,
        health,
        lambda _: None,
        Gallery(Rules()).picture,
        Records(None, health),
    )
    roster = Roster(Notebook(tmp_path / "watches.json"), SETTINGS.mqtt.base)
    lookout = Lookout(SETTINGS, roster, crew, outbox, health)
    crew.start()
    while crew.ready("m") is None:
        said = mail.get(timeout=10 * PATIENCE)
        assert isinstance(said, EngineSaid)
        crew.take(said)
    yield (
        Operations(SETTINGS, lambda: SETTINGS, crew, desk, bulletin, health, lookout),
        desk,
        bulletin,
    )
    crew.stop()


def test_what_waited_for_the_machine_to_cool_goes_on_though_the_state_stays_degraded(
    parts: Parts,
) -> None:
    operations, desk, bulletin = parts
    now = time.monotonic()
    bulletin.refused_filters = ("phid/v1/all/in/ctl/discover",)
    desk.cooling, bulletin.heat = True, "too hot"
    operations.look(now)
    topic = SETTINGS.topics.text("me")
    asked = Inbound(topic, b'{"prompt": "x"}', qos=0, retain=False, dup=False)
    arrived = operations.intake.read(asked)
    assert isinstance(arrived, RequestArrived)
    desk.take(arrived, now, Decision(awaited=False))
    operations.look(now)
    assert len(desk.backlog) == 1
    desk.cooling, bulletin.heat = False, None
    operations.look(now)
    assert len(desk.backlog) == 0
    assert bulletin.state.name == "degraded"
