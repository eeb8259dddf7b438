"""Every message of the wire has a file in tests/golden: what changes there changes for the fleet.

`python tests/contract/test_golden_wire.py` writes the files anew; the diff is for the reviewer.

A message the device sends is kept byte for byte, as encoded by the code that sends it, with its
envelope (topic, QoS, retain, expiry, user properties) in envelopes.txt. A message it takes is kept
as a requester may write it, with what the device reads in it beside it (.read.json).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from phid import commands, control, findings, messages, requests
from phid.backlog import Backlog
from phid.bulletin import Bulletin
from phid.crew import Crew
from phid.errors import Code, Failure
from phid.findings import Sighting
from phid.health import Health
from phid.intake import CancelArrived, CommandArrived, ForgetArrived, Intake, RequestArrived
from phid.jobs import EngineFacts, Finish, Finished, Load, Usage
from phid.ledger import ReplyAddress
from phid.lineup import Lineup, Model
from phid.lookout import Lookout
from phid.messages import Accepted, Delta, JobEvent, ReloadEvent, Result, Timing, UsageReport
from phid.outbox import Outbox, Publication
from phid.proofs import Report, Selection
from phid.roster import Notebook, Roster
from phid.settings import Settings
from phid.slots import Frame
from phid.thermal import Heat
from phid.traffic import Connected, Inbound, Protocol
from phid.watches import Watch
from phid.worker import Worker

GOLDEN = Path(__file__).parents[1] / "golden"
ENVELOPES = GOLDEN / "envelopes.txt"
NOW = 1_800_000_000
FACTS = EngineFacts(
    model="phi-3.5-mini",
    kind="text",
    runtime="onnxruntime-genai",
    runtime_version="0.18.0",
    provider="cuda",
    threads=4,
    context=4096,
    kv_bytes_per_token=786432,
    load_ms=4321,
    estimate_mb=3520,
    placement={"cuda": 98.7, "cpu": 1.3},
    tokens_per_s=41.5,
)
SELECTION = Selection(
    ("cuda", "cpu"),
    "cuda",
    (
        Report(
            "cuda", True, "the CPU's text, 16 tokens of it", None, {"cuda": 98.7, "cpu": 1.3}, 42.0
        ),
    ),
)
RESULT = Result(
    id="a1",
    client="me",
    device="porch",
    model="phi-3.5-mini",
    provider="cpu",
    text='Paris, "ville lumière" 日本 👩\u200d🚀 שלום.\n',
    finish=Finish.STOP,
    usage=UsageReport(prompt_tokens=36, output_tokens=7),
    timing=Timing(
        queued_ms=0,
        prefill_ms=120,
        ttft_ms=125,
        decode_ms=40,
        total_ms=165,
        tokens_per_s=150.0,
    ),
    deltas=2,
)


YARD = Watch(name="yard", topic="frigate/+/+/snapshot", prompt="What is the {label} doing?")
SEEN = Sighting(YARD, "frigate/porch/dog/snapshot", Frame(b"", 999.5, NOW, 7), NOW + 0.125, 1)
FINISHED = Finished("w1", Finish.STOP, "It sleeps.", Usage(340, 313, 0, 4, 1), 800, 810, 120)
RAN = {"device": "porch", "model": "phi-3.5-vision", "provider": "cpu"}


class Paper:
    """A link that keeps what is published instead of sending it."""

    session = "5e551012-1"

    def __init__(self) -> None:
        self.envelope = ""
        self.payload = b""

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        correlation: bytes | None = None,
        expiry_s: int | None = None,
        user: Any = (),
        **_: Any,
    ) -> int:
        parts = [topic, f"qos={qos}", f"retain={int(retain)}", f"expiry_s={expiry_s}"]
        parts += [f"correlation={(correlation or b'').hex()}"]
        parts += [f"{name}={value}" for name, value in user]
        self.envelope, self.payload = " ".join(parts), payload
        return 1


class Device:
    """A device that has just come online, with nothing behind it and its clock stopped."""

    def __init__(self) -> None:
        settings = Settings(device="porch", models_dir=Path("/var/lib/phid/models"))
        self.paper = Paper()
        self.outbox = Outbox()
        self.outbox.connect(
            Connected(
                self.paper,  # type: ignore[arg-type]
                self.paper.session,
                Protocol.V5,
                resumed=False,
                refused=(),
                packet_bytes=1_000_000,
                window=20,
            )
        )
        model = Model(Load("genai", "phi-3.5-mini", "/m"))
        hire = partial(Worker, post=print, restart_max_s=1)
        self.crew = crew = Crew(Lineup((model,), model.name, model.name), hire)
        for worker in crew.workers:
            worker.state, worker.facts, worker.loaded_bytes = "ready", FACTS, 3400 << 20
            worker.placing.requested = SELECTION.requested
            worker.placing.proved(SELECTION)
        self.backlog = mock.MagicMock(spec=Backlog, oldest_arrival=None)  # nothing waits
        self.bulletin = Bulletin(settings, self.outbox, Health(settings.models_dir), crew)
        self.bulletin.session = self.paper.session
        self.reply = ReplyAddress(settings.topics.rx("me"), b"\x01\x02")
        self.topics = settings.topics

    def online(self) -> None:
        self.bulletin.look(paused=False, draining=False, backlog=self.backlog)

    def status(self) -> None:
        self.online()
        self.bulletin.publish_status(self.backlog)

    def will(self) -> None:
        will = self.bulletin.will(self.paper.session)
        self.paper.publish(will.topic, will.payload, retain=True)

    def stopped(self) -> None:
        self.outbox._window = 1  # the status is put on paper, and the event after it is not
        self.bulletin.farewell(self.backlog)

    def answer(self, message: Any) -> None:
        self.outbox.answer(self.reply, message)

    def delta(self) -> None:
        self.outbox.send_now(self.topics.res("me", "a1"), Delta(id="a1", seq=0, text="Paris 👩"))

    def error(self, code: Code, says: str, **more: Any) -> None:
        self.outbox.refuse(self.reply, messages.error_message("a1", Failure(code, says, **more)))

    def watch(self) -> None:
        settings = Settings(device="porch", watches=(YARD,))
        roster = Roster(Notebook(Path("/nonexistent")), "phid/v1")
        roster.note = mock.Mock()  # type: ignore[method-assign]
        health = Health(settings.models_dir)
        crew = Crew(Lineup(), partial(Worker, post=print, restart_max_s=1))
        lookout = Lookout(settings, roster, crew, self.outbox, health, lambda: 0)
        self.paper.subscribe = lambda _: 1  # type: ignore[attr-defined]
        lookout.connect(mock.Mock(link=self.paper))

    def ctl(self, verb: str) -> None:
        service = mock.Mock(
            ping=lambda: {"state": "online", "queue": 0, "uptime_s": 60, "version": "1.2.3"}
        )
        arrived = CommandArrived(verb, "c1", commands.Command(), broadcast=False, reply=self.reply)
        self.outbox.answer(arrived.reply, control.execute(service, arrived, control.VERBS))


OUT: dict[str, Callable[[Device], object]] = {
    "accepted": lambda d: d.answer(Accepted(id="a1", queue_pos=1, eta_ms=4100)),
    "delta": Device.delta,
    "result": lambda d: d.answer(RESULT),
    "result-duplicate": lambda d: d.answer(RESULT.model_copy(update={"duplicate": True})),
    "result-looped": lambda d: d.answer(
        RESULT.model_copy(update={"finish": Finish.LENGTH, "looped": True})
    ),
    "result-session": lambda d: d.answer(
        RESULT.model_copy(update={"session": "kitchen", "session_turns": 4})
    ),
    "result-cancelled": lambda d: d.answer(RESULT.model_copy(update={"finish": Finish.CANCELLED})),
    "error-bad-request": lambda d: d.error(
        Code.BAD_REQUEST,
        "unknown field 'max_token': did you mean max_tokens?",
        field="max_token",
    ),
    "error-busy": lambda d: d.error(
        Code.BUSY, "the queue is full: 64 requests are waiting", retry_after_ms=4100
    ),
    "error-engine-lost": lambda d: d.error(
        Code.ENGINE_LOST,
        "the engine was ended by SIGKILL (out of memory, or killed by hand)",
        text="Once upon",
    ),
    "error-expired": lambda d: d.error(Code.EXPIRED, "its deadline passed before it was started"),
    "ctl-ok": lambda d: d.ctl("ping"),
    "ctl-error": lambda d: d.ctl("pong"),
    "status-online": Device.status,
    "status-offline-stopped": Device.stopped,
    "status-offline-will": Device.will,
    "info": lambda d: d.bulletin.publish_info(),
    "health": lambda d: d.bulletin.publish_health(d.backlog, paused=False),
    "event-job": lambda d: d.bulletin.publish_event(
        JobEvent(
            ts=NOW,
            id="a1",
            client="me",
            outcome="stop",
            model="phi-3.5-mini",
            output_tokens=7,
            total_ms=165,
            tags={"room": "Küche", "try": 2, "test": True, "load": 0.5},
        )
    ),
    "event-state": Device.online,
    "event-reload": lambda d: d.bulletin.publish_event(
        ReloadEvent(ts=NOW, ok=False, reason="limits.backlog: must be a number")
    ),
    "event-provider": lambda d: d.bulletin.publish_provider(next(iter(d.crew.workers))),
    "watch": Device.watch,
    "watch-result": lambda d: d.outbox.put(
        Publication(
            d.topics.watch_result("yard"), findings.result(SEEN, FINISHED, 1000, 1001, **RAN)
        )
    ),
    "watch-error": lambda d: d.outbox.put(
        Publication(
            d.topics.watch_result("yard"),
            findings.failure(SEEN, Failure(Code.UNSUPPORTED, "this is no image", field="images")),
        )
    ),
}
"""Each message the device sends, and what makes it send that last."""


IN: dict[str, tuple[str, dict[str, Any]]] = {
    "request": ("phid/v1/porch/in/text/me", {}),
    "request-messages": (
        "phid/v1/porch/in/text",
        {"correlation": b"\x01\x02", "expiry_s": 30, "dup": True},
    ),
    "request-every-field": (
        "phid/v1/porch/in/text/me",
        {"response_topic": "phid/v1/client/me/rx"},
    ),
    "cancel": ("phid/v1/porch/in/cancel/me", {}),
    "cancel-session": ("phid/v1/porch/in/cancel/me", {}),
    "command-ping": ("phid/v1/porch/in/ctl/ping", {"response_topic": "phid/v1/client/op/rx"}),
    "command-log": ("phid/v1/porch/in/ctl/log", {}),
    "command-restart": ("phid/v1/porch/in/ctl/restart", {}),
    "command-watch": ("phid/v1/porch/in/ctl/watch", {}),
}
"""Each message the device takes: the topic it comes on, and what else the broker says of it."""


@contextmanager
def stopped() -> Iterator[None]:
    """No clock moves and every machine is the same one inside this block."""
    psutil = mock.Mock()
    psutil.cpu_percent.return_value = 12.5
    psutil.virtual_memory.return_value = mock.Mock(used=2048 << 20, total=8192 << 20)
    psutil.Process.return_value.memory_info.return_value = mock.Mock(rss=45 << 20)
    psutil.disk_usage.return_value = mock.Mock(free=9000 << 20)
    with (
        mock.patch("time.time", return_value=float(NOW)),
        mock.patch("time.monotonic", return_value=1000.0),
        mock.patch("phid.health.psutil", psutil),
        mock.patch("phid.memory.psutil", psutil),
        mock.patch("phid.sensors.heat", return_value=Heat(51.2, throttled=False)),
        mock.patch("phid.reports.VERSION", "1.2.3"),
        mock.patch("os.cpu_count", return_value=4),
        mock.patch("platform.machine", return_value="aarch64"),
        mock.patch("platform.system", return_value="Linux"),
        mock.patch("platform.release", return_value="6.6.31"),
        mock.patch("platform.python_version", return_value="3.12.8"),
    ):
        yield


def said(name: str) -> tuple[str, bytes]:
    """The envelope and the payload of a message the device sends."""
    with stopped():
        device = Device()
        OUT[name](device)
    return f"{name}: {device.paper.envelope}\n", device.paper.payload


def read(name: str) -> dict[str, Any]:
    """What the device reads in a message it takes, without what it makes up."""
    topic, properties = IN[name]
    properties = {"qos": 1, "retain": False, "dup": False} | properties
    settings = Settings(device="porch")
    intake = Intake(
        settings.topics,
        payload_bytes=settings.limits.payload_bytes,
        max_tokens=settings.limits.max_tokens,
        deadline_ms=settings.limits.deadline_ms,
    )
    arrival = intake.read(Inbound(topic, payload(name), **properties))
    match arrival:
        case RequestArrived():
            seen = {
                "client": arrival.client,
                "id": arrival.id if arrival.id_given else None,
                "digest": arrival.digest,
                "deadline_s": arrival.deadline_s,
                "redelivered": arrival.redelivered,
                "request": arrival.request.model_dump(mode="json"),
            }
        case CancelArrived():
            return {"client": arrival.client, "id": arrival.id}
        case ForgetArrived():
            return {"client": arrival.client, "session": arrival.session}
        case CommandArrived():
            seen = {
                "verb": arrival.verb,
                "id": arrival.id,
                "command": arrival.command.model_dump(mode="json"),
            }
        case _:
            raise AssertionError(f"{name} was not taken: {arrival}")
    made_up = arrival.id if isinstance(arrival, RequestArrived) and not arrival.id_given else None
    seen["reply_to"] = (
        arrival.reply.topic.replace(made_up, "<id>") if made_up else (arrival.reply.topic)
    )
    seen["correlation"] = (arrival.reply.correlation or b"").hex()
    return seen


def payload(name: str) -> bytes:
    return (GOLDEN / f"{name}.json").read_bytes()


def dumped(seen: dict[str, Any]) -> str:
    return json.dumps(seen, indent=1, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("name", OUT)
def test_what_the_device_sends_is_what_the_file_says(name: str) -> None:
    envelope, sent = said(name)
    assert sent + b"\n" == payload(name)
    assert envelope in ENVELOPES.read_text("utf-8")


@pytest.mark.parametrize("name", IN)
def test_what_the_device_takes_is_read_as_the_file_says(name: str) -> None:
    assert dumped(read(name)) == (GOLDEN / f"{name}.read.json").read_text("utf-8")


@pytest.mark.parametrize(
    "name", [n for n in OUT if n.startswith(("accepted", "delta", "result", "error", "ctl"))]
)
def test_what_a_requester_is_told_can_be_read_by_the_client(name: str) -> None:
    answer = messages.decode_answer(payload(name))
    assert messages.encode(answer) + b"\n" == payload(name)


def test_no_file_is_without_its_message() -> None:
    expected = {*OUT, *IN, *(f"{name}.read" for name in IN)}
    assert {path.stem for path in GOLDEN.glob("*.json")} == expected
    assert len(ENVELOPES.read_text("utf-8").splitlines()) == len(OUT)


def test_a_request_with_every_field_has_every_field() -> None:
    elsewhere = {"images"}  # pictures have a file of their own
    named = json.loads(payload("request-every-field")).keys()
    other = json.loads(payload("request-messages")).keys()
    assert named | other == requests.Request.model_fields.keys() - elsewhere


def write() -> None:
    """All files that the code makes, anew."""
    envelopes = []
    for name in OUT:
        envelope, sent = said(name)
        envelopes.append(envelope)
        (GOLDEN / f"{name}.json").write_bytes(sent + b"\n")
    ENVELOPES.write_text("".join(envelopes), "utf-8")
    for name in IN:
        (GOLDEN / f"{name}.read.json").write_text(dumped(read(name)), "utf-8")


if __name__ == "__main__":
    write()
