"""When a request is acknowledged to the broker: behind its answer, never in front of it."""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from few_words import FewWords, connack, publish, suback
from rig import Daemon, DaemonFactory, Mosquitto, until
from wire import BASE, PATIENCE, Requester

# MQTT 5, section 2.1
CONNACK, PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP = 0x20, 0x30, 0x40, 0x50, 0x62, 0x70


class StingyBroker:
    """An MQTT 5 broker for one client: takes one publication at a time, and only when told to.

    No real broker can be had to hold its acknowledgements back. `told` is what the client sent, in
    order: ("publish", id or state) and ("ack", packet id).
    """

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.told: list[tuple[str, Any]] = []
        self.news = threading.Condition()
        self._unacknowledged: list[bytes] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        with contextlib.suppress(OSError):
            self._link.close()
        self._thread.join(5)

    def wait(self, what: str, value: Any, timeout: float = 20) -> None:
        """Until the client has sent this."""

        def seen() -> bool:
            return any(kind == what and value in (None, said) for kind, said in self.told)

        with self.news:
            assert self.news.wait_for(seen, timeout * PATIENCE), (what, value, self.told)

    def send(self, packet_id: int) -> None:
        """Give the client a request that it must refuse, named after its packet."""
        payload = json.dumps({"id": f"r{packet_id}", "prompt": "x", "max_tokens": 0}).encode()
        topic = f"{BASE}/dut/in/text/c".encode()
        head = struct.pack("!H", len(topic)) + topic + struct.pack("!HB", packet_id, 0)
        self._write(PUBLISH | 2, head + payload)

    def acknowledge(self) -> None:
        """Take everything that was published so far."""
        with self.news:
            owed, self._unacknowledged = self._unacknowledged, []
        for packet_id in owed:
            self._write(PUBACK, packet_id)

    def _write(self, kind: int, body: bytes) -> None:
        length, size = b"", len(body)
        while True:
            size, digit = divmod(size, 128)
            length += bytes([digit | (0x80 if size else 0)])
            if not size:
                break
        self._link.sendall(bytes([kind]) + length + body)

    def _serve(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            self._link, _ = self._listener.accept()
            self._link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stream = self._link.makefile("rb")
            while True:
                self._take(*_read(stream))

    def _take(self, kind: int, body: bytes) -> None:
        match kind & 0xF0:
            case 0x10:
                self._write(CONNACK, bytes([0, 0, 3, 0x21, 0, 1]))  # Receive Maximum: 1
            case 0x80:
                filters = body.count(b"phid/")
                self._write(0x90, body[:2] + bytes([0]) + bytes([1] * filters))
            case 0xC0:
                self._write(0xD0, b"")
            case 0x30:
                topic_end = 2 + struct.unpack("!H", body[:2])[0]
                at = topic_end
                if kind & 6:
                    with self.news:
                        self._unacknowledged.append(body[at : at + 2])
                    at += 2
                said = json.loads(body[at + 1 + body[at] :] or b"{}")
                with self.news:
                    self.told.append(("publish", said.get("id") or said.get("state")))
                    self.news.notify_all()
            case 0x40:
                with self.news:
                    self.told.append(("ack", struct.unpack("!H", body[:2])[0]))
                    self.news.notify_all()


def _read(stream: Any) -> tuple[int, bytes]:
    kind = stream.read(1)
    if not kind:
        raise EOFError
    size, shift = 0, 0
    while True:
        digit = stream.read(1)[0]
        size |= (digit & 0x7F) << shift
        shift += 7
        if digit < 0x80:
            return kind[0], stream.read(size)


@pytest.fixture
def broker() -> Iterator[StingyBroker]:
    with StingyBroker() as broker:
        yield broker


@pytest.fixture
def daemon(broker: StingyBroker, tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(broker.port, tmp_path)
    daemon.start()
    yield daemon
    daemon.close()
    print(daemon.log[-4000:])


@pytest.mark.usefixtures("daemon")
def test_a_refusal_that_waits_for_its_turn_is_not_acknowledged_before_it_is_published(
    broker: StingyBroker,
) -> None:
    broker.wait("publish", None)  # and the broker does not take it: nothing else may follow
    for packet_id in (1, 2, 3):
        broker.send(packet_id)
    time.sleep(0.5)
    assert not [said for said in broker.told if said[0] == "ack"]
    deadline = time.monotonic() + 20 * PATIENCE
    while ("ack", 3) not in broker.told and time.monotonic() < deadline:
        broker.acknowledge()
        time.sleep(0.01)
    order = [said for said in broker.told if said[1] in (1, 2, 3, "r1", "r2", "r3")]
    assert [n for kind, n in order if kind == "ack"] == [1, 2, 3]
    for n in (1, 2, 3):
        assert order.index(("publish", f"r{n}")) < order.index(("ack", n)), order


def test_what_comes_when_all_is_said_is_left_to_the_next_start(
    broker: StingyBroker, daemon: Daemon
) -> None:
    broker.wait("publish", None)
    ended = threading.Event()

    def take_all() -> None:
        while not ended.wait(0.01):
            with contextlib.suppress(OSError):
                broker.acknowledge()

    taking = threading.Thread(target=take_all)
    taking.start()
    broker.wait("publish", "online")
    daemon.signal(signal.SIGTERM)
    broker.wait("publish", "offline")
    with contextlib.suppress(OSError):  # until the link is closed
        for packet_id in range(1, 1000):
            broker.send(packet_id)
            time.sleep(0.01)
    ended.set()
    taking.join()
    assert daemon.process is not None
    assert daemon.process.wait(20 * PATIENCE) == 0
    acknowledged = [n for kind, n in broker.told if kind == "ack"]
    answered = [said for kind, said in broker.told if kind == "publish"]
    assert not [n for n in acknowledged if f"r{n}" not in answered]


@pytest.mark.mosquitto
def test_no_request_is_lost_to_a_restart_whether_taken_or_refused(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    daemon = start_daemon(limits__drain_s=0.2)
    requester.listen(f"{BASE}/dut/out/status")
    prompt = '@script {"tokens": 5, "token_ms": 20}'
    asked: list[str] = []
    over = threading.Event()

    def keep_asking() -> None:
        while not over.is_set():
            asked.append(f"r{len(asked)}")
            requester.request({"id": asked[-1], "prompt": prompt})
            over.wait(0.01)

    asking = threading.Thread(target=keep_asking)
    asking.start()
    for _ in range(2):
        time.sleep(0.3)
        daemon.stop()
        daemon.start()
        requester.status("online")
    time.sleep(0.2)
    over.set()
    asking.join()

    def outcomes() -> list[dict[str, Any]]:
        return [h.json for h in requester.heard if h.type in ("result", "error")]

    until(
        lambda: {outcome["id"] for outcome in outcomes()} >= set(asked),
        what=f"an outcome of all {len(asked)}",
    )
    # One that a stop left without the broker's word is sent again by the next start, and marked.
    once = Counter(outcome["id"] for outcome in outcomes() if not outcome.get("duplicate"))
    assert set(once.values()) == {1}


# QoS 2, at which we do not subscribe. A broker may have a subscription of another program's for our
# client id, or make one by itself.


@pytest.mark.mosquitto
def test_what_is_published_at_qos_2_is_answered_once(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    daemon = start_daemon()
    requester.request({"id": "r", "prompt": "once"}, qos=2)
    assert requester.outcome("r")["text"] == "once"
    daemon.stop()
    daemon.start()
    assert requester.ask("still here?")["text"] == "still here?"
    assert len(requester.outcomes("r")) == 1
    assert not daemon.logged("qos_2_received")


@pytest.mark.mosquitto
def test_what_comes_at_qos_2_is_answered_once_and_told(
    start_daemon: DaemonFactory, requester: Requester, mosquitto: Mosquitto
) -> None:
    with Requester(mosquitto.port, name="phid-dut", session_expiry_s=3600) as another:
        another.listen(f"{BASE}/dut/in/#", "cam/door", qos=2)
    for n in range(3):
        requester.request({"id": f"r{n}", "prompt": f"answer {n}"}, qos=2)
    requester.publish("cam/door", b"x", qos=2)
    daemon = start_daemon()
    for n in range(3):
        assert requester.outcome(f"r{n}")["text"] == f"answer {n}"
    requester.publish("cam/door", b"x", qos=2)
    assert requester.ask("still here?")["text"] == "still here?"
    assert len(daemon.logged("qos_2_received", level="warning")) == 1
    assert not daemon.logged("broker_away")
    daemon.stop()
    daemon.start()
    assert requester.ask("and again?")["text"] == "and again?"
    assert [len(requester.outcomes(f"r{n}")) for n in range(3)] == [1, 1, 1]
    assert not daemon.logged("broker_away")


def test_at_qos_2_the_broker_hears_that_we_have_it_behind_the_answer(tmp_path: Path) -> None:
    told: queue.SimpleQueue[tuple[int, bytes]] = queue.SimpleQueue()
    question = json.dumps({"id": "r", "prompt": "x", "max_tokens": 0}).encode()

    def serve(connection: socket.socket, packets: Iterator[tuple[int, bytes]]) -> None:
        for head, body in packets:
            match head >> 4:
                case 1:
                    connection.sendall(connack())
                case 8:
                    connection.sendall(suback(body, body.count(b"phid/")))
                    # One that an earlier connection had received, and one that is new.
                    connection.sendall(bytes([PUBREL, 2, 0, 9]))
                    connection.sendall(publish(f"{BASE}/dut/in/text/c", question, 7, qos=2))
                case 5:
                    told.put((head, body))
                    connection.sendall(bytes([PUBREL, 2, *body[:2]]))
                case 7:
                    told.put((head, body))
                case 3 if b'"r"' in body:
                    told.put((head, b"answer"))

    with FewWords(serve) as broker:
        daemon = Daemon(broker.port, tmp_path)
        daemon.start()
        try:
            came = [told.get(timeout=10 * PATIENCE) for _ in range(4)]
        finally:
            daemon.close()
    assert came == [
        (PUBCOMP, b"\0\x09"),
        (PUBLISH | 2, b"answer"),
        (PUBREC, b"\0\x07"),
        (PUBCOMP, b"\0\x07"),
    ]
