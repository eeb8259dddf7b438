"""What is refused before it is taken, in which order, and with which code."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from phid.admission import Admission
from phid.attachments import PartRef
from phid.backlog import Backlog
from phid.crew import Crew
from phid.errors import Code, Failure, Refused
from phid.gathering import Gathering
from phid.health import Health
from phid.intake import Intake, PartArrived, RequestArrived
from phid.jobs import Job, Load
from phid.journal import Journal
from phid.ledger import Ticket
from phid.lineup import Lineup, Model
from phid.outbox import Outbox
from phid.records import Records
from phid.sections import Limits
from phid.settings import Settings
from phid.traffic import Inbound
from phid.worker import Worker

LIMITS = Limits(backlog=2, per_client=2, rate_per_client=60, burst_per_client=1)
SETTINGS = Settings(device="dev", limits=LIMITS)
INTAKE = Intake(SETTINGS.topics, payload_bytes=1024, max_tokens=100, deadline_ms=1000)


@pytest.fixture
def backlog() -> Backlog:
    return Backlog(limit=LIMITS.backlog, per_client=LIMITS.per_client)


@pytest.fixture
def gathering() -> Gathering:
    return Gathering(limit_bytes=1024, keep_s=10)


@pytest.fixture
def admission(backlog: Backlog, gathering: Gathering, tmp_path: Path) -> Admission:
    crew = Crew(
        Lineup((Model(Load("scripted", "m", "")),), "m", "m"),
        partial(Worker, post=print, restart_max_s=1),
    )
    health = Health(tmp_path)
    return Admission(SETTINGS, crew, backlog, gathering, Records(None, health), Outbox(), health)


def arrived(client: str = "c") -> RequestArrived:
    topic = SETTINGS.topics.text(client)
    inbound = Inbound(topic, b'{"prompt": "x"}', qos=1, retain=False, dup=False)
    arrival = INTAKE.read(inbound)
    assert isinstance(arrival, RequestArrived)
    return arrival


def ticket(client: str = "c") -> Ticket:
    one = arrived(client)
    return Ticket(
        client=client,
        id=one.id,
        digest="",
        request=one.request,
        job=Job("1", ()),
        size_bytes=1,
        address=one.reply,
        arrived=0.0,
        deadline=9.0,
        topic=one.topic,
        id_given=False,
    )


def code_of(admission: Admission, arrival: RequestArrived, now: float = 0.0) -> Code | None:
    try:
        admission.check(arrival, now)
        admission.take(arrival, now)
    except Refused as refused:
        return refused.failure.code
    return None


def test_what_can_be_answered_is_let_in(admission: Admission) -> None:
    assert code_of(admission, arrived()) is None


def test_while_closed_every_one_is_told_why(admission: Admission) -> None:
    admission.closed = Failure(Code.PAUSED, "paused", retry_after_ms=5)
    with pytest.raises(Refused) as refused:
        admission.check(arrived(), 0.0)
    assert refused.value.failure == admission.closed


def test_a_deadline_that_is_over_is_not_begun(admission: Admission) -> None:
    assert code_of(admission, replace(arrived(), deadline_s=0.0)) is Code.EXPIRED


def test_those_that_wait_for_their_parts_have_a_bound_too(
    admission: Admission, gathering: Gathering
) -> None:
    for n in range(LIMITS.backlog):
        gathering.hold(ticket(f"c{n}"), (PartRef(0),), 0.0)
    assert code_of(admission, replace(arrived(), images=(PartRef(0),))) is Code.BUSY
    assert code_of(admission, arrived()) is None, "who wants no parts is not in their line"


def test_those_that_wait_for_their_parts_count_as_their_clients(
    admission: Admission, gathering: Gathering
) -> None:
    for _ in range(LIMITS.per_client):
        gathering.hold(ticket("c"), (PartRef(0),), 0.0)
    assert code_of(admission, arrived("c")) is Code.BUSY
    assert code_of(admission, arrived("another")) is None


def test_those_that_wait_for_their_parts_count_with_their_bytes(
    admission: Admission, gathering: Gathering, backlog: Backlog
) -> None:
    held = ticket("other")
    held.size_bytes = backlog.limit_bytes
    gathering.hold(held, (PartRef(0),), 0.0)
    assert code_of(admission, arrived()) is Code.BUSY
    gathering.drop(held)
    assert code_of(admission, arrived()) is None


@pytest.mark.parametrize("why", ["closed", "its share", "its rate", "its bytes", "the disk"])
def test_what_is_refused_as_it_came_is_refused_before_a_camera_is_looked_at(
    admission: Admission, backlog: Backlog, tmp_path: Path, why: str
) -> None:
    match why:
        case "closed":
            admission.closed = Failure(Code.PAUSED, "paused")
        case "its share":
            for _ in range(LIMITS.per_client):
                backlog.push(ticket())
        case "its rate":
            assert code_of(admission, arrived()) is None
        case "its bytes":
            backlog.push(ticket("other"))
            backlog.limit_bytes = arrived().size_bytes
        case "the disk":
            journal = Journal(tmp_path / "journal.db", print, max_bytes=1 << 20)
            journal.failing = "no room"
            admission._records._journal = journal
    with pytest.raises(Refused):
        admission.check(arrived(), 0.0)


def test_who_is_refused_for_lack_of_room_has_not_used_up_its_share(
    admission: Admission, backlog: Backlog
) -> None:
    waiting = [ticket("other") for _ in range(LIMITS.backlog)]
    for one in waiting:
        backlog.push(one)
    assert code_of(admission, arrived()) is Code.BUSY
    for one in waiting:
        backlog.remove(one)
    assert code_of(admission, arrived()) is None, "its one of a burst is left"
    assert code_of(admission, arrived()) is Code.BUSY


def test_new_limits_hold_from_now_on(admission: Admission, backlog: Backlog) -> None:
    assert code_of(admission, arrived()) is None
    assert code_of(admission, arrived()) is Code.BUSY
    limits = LIMITS.model_copy(update={"burst_per_client": 2, "backlog": 1})
    admission.configure(SETTINGS.model_copy(update={"limits": limits}))
    assert code_of(admission, arrived()) is None
    backlog.push(ticket())
    assert code_of(admission, arrived("another")) is Code.BUSY


def test_one_who_asks_too_often_is_told_how_often_one_may(admission: Admission) -> None:
    assert code_of(admission, arrived()) is None
    with pytest.raises(Refused) as refused:
        admission.take(arrived(), 0.0)
    assert refused.value.failure.message == "at most 60 requests a minute from one client"
    most = SETTINGS.vision.max_images
    parts = [PartArrived("c", "r", n, b"x", 0) for n in range(most + 1)]
    for part in parts[:-1]:
        admission.check_part(part, 0.0)
    with pytest.raises(Refused) as refused:
        admission.check_part(parts[-1], 0.0)
    assert refused.value.failure.message == f"at most {60 * most} parts a minute from one client"
    assert refused.value.failure.retry_after_ms
