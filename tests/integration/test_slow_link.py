"""A link that carries bytes is not dead, however slow it is."""

from __future__ import annotations

import queue
import socket
import time
from collections.abc import Iterator

import pytest

from few_words import FewWords, connack, publish, suback
from phid import broker
from phid.sections import Mqtt
from phid.session import Session
from phid.traffic import BrokerEvent, Connected, Disconnected, Endpoint, Inbound
from wire import PATIENCE

LARGE = publish("in", bytes(3000), 7)


class Us:
    """Our side of a connection to such a broker: what it tells, and what it receives."""

    def __init__(self, port: int, **settings: object) -> None:
        mqtt = Mqtt(host="127.0.0.1", port=port).model_copy(update=settings)
        self.events: queue.SimpleQueue[BrokerEvent] = queue.SimpleQueue()
        self.received: queue.SimpleQueue[Inbound] = queue.SimpleQueue()
        endpoint = Endpoint(mqtt, "us", ("in",), keep_session=True)
        self._session = Session(endpoint, self.events.put, self.received.put)
        self._session.start()

    def event(self) -> BrokerEvent:
        return self.events.get(timeout=10 * PATIENCE)

    def stop(self) -> None:
        self._session.stop()


def slowly(connection: socket.socket, packet: bytes, seconds: float) -> None:
    """Send it in pieces over this time."""
    for at in range(0, len(packet), 100):
        connection.sendall(packet[at : at + 100])
        time.sleep(seconds * 100 / len(packet))


def test_what_waited_for_us_may_take_longer_than_a_broker_may_be_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It comes before the word that we are subscribed."""
    monkeypatch.setattr(broker, "_CONNECT_TIMEOUT_S", 1.0)

    def serve(connection: socket.socket, packets: Iterator[tuple[int, bytes]]) -> None:
        for header, body in packets:
            if header >> 4 == 1:
                connection.sendall(connack())
            elif header >> 4 == 8:
                slowly(connection, LARGE, 3.0)
                connection.sendall(suback(body))

    with FewWords(serve) as slow:
        us = Us(slow.port)
        try:
            assert isinstance(us.event(), Connected)
            assert len(us.received.get(timeout=PATIENCE).payload) == 3000
        finally:
            us.stop()


def test_a_broker_that_falls_silent_before_it_has_subscribed_us_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(broker, "_CONNECT_TIMEOUT_S", 1.0)

    def serve(connection: socket.socket, packets: Iterator[tuple[int, bytes]]) -> None:
        for header, _ in packets:
            if header >> 4 == 1:
                connection.sendall(connack() + LARGE[:500])

    with FewWords(serve) as mute:
        us = Us(mute.port)
        try:
            lost = us.event()
            assert isinstance(lost, Disconnected)
            assert "did not answer within 1 s" in lost.reason
        finally:
            us.stop()


def test_a_message_that_takes_longer_than_the_keepalive_is_received() -> None:
    """The answer to a ping comes behind it."""

    def serve(connection: socket.socket, packets: Iterator[tuple[int, bytes]]) -> None:
        for header, body in packets:
            if header >> 4 == 1:
                connection.sendall(connack())
            elif header >> 4 == 8:
                connection.sendall(suback(body))
                slowly(connection, LARGE, 4.0)
            elif header >> 4 == 12:
                connection.sendall(b"\xd0\0")

    with FewWords(serve) as slow:
        us = Us(slow.port, keepalive_s=2)  # paho pings each second, and waits for another
        try:
            assert isinstance(us.event(), Connected)
            assert len(us.received.get(timeout=10 * PATIENCE).payload) == 3000
            time.sleep(2.5)  # the ping is answered, and the link lives on
            assert us.events.empty()
        finally:
            us.stop()
