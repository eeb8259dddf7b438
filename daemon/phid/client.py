"""A requester's side of the wire: a session of its own, for phid ask and phid fleet."""

from __future__ import annotations

import time
import uuid
from types import TracebackType
from typing import Self

from phid.mailbox import Mailbox
from phid.sections import Mqtt
from phid.session import Session
from phid.traffic import BrokerEvent, Connected, Disconnected, Endpoint, Inbound, Link, Sent


class Unreachable(Exception):  # noqa: N818 - it reads as what it says
    """There is no broker to talk to; the message says where it was looked for.

    `refused`: there is one, but it does not let us in.
    """

    def __init__(self, reason: str, *, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused


class Unheard(Exception):  # noqa: N818 - it reads as what it says
    """The broker says that nobody is subscribed to what was published."""


class Forbidden(Exception):  # noqa: N818 - it reads as what it says
    """The broker does not let us publish that; the message is its reason."""


class Client:
    """A connection to the broker for one command, closed at its end.

    `name` is its level in the topics; `refused_filters` are those the broker would not grant.
    Nothing of it stays at the broker.
    """

    def __init__(self, mqtt: Mqtt, filters: tuple[str, ...], *, name: str | None = None) -> None:
        self.name = name or f"cli-{uuid.uuid4().hex[:8]}"
        self._inbox: Mailbox[BrokerEvent | Inbound] = Mailbox()
        # Not made from the name: two clients may share it, and must not throw each other out.
        client_id = f"phid-cli-{uuid.uuid4().hex[:8]}"
        endpoint = Endpoint(mqtt, client_id=client_id, filters=filters)
        self._where = endpoint.where
        self._session = Session(endpoint, self._inbox.put, self._inbox.put)
        self._link: Link | None = None
        self._to_be_heard: set[int] = set()
        self.refused_filters: tuple[str, ...] = ()

    def connect(self, timeout_s: float, *, once: bool = False) -> None:
        """Connect and subscribe, trying again until time is up unless `once`.

        Raises Unreachable with the last reason.
        """
        self._session.start()
        late = time.monotonic() + timeout_s
        reason, refused = f"no answer from the broker at {self._where}", False
        while (left := late - time.monotonic()) > 0:
            event = self._inbox.get(left)
            if isinstance(event, Connected):
                self._link = event.link
                self.refused_filters = event.refused
                return
            if isinstance(event, Disconnected):
                reason, refused = event.reason, event.refused
                if once:
                    break
        raise Unreachable(reason, refused=refused)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._session.stop()
        self._inbox.close()

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        response_topic: str | None = None,
        correlation: bytes | None = None,
        expiry_s: int | None = None,
        must_be_heard: bool = False,
    ) -> int:
        """Publish at QoS 1, without waiting for the broker: the publication's number.

        With `must_be_heard`, `receive` raises Unheard when the broker says that nobody is
        subscribed, and Forbidden when it refuses the publication.
        """
        assert self._link is not None
        mid = self._link.publish(
            topic,
            payload,
            response_topic=response_topic,
            correlation=correlation,
            expiry_s=expiry_s,
        )
        if must_be_heard:
            self._to_be_heard.add(mid)
        return mid

    def wait_for(self, mid: int, timeout_s: float) -> None:
        """Wait until the broker has this publication, or time is up; what else comes is lost."""
        until = time.monotonic() + timeout_s
        while (left := until - time.monotonic()) > 0:
            event = self._inbox.get(left)
            if isinstance(event, Sent) and event.mid == mid:
                return

    def receive(self, until: float) -> Inbound | None:
        """The next message; None when none comes by `until` (monotonic seconds).

        Raises Unreachable when the connection is lost, Forbidden, and Unheard.
        """
        while (left := until - time.monotonic()) > 0:
            event = self._inbox.get(left)
            if isinstance(event, Inbound):
                return event
            if isinstance(event, Disconnected):
                raise Unreachable(event.reason)
            if isinstance(event, Sent) and event.mid in self._to_be_heard:
                if event.refusal is not None:
                    raise Forbidden(event.refusal)
                if not event.heard:
                    raise Unheard
        return None
