"""The embedded broker as `phid broker` runs it: what phid needs of MQTT 5 works on it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import paho.mqtt.client as paho
import psutil
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from rig import ROOT, child_pids, free_port, until
from wire import PATIENCE

BROKER = [sys.executable, "-m", "phid", "broker"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "daemon")}


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def broker(port: int) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*BROKER, "--port", str(port)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == f"listening on 127.0.0.1:{port}, MQTT 5 only\n"
    yield process
    process.terminate()
    process.communicate(timeout=10 * PATIENCE)


class Peer:
    """A paho client that keeps what it is sent."""

    def __init__(self, port: int, name: str, will: str | None = None) -> None:
        self.got: list[paho.MQTTMessage] = []
        self.subscribed = False
        self.client = paho.Client(
            paho.CallbackAPIVersion.VERSION2, client_id=name, protocol=paho.MQTTv5
        )
        if will is not None:
            self.client.will_set(will, b"gone", qos=1, retain=True)
        self.client.on_message = lambda _client, _userdata, message: self.got.append(message)
        self.client.on_subscribe = self._on_subscribe
        self.client.connect("127.0.0.1", port, 30)
        self.client.loop_start()
        until(self.client.is_connected, 10, f"{name}'s connection")

    def _on_subscribe(self, *_: object) -> None:
        self.subscribed = True

    def listen(self, topic: str) -> None:
        self.subscribed = False
        self.client.subscribe(topic, 1)
        until(lambda: self.subscribed, 10, f"the subscription to {topic}")

    def next(self) -> paho.MQTTMessage:
        until(lambda: self.got, 10, "a message")
        return self.got.pop(0)

    def vanish(self) -> None:
        """Be gone without a DISCONNECT."""
        connection = self.client.socket()
        assert connection is not None
        self.client.loop_stop()
        connection.shutdown(socket.SHUT_RDWR)
        self.close()

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()
        self.client._reset_sockets()  # else its own pair is left to the garbage collector


@pytest.fixture
def peers(broker: subprocess.Popen[str], port: int) -> Iterator[tuple[Peer, Peer]]:
    here, there = Peer(port, "here"), Peer(port, "there", will="there/status")
    yield here, there
    here.close()
    there.close()


def test_a_request_carries_its_properties_there_and_its_answer_comes_back(
    peers: tuple[Peer, Peer],
) -> None:
    asker, answerer = peers
    asker.listen("asker/rx")
    answerer.listen("questions")
    asked = Properties(PacketTypes.PUBLISH)
    asked.ResponseTopic = "asker/rx"
    asked.CorrelationData = b"\x00\xff7"
    asked.ContentType = "image/jpeg"
    asked.MessageExpiryInterval = 60
    asked.UserProperty = [("id", "q1"), ("id", "q2")]
    asker.client.publish("questions", b"why?", qos=1, properties=asked)

    seen = answerer.next()
    properties = seen.properties
    assert properties is not None
    assert (seen.payload, seen.qos) == (b"why?", 1)
    assert properties.ContentType == "image/jpeg"
    assert 0 < properties.MessageExpiryInterval <= 60
    assert properties.UserProperty == [("id", "q1"), ("id", "q2")]

    answer = Properties(PacketTypes.PUBLISH)
    answer.CorrelationData = properties.CorrelationData
    answerer.client.publish(properties.ResponseTopic, b"because", qos=1, properties=answer)
    heard = asker.next()
    assert heard.payload == b"because"
    assert heard.properties is not None
    assert heard.properties.CorrelationData == b"\x00\xff7"


def test_a_frame_of_eight_megabytes_arrives_whole(peers: tuple[Peer, Peer]) -> None:
    camera, device = peers
    device.listen("frames")
    frame = os.urandom(1 << 20) * 8
    camera.client.publish("frames", frame, qos=1)
    assert device.next().payload == frame


def test_a_retained_status_reaches_who_comes_later_and_an_empty_one_clears_it(
    peers: tuple[Peer, Peer], port: int
) -> None:
    device, fleet = peers
    device.client.publish("device/status", b"online", qos=1, retain=True).wait_for_publish(10)
    fleet.listen("device/status")
    status = fleet.next()
    assert (status.payload, status.retain) == (b"online", True)

    device.client.publish("device/status", b"", qos=1, retain=True).wait_for_publish(10)
    assert fleet.next().payload == b""
    late = Peer(port, "late")
    try:
        late.listen("device/status")
        late.listen("marker")
        device.client.publish("marker", b"after", qos=1)
        assert late.next().topic == "marker"
    finally:
        late.close()


def test_the_will_of_a_device_that_vanishes_is_published_and_kept(
    peers: tuple[Peer, Peer], port: int
) -> None:
    fleet, device = peers
    fleet.listen("there/status")
    device.vanish()
    assert fleet.next().payload == b"gone"
    late = Peer(port, "late")
    try:
        late.listen("there/status")
        status = late.next()
        assert (status.payload, status.retain) == (b"gone", True)
    finally:
        late.close()


@pytest.mark.usefixtures("broker")
def test_a_client_of_mqtt_3_1_1_is_not_let_in(port: int) -> None:
    # One 3.1.1 client beside MQTT 5 ones would bring the broker down with the first property.
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.settimeout(10)
        connection.sendall(b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x3c\x00\x01a")
        try:
            said = connection.recv(4)
        except ConnectionResetError:
            said = b""
    assert said[3:] != b"\0"
    peer = Peer(port, "next")  # and it serves on
    peer.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_told_to_stop_it_frees_its_port_and_leaves_no_process(
    broker: subprocess.Popen[str], port: int, number: int
) -> None:
    children = child_pids(broker.pid)
    assert children
    broker.send_signal(number)
    assert broker.wait(10 * PATIENCE) == 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    until(lambda: not any(psutil.pid_exists(pid) for pid in children), 10, "the end of all")


@pytest.mark.usefixtures("broker")
def test_a_taken_port_is_told_in_one_line(port: int) -> None:
    second = subprocess.run(
        [*BROKER, "--port", str(port)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=30 * PATIENCE,
        check=False,
    )
    assert second.returncode == 1
    assert second.stderr.startswith(f"phid broker: no broker on 127.0.0.1:{port}: ")
    assert "Address already in use" in second.stderr
    assert second.stderr.count("\n") == 1


def test_without_its_package_it_says_what_to_install(port: int) -> None:
    hidden = (
        "import sys; sys.modules['iotcore'] = None\n"
        "from phid import embedded\n"
        f"sys.exit(embedded.run('127.0.0.1', {port}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", hidden],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=30 * PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "pip install 'phid[demo]'" in done.stderr
