"""What goes out on a connection: whole, at once, whichever thread publishes."""

from __future__ import annotations

import queue
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import paho.mqtt.client as paho
import pytest

from phid.broker import Connection
from phid.sections import Mqtt
from phid.traffic import BrokerEvent, Connected, Endpoint, Inbound, Link, Protocol
from rig import Mosquitto
from wire import PATIENCE

# More than a socket on loopback takes at once.
LARGE = bytes(6_000_000)


@dataclass
class Ends:
    """Our end of a connection, and what comes out of it beyond the broker."""

    link: Link
    heard: queue.SimpleQueue[bytes] = field(default_factory=queue.SimpleQueue)

    def publish(self, payload: bytes) -> None:
        self.link.publish("out", payload, qos=0)


@pytest.fixture
def ends(mosquitto: Mosquitto) -> Iterator[Ends]:
    said: queue.SimpleQueue[BrokerEvent] = queue.SimpleQueue()
    endpoint = Endpoint(Mqtt(host="127.0.0.1", port=mosquitto.port), "us", ("in",))

    def ignore(_inbound: Inbound) -> None:
        pass

    connection = Connection(endpoint, Protocol.V5, "a session", said.put, ignore)
    stopping = threading.Event()
    thread = threading.Thread(target=connection.run, args=(stopping,), daemon=True)
    thread.start()
    connected = said.get(timeout=10 * PATIENCE)
    assert isinstance(connected, Connected)
    ends = Ends(connected.link)
    listener = paho.Client(paho.CallbackAPIVersion.VERSION2, "them", protocol=paho.MQTTv5)
    listener.on_message = lambda _client, _data, message: ends.heard.put(message.payload)
    subscribed = threading.Event()
    listener.on_subscribe = lambda *_: subscribed.set()
    listener.connect("127.0.0.1", mosquitto.port)
    listener.loop_start()
    listener.subscribe("out")
    assert subscribed.wait(10 * PATIENCE)
    yield ends
    listener.disconnect()
    listener.loop_stop()
    stopping.set()
    thread.join(10 * PATIENCE)


@pytest.mark.measures
def test_what_the_socket_takes_in_part_goes_on_as_soon_as_there_is_room(ends: Ends) -> None:
    """The session's thread looks by itself every 0.2 s only: one in five was as late once."""
    took = []
    for _ in range(40):
        time.sleep(0.03)  # let that thread fall asleep
        began = time.monotonic()
        ends.publish(LARGE)
        assert ends.heard.get(timeout=10 * PATIENCE) == LARGE
        took.append(time.monotonic() - began)
    late = statistics.median(took) + 0.15
    assert sum(seconds > late for seconds in took) < 4


def test_many_threads_publish_and_every_packet_arrives_whole(ends: Ends) -> None:
    """Each thread's in its order: to write is for one thread at a time."""
    threads, each = 4, 300

    def publish(thread: int) -> None:
        for n in range(each):
            ends.publish(f"{thread} {n} ".encode() + bytes(n * 97 % 20_000))

    writers = [threading.Thread(target=publish, args=(n,), daemon=True) for n in range(threads)]
    for writer in writers:
        writer.start()
    came: list[list[int]] = [[] for _ in range(threads)]
    for _ in range(threads * each):
        thread, number, rest = ends.heard.get(timeout=10 * PATIENCE).split(b" ", 2)
        assert len(rest) == int(number) * 97 % 20_000
        came[int(thread)].append(int(number))
    for writer in writers:
        writer.join(10 * PATIENCE)
    assert came == [list(range(each))] * threads
