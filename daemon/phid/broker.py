"""The session with the MQTT broker: connects, reconnects, receives, publishes. paho's one home."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from phid import log

_CONNECT_TIMEOUT_S = 10.0
_RECEIVE_MAXIMUM = 20
_FIRST_PAUSE_S = 0.5
# A connection that held this long was a good one: the next failure starts from the first pause.
_GOOD_CONNECTION_S = 30.0
_log = log.get("broker")


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker publishes, retained, when the connection is lost."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Which broker, and as whom; `will` makes the will of each connection from its name.

    `session_expiry_s` 0 leaves nothing at the broker; `packet_bytes` is the most we take.
    """

    host: str
    port: int
    client_id: str
    filters: tuple[str, ...]
    username: str | None = None
    password: str | None = None
    keepalive_s: int = 30
    session_expiry_s: int = 0
    packet_bytes: int = 16_777_216
    reconnect_max_s: float = 60.0
    will: Callable[[str], Will] | None = None


@dataclass(frozen=True, slots=True)
class Inbound:
    """A message from the broker, with the MQTT 5 properties that mean something to us."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    dup: bool
    response_topic: str | None = None
    correlation: bytes | None = None
    expiry_s: int | None = None
    content_type: str | None = None
    user: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Connected:
    """The broker has taken the connection and the subscriptions.

    `session` names this connection, `resumed` says the broker had kept our session, `refused`
    are the filters it would not grant, `packet_bytes` and `window` are its limits.
    """

    link: Link
    session: str
    resumed: bool
    refused: tuple[str, ...]
    packet_bytes: int
    window: int


@dataclass(frozen=True, slots=True)
class Disconnected:
    """There is no connection: why, and when the next attempt is made. Also after a failed one."""

    reason: str
    retry_s: float


@dataclass(frozen=True, slots=True)
class Sent:
    """A publication left: written to the socket (QoS 0) or acknowledged (QoS 1)."""

    session: str
    mid: int


BrokerEvent = Connected | Disconnected | Sent


class Link:
    """One live connection, to publish on; useless, but harmless, once it is lost."""

    def __init__(self, client: paho.Client, session: str) -> None:
        self.session = session
        self._client = client

    def publish(  # one MQTT PUBLISH has this many parts
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
        properties = Properties(PacketTypes.PUBLISH)
        properties.ContentType = "application/json"
        if correlation is not None:
            properties.CorrelationData = correlation
        if response_topic is not None:
            properties.ResponseTopic = response_topic
        if expiry_s is not None:
            properties.MessageExpiryInterval = expiry_s
        if user:
            properties.UserProperty = list(user)
        return self._client.publish(topic, payload, qos, retain, properties).mid


class Session:
    """Keeps one connection to the broker, for as long as it takes.

    `post` gets every BrokerEvent and `receive` every Inbound, both on paho's thread: `post` must
    not wait; the message is acknowledged to the broker when `receive` returns.

    A connection is one paho client, thrown away when it ends: paho repeats what it had not had
    acknowledged without marking it, has no jitter, and keeps what was queued for a dead link.
    What must outlive a connection is kept, marked and sent again by whoever published it.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        post: Callable[[BrokerEvent], None],
        receive: Callable[[Inbound], None],
    ) -> None:
        self._endpoint = endpoint
        self._post = post
        self._receive = receive
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="broker", daemon=True)
        self._name = f"{random.getrandbits(32):08x}"

    def start(self) -> None:
        """Connect, in the background; events follow."""
        self._thread.start()

    def stop(self, timeout_s: float = 2.0) -> None:
        """Disconnect so that the will is not sent; what is not yet written may be lost."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        failures = 0
        count = 0
        while not self._stopping.is_set():
            count += 1
            began = time.monotonic()
            connection = _Connection(
                self._endpoint, f"{self._name}-{count}", self._post, self._receive
            )
            reason = connection.run(self._stopping)
            if self._stopping.is_set():
                return
            failures = 1 if time.monotonic() - began > _GOOD_CONNECTION_S else failures + 1
            ceiling = min(self._endpoint.reconnect_max_s, _FIRST_PAUSE_S * 2 ** min(failures, 16))
            # Half fixed, half random: a fleet that lost its broker together comes back apart.
            pause = ceiling / 2 + random.uniform(0, ceiling / 2)  # noqa: S311
            self._post(Disconnected(reason, pause))
            self._stopping.wait(pause)


class _Connection:
    """One attempt to connect and what comes of it; used once."""

    def __init__(
        self,
        endpoint: Endpoint,
        session: str,
        post: Callable[[BrokerEvent], None],
        receive: Callable[[Inbound], None],
    ) -> None:
        self._endpoint = endpoint
        self._session = session
        self._post = post
        self._receive = receive
        self._reason = ""
        self._subscribed = threading.Event()
        self._ended = threading.Event()
        self._resumed = False
        self._packet_bytes = 268_435_455  # MQTT's own ceiling
        self._window = _RECEIVE_MAXIMUM
        self._client = self._make_client()

    def run(self, stopping: threading.Event) -> str:
        """Why the connection ended, once it has; or could not be made."""
        where = f"{self._endpoint.host}:{self._endpoint.port}"
        try:
            self._client.connect(
                self._endpoint.host,
                self._endpoint.port,
                self._endpoint.keepalive_s,
                clean_start=self._endpoint.session_expiry_s == 0,
                properties=self._connect_properties(),
            )
        except (OSError, ValueError) as error:
            return f"no broker at {where}: {error}"
        self._client.loop_start()
        threads = [t for t in threading.enumerate() if t.name.startswith("paho-mqtt-client")]
        late = time.monotonic() + _CONNECT_TIMEOUT_S
        while not self._ended.wait(0.2):
            if stopping.is_set():
                self._client.disconnect()
                self._ended.wait(1.0)
                break
            if not self._subscribed.is_set() and time.monotonic() > late:
                self._end(f"the broker at {where} did not answer within {_CONNECT_TIMEOUT_S:.0f} s")
            if not any(t.is_alive() for t in threads):
                self._end("the network thread died")
        # Else loop_stop waits for ever for acknowledgements that cannot come.
        self._client.drop_out_messages()
        self._client.disconnect()
        self._client.loop_stop()
        return self._reason or "connection lost"

    def _make_client(self) -> paho.Client:
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._endpoint.client_id,
            protocol=paho.MQTTv5,
            reconnect_on_failure=False,
        )
        client.connect_timeout = _CONNECT_TIMEOUT_S
        if self._endpoint.username is not None:
            client.username_pw_set(self._endpoint.username, self._endpoint.password)
        if self._endpoint.will is not None:
            will = self._endpoint.will(self._session)
            client.will_set(will.topic, will.payload, qos=1, retain=True)
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        return client

    def _connect_properties(self) -> Properties:
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = self._endpoint.session_expiry_s
        properties.ReceiveMaximum = _RECEIVE_MAXIMUM
        properties.MaximumPacketSize = self._endpoint.packet_bytes
        return properties

    def _end(self, reason: str) -> None:
        if not self._ended.is_set():
            self._reason = reason
            self._ended.set()

    # paho's thread. An exception here would end that thread in silence, so none leaves.

    def _on_connect(
        self,
        client: paho.Client,
        _userdata: Any,
        flags: paho.ConnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        try:
            if reason.is_failure:
                self._end(f"the broker refused: {reason}")
                return
            self._resumed = flags.session_present
            self._packet_bytes = getattr(properties, "MaximumPacketSize", self._packet_bytes)
            self._window = min(self._window, getattr(properties, "ReceiveMaximum", self._window))
            client.subscribe([(f, 1) for f in self._endpoint.filters])
        except Exception as error:  # noqa: BLE001 - see above
            _log.exception("callback_failed", callback="on_connect")
            self._end(f"fault in on_connect: {type(error).__name__}")

    def _on_subscribe(
        self,
        client: paho.Client,
        _userdata: Any,
        _mid: int,
        reasons: list[ReasonCode],
        _properties: Properties | None,
    ) -> None:
        pairs = zip(self._endpoint.filters, reasons, strict=False)
        self._subscribed.set()
        self._post(
            Connected(
                Link(client, self._session),
                self._session,
                resumed=self._resumed,
                refused=tuple(f for f, reason in pairs if reason.is_failure),
                packet_bytes=self._packet_bytes,
                window=self._window,
            )
        )

    def _on_disconnect(
        self,
        _client: paho.Client,
        _userdata: Any,
        _flags: paho.DisconnectFlags,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        self._end(f"connection lost: {reason}")

    def _on_publish(
        self,
        _client: paho.Client,
        _userdata: Any,
        mid: int,
        _reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        self._post(Sent(self._session, mid))

    def _on_message(self, _client: paho.Client, _userdata: Any, message: paho.MQTTMessage) -> None:
        try:
            self._receive(_inbound(message))
        except Exception:  # noqa: BLE001 - see above
            _log.exception("callback_failed", callback="on_message")


def _inbound(message: paho.MQTTMessage) -> Inbound:
    properties = message.properties
    return Inbound(
        topic=message.topic,
        payload=bytes(message.payload),
        qos=message.qos,
        retain=message.retain,
        dup=message.dup,
        response_topic=getattr(properties, "ResponseTopic", None),
        correlation=getattr(properties, "CorrelationData", None),
        expiry_s=getattr(properties, "MessageExpiryInterval", None),
        content_type=getattr(properties, "ContentType", None),
        user=tuple(getattr(properties, "UserProperty", ())),
    )
