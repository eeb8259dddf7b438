"""What it costs the owner thread to say no."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import paho.mqtt.client as paho
import pytest

from phid.crew import Crew
from phid.desk import Desk
from phid.entries import Accepted, Left, PartKept, Row
from phid.errors import Code, Failure
from phid.gallery import Gallery, Rules
from phid.health import Health
from phid.intake import ArrivalRefused, Intake, RequestArrived
from phid.jobs import Load
from phid.ledger import ReplyAddress
from phid.lineup import Lineup, Model
from phid.link import PahoLink
from phid.messages import ErrorMessage, JobEvent
from phid.outbox import Outbox
from phid.records import Records
from phid.sections import Limits, Sessions
from phid.settings import Settings
from phid.traffic import Connected, Decision, Inbound, Protocol
from phid.worker import Worker

SETTINGS = Settings(device="dev", limits=Limits(backlog=20, per_client=10))
INTAKE = Intake(SETTINGS.topics, payload_bytes=1 << 20, max_tokens=100, deadline_ms=1000)
PROMPT = '{"prompt": "%s"%s}'
SAMPLES = 200


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """A desk whose outbox has all of paho behind it but the network."""
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    outbox = Outbox()
    link = PahoLink(client, "s", Protocol.V5)
    outbox.connect(
        Connected(
            link, "s", Protocol.V5, resumed=False, refused=(), packet_bytes=1 << 21, window=10_000
        )
    )
    desk = Desk(
        SETTINGS,
        Crew(
            Lineup((Model(Load("scripted", "m", "")),), "m", "m"),
            partial(Worker, post=print, restart_max_s=1),
        ),
        outbox,
        Health(tmp_path),
        lambda _: None,
        Gallery(Rules()).picture,
        Records(None, Health(tmp_path)),
    )
    desk.held = True  # what is taken waits
    yield desk
    client._reset_sockets()


def arrived(payload: str, client: str = "c") -> RequestArrived | ArrivalRefused:
    topic = SETTINGS.topics.text(client)
    arrival = INTAKE.read(Inbound(topic, payload.encode(), qos=1, retain=False, dup=False))
    assert isinstance(arrival, RequestArrived | ArrivalRefused)
    return arrival


def test_nothing_is_promised_while_the_broker_takes_less_than_there_is_to_tell(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Outbox, "full", True)
    desk.take(arrived(PROMPT % ("x", "")), 0.0, Decision())  # type: ignore[arg-type]
    assert (len(desk.backlog), desk._health.counts["jobs_busy"]) == (0, 1)
    monkeypatch.setattr(Outbox, "full", False)
    desk.take(arrived(PROMPT % ("x", "")), 0.0, Decision())  # type: ignore[arg-type]
    assert len(desk.backlog) == 1


def fill(desk: Desk, clients: int) -> None:
    for n in range(clients):
        for _ in range(10):
            desk.take(arrived(PROMPT % ("x", ""), f"c{n}"), 0.0, Decision())  # type: ignore[arg-type]


def close(desk: Desk) -> None:
    desk.admission.closed = Failure(Code.PAUSED, "paused", retry_after_ms=1)


def known(desk: Desk) -> None:
    desk.take(arrived(PROMPT % ("x", ', "id": "i"'), "known"), 0.0, Decision())  # type: ignore[arg-type]


def hurry(desk: Desk) -> None:
    limits = SETTINGS.limits.model_copy(update={"rate_per_client": 1.0, "burst_per_client": 1})
    desk.configure(SETTINGS.model_copy(update={"limits": limits}))
    desk.take(arrived(PROMPT % ("x", ""), "c"), 1.0, Decision())  # type: ignore[arg-type]


def test_what_was_accepted_with_its_parts_is_taken_over_whatever_room_there_is(desk: Desk) -> None:
    count, part = SETTINGS.limits.backlog + 5, bytes(SETTINGS.vision.parts_bytes // 10)
    topic = SETTINGS.topics.frame("c")
    payload = b'{"prompt": "x", "id": "%s", "images": [{"part": 0}]}'
    rows = []
    for n in range(count):
        message = Inbound(topic, payload % f"r{n}".encode(), qos=1, retain=False, dup=False)
        accepted = Accepted(
            *(n + 1, "c", f"r{n}", True, f"d{n}", message),
            ReplyAddress(SETTINGS.topics.rx("c")),
            accepted_ts=1e9,
            deadline_ts=1e9 + 60,
        )
        rows.append(Row(accepted, marked=False, addresses=(), outcome=None, ended_ts=0, told=False))
    parts = tuple(PartKept("c", f"r{n}", 0, part, 1e9) for n in range(count))
    desk.recover(Left(tuple(rows), parts), INTAKE, 0.0, 1e9)
    assert (len(desk.backlog), len(desk.gathering)) == (count, 0)


def keep_none(desk: Desk) -> None:
    desk.conversations.configure(SETTINGS.model_copy(update={"sessions": Sessions(most=0)}))


@pytest.mark.parametrize(
    ("deadline_ms", "ends_at", "code"),
    [(1000, 1.0, Code.EXPIRED), (90_000, SETTINGS.vision.parts_s, Code.INCOMPLETE)],
)
def test_one_whose_parts_do_not_come_ends_at_its_deadline_if_that_is_first(
    desk: Desk, deadline_ms: int, ends_at: float, code: Code
) -> None:
    ended: list[JobEvent] = []
    desk._answers._tell = ended.append
    payload = (
        b'{"prompt": "x", "id": "i", "deadline_ms": %d, "images": [{"part": 0}]}' % deadline_ms
    )
    topic = SETTINGS.topics.frame("c")
    intake = replace(INTAKE, deadline_ms=100_000)
    request = intake.read(Inbound(topic, payload, qos=1, retain=False, dup=False))
    assert isinstance(request, RequestArrived)
    desk.take(request, 0.0, Decision())
    assert desk.due_at == ends_at
    desk.tick(ends_at - 0.01)
    assert ended == []
    desk.tick(ends_at)
    assert [event.outcome for event in ended] == [code]
    assert (desk.idle, len(desk.gathering)) == (True, 0)


@pytest.mark.parametrize(
    ("prepare", "fields", "client", "code"),
    [
        (lambda desk: fill(desk, 2), "", "c9", Code.BUSY),
        (lambda desk: fill(desk, 1), "", "c0", Code.BUSY),
        (close, "", "c", Code.PAUSED),
        (hurry, "", "c", Code.BUSY),
        (lambda _: None, ', "model": "other"', "c", Code.NOT_FOUND),
        (known, ', "id": "i"', "known", Code.ID_CONFLICT),
        (lambda _: None, ', "priority": 99', "c", Code.BAD_REQUEST),
        (keep_none, ', "session": "s"', "c", Code.UNSUPPORTED),
    ],
    ids=["full", "its share", "paused", "its rate", "model", "conflict", "bad", "unsupported"],
)
@pytest.mark.parametrize("size", [1, 1_000_000], ids=["small", "large"])
def test_a_refusal_takes_less_than_a_millisecond_of_the_owners_time(
    desk: Desk, prepare: object, fields: str, client: str, code: Code, size: int
) -> None:
    prepare(desk)  # type: ignore[operator]
    waiting = len(desk.backlog)
    arrival = arrived(PROMPT % ("y" * size, fields), client)
    told: list[ErrorMessage] = []
    outbox = desk._outbox
    refuse = outbox.refuse
    outbox.refuse = lambda reply, message, decided: (  # type: ignore[method-assign,assignment,return-value]
        told.append(message),
        refuse(reply, message, decided),
    )
    taken = []
    for _ in range(SAMPLES):
        began = time.thread_time()
        if isinstance(arrival, RequestArrived):
            desk.take(arrival, 1.0, Decision())
        else:
            desk.refuse(arrival.reply, arrival.id, arrival.failure, Decision())
        taken.append(time.thread_time() - began)
    assert statistics.median(taken) < 0.001
    assert [message.code for message in told] == [code] * SAMPLES
    assert len(desk.backlog) == waiting, "what is refused is not kept"
    assert all(m.retry_after_ms for m in told) or code is not Code.BUSY


@pytest.mark.parametrize(("awaited", "most"), [(False, 2100), (True, 4200)])
def test_a_flood_of_retries_is_not_kept(desk: Desk, *, awaited: bool, most: int) -> None:
    desk._outbox.disconnect()
    first = arrived(PROMPT % ("x", ', "id": "i"'))
    assert isinstance(first, RequestArrived)
    desk.take(first, 0.0, Decision())
    desk.cancel("c", "i", 1.0)
    for _ in range(5000):
        desk.take(first, 2.0, Decision(awaited=awaited))
    assert len(desk._outbox) < most
