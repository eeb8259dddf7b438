"""A requester's side of the wire: a session of its own, for phid ask and phid fleet."""

from __future__ import annotations

import queue
import time
import uuid
from types import TracebackType
from typing import Self

from phid import settings as settings_module
from phid.broker import BrokerEvent, Connected, Disconnected, Endpoint, Inbound, Link, Session
from phid.settings import Mqtt


class Unreachable(Exception):  # noqa: N818 - it reads as what it says
    """There is no broker to talk to; the message says where it was looked for."""


class Client:
    """A connection to the broker for one command, closed at its end.

    `name` is its level in the topics. Nothing of it stays at the broker.
    """

    def __init__(self, mqtt: Mqtt, filters: tuple[str, ...], *, name: str | None = None) -> None:
        self.name = name or f"cli-{uuid.uuid4().hex[:8]}"
        self._inbox: queue.SimpleQueue[BrokerEvent | Inbound] = queue.SimpleQueue()
        endpoint = Endpoint(
            host=mqtt.host,
            port=mqtt.port,
            client_id=f"phid-{self.name}",
            filters=filters,
            username=mqtt.username,
            password=settings_module.password(mqtt),
            packet_bytes=mqtt.packet_bytes,
        )
        self._session = Session(endpoint, self._inbox.put, self._inbox.put)
        self._link: Link | None = None

    def connect(self, timeout_s: float) -> None:
        """Connect and subscribe. Raises Unreachable with the reason when time is up."""
        self._session.start()
        late = time.monotonic() + timeout_s
        reason = "no answer"
        while (left := late - time.monotonic()) > 0:
            try:
                event = self._inbox.get(timeout=left)
            except queue.Empty:
                break
            if isinstance(event, Connected):
                self._link = event.link
                return
            if isinstance(event, Disconnected):
                reason = event.reason
        raise Unreachable(reason)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._session.stop()

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        response_topic: str | None = None,
        expiry_s: int | None = None,
    ) -> None:
        """Publish at QoS 1, without waiting for the broker."""
        assert self._link is not None
        self._link.publish(topic, payload, response_topic=response_topic, expiry_s=expiry_s)

    def receive(self, until: float) -> Inbound | None:
        """The next message; None when there is none until then (monotonic seconds).

        Raises Unreachable when the connection is lost.
        """
        while (left := until - time.monotonic()) > 0:
            try:
                event = self._inbox.get(timeout=left)
            except queue.Empty:
                return None
            if isinstance(event, Inbound):
                return event
            if isinstance(event, Disconnected):
                raise Unreachable(event.reason)
        return None
