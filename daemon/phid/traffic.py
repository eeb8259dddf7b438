"""What passes between the broker and the rest: connections made and lost, messages in and out."""

from __future__ import annotations

import threading
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from phid.sections import Mqtt


class Protocol(Enum):
    """The versions of MQTT we speak, by their protocol level on the wire."""

    V311 = 4
    V5 = 5


class End(Enum):
    """Why a connection ended, as far as it matters for the next one."""

    LOST = "lost"
    UNREACHABLE = "unreachable"
    NO_SUCH_PROTOCOL = "no such protocol"
    NOT_LET_IN = "not let in"
    TAKEN_OVER = "taken over"


@dataclass(frozen=True, slots=True)
class Ended:
    """How a connection ended, in words for people too."""

    end: End
    reason: str


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker publishes, retained, when the connection is lost."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Which broker to connect to, as whom, and which topics to hear.

    `keep_session` has the broker keep messages for us while we are away; `will` makes the will of
    each connection from its name.
    """

    mqtt: Mqtt
    client_id: str
    filters: tuple[str, ...]
    keep_session: bool = False
    will: Callable[[str], Will] | None = None

    @property
    def where(self) -> str:
        """The broker's address, for people and as a key."""
        mqtt = self.mqtt
        return mqtt.host if mqtt.transport == "unix" else f"{mqtt.host}:{mqtt.port}"


@dataclass(frozen=True, slots=True)
class Inbound:
    """A message from the broker, with the MQTT 5 properties that mean something to us.

    `fault` says why the properties cannot be read, or not all of them.
    """

    topic: str
    payload: bytes
    qos: int
    retain: bool
    dup: bool
    response_topic: str | None = None
    correlation: bytes | None = None
    expiry_s: int | None = None
    user: tuple[tuple[str, str], ...] = ()
    fault: str | None = None


class Decision(threading.Event):
    """Set when the owner has decided on a message, and the next may be read.

    The message is acknowledged to the broker then, unless an answer to it is `owed`: one that waits
    for its place among the publications in flight. If the link breaks first, the broker sends the
    message again. `awaited` is False for one of QoS 0, which is not acknowledged at all.
    """

    def __init__(self, *, awaited: bool = True) -> None:
        super().__init__()
        self.awaited = awaited
        self.owed = False

    @property
    def acknowledges(self) -> bool:
        """True once the broker may forget the message."""
        return self.is_set() and not self.owed


class Link(typing.Protocol):
    """One live connection, to publish on; useless, but harmless, once it is lost."""

    session: str

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        correlation: bytes | None = None,
        response_topic: str | None = None,
        expiry_s: int | None = None,
        user: Sequence[tuple[str, str]] = (),
    ) -> int:
        """The message id that a later Sent names; does not wait for the network."""

    def subscribe(self, filters: Sequence[str]) -> int:
        """Hear these too, at QoS 0, without retained ones: the id that a later Subscribed names."""

    def unsubscribe(self, filters: Sequence[str]) -> None:
        """Hear these no more; nobody waits for the broker's word on it."""


@dataclass(frozen=True, slots=True)
class Connected:
    """The broker has taken the connection and the subscriptions.

    `session` names this connection, `resumed` says the broker had kept our session, `refused`
    are the filters it would not grant, `packet_bytes` and `window` are its limits; `beside`: one
    more than `window` may be on its way.
    """

    link: Link
    session: str
    protocol: Protocol
    resumed: bool
    refused: tuple[str, ...]
    packet_bytes: int
    window: int
    beside: bool = True


@dataclass(frozen=True, slots=True)
class Disconnected:
    """There is no connection, or an attempt has failed: why, and when the next one is made.

    `refused`: the broker does not let us in as who we say we are.
    """

    reason: str
    retry_s: float
    refused: bool = False


@dataclass(frozen=True, slots=True)
class TakenOver:
    """Another client uses our client id: this session is over and does not come back."""

    reason: str


@dataclass(frozen=True, slots=True)
class Sent:
    """A publication left: written to the socket (QoS 0) or acknowledged (QoS 1).

    `refusal` is why the broker did not take it; None if it did. `heard` is False if it says
    that nobody is subscribed to the topic.
    """

    session: str
    mid: int
    refusal: str | None = None
    heard: bool = True


@dataclass(frozen=True, slots=True)
class Subscribed:
    """The broker's answer to `Link.subscribe`: for each of its filters, True if it was granted."""

    session: str
    mid: int
    granted: tuple[bool, ...]


BrokerEvent = Connected | Disconnected | TakenOver | Sent | Subscribed
