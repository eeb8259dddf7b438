"""One connection to the MQTT broker: made, received from, and how it ended."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from phid import credentials, log
from phid.link import PahoLink, Received, SharedClient
from phid.sections import MAX_PACKET_BYTES
from phid.settings import SettingsError
from phid.traffic import (
    BrokerEvent,
    Connected,
    Decision,
    End,
    Ended,
    Endpoint,
    Inbound,
    Protocol,
    Sent,
    Subscribed,
)

_CONNECT_TIMEOUT_S = 10.0
_GOODBYE_S = 1.0
_LOOK_S = 0.2
_RECEIVE_MAXIMUM = 20
# Published beside the outbox, and counted by a broker that limits what is in flight: the loopback's
# ping.
_BESIDE = 1
# Reason codes of MQTT 5, section 2.4; paho translates those of 3.1.1 to them.
_UNSUPPORTED_VERSION = 132
_NOT_LET_IN = frozenset({133, 134, 135, 138, 140})  # client id, password, rights, ban, method
_TAKEN_OVER = 142
_log = log.get("broker")


class Connection:
    """One attempt to connect and what comes of it; used once.

    A connection is one paho client, thrown away when it ends: paho repeats unacknowledged
    messages without marking them, has no jitter, and keeps what was queued for a dead link.
    What must outlive a connection is kept, marked and sent again by whoever published it.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        protocol: Protocol,
        session: str,
        post: Callable[[BrokerEvent], None],
        receive: Callable[[Inbound], Decision | None],
    ) -> None:
        self._endpoint = endpoint
        self._protocol = protocol
        self._session = session
        self._post = post
        self._receive = receive
        self._ended: Ended | None = None
        self._acknowledged = False
        self._subscribed = False
        self._resumed = False
        self._packet_bytes = MAX_PACKET_BYTES
        self._window = _RECEIVE_MAXIMUM
        self._socket: socket.socket | None = None
        self._received: deque[tuple[int, int, Decision | None]] = deque()
        self._told_qos_2 = False

    @property
    def acknowledged(self) -> bool:
        """True once the broker has said yes."""
        return self._acknowledged

    def run(self, stopping: threading.Event) -> Ended:
        """Run until the connection ends: how it ended, or why it could not be made."""
        where = self._endpoint.where
        try:
            client = self._make_client()
            self._connect(client)
        except SettingsError as error:
            return Ended(End.NOT_LET_IN, str(error))
        except ssl.SSLCertVerificationError as error:
            return credentials.not_trusted(where, error, time.time())
        except ssl.SSLError as error:
            return Ended(End.UNREACHABLE, f"no TLS at {where}: {error.reason or error}")
        except ConnectionResetError as error:
            what = "TLS" if self._endpoint.mqtt.tls else "broker"
            return Ended(End.UNREACHABLE, f"no {what} at {where}: {error}")
        except (OSError, ValueError) as error:
            return Ended(End.UNREACHABLE, f"no broker at {where}: {error}")
        began = time.monotonic()
        while self._ended is None and not stopping.is_set():
            # Messages that waited for us come before the SUBACK, and may take their time.
            silent_since = client.heard_at if self._acknowledged else began
            if not self._subscribed and time.monotonic() - silent_since > _CONNECT_TIMEOUT_S:
                why = f"the broker at {where} did not answer within {_CONNECT_TIMEOUT_S:.0f} s"
                self._end(End.UNREACHABLE, why)
            self._look(client)
        client.disconnect()
        late = time.monotonic() + _GOODBYE_S
        while self._ended is None and client.want_write() and time.monotonic() < late:
            self._look(client)
        return self._ended or Ended(End.LOST, "stopped")

    def _look(self, client: paho.Client) -> None:
        """Send and receive what is ready, or wait a moment for it."""
        try:
            failed = client.loop(_LOOK_S)
        except Exception as error:  # noqa: BLE001 - paho raises any for bytes it cannot read
            # A broker that is older than our protocol sends such bytes.
            end = End.LOST if self._acknowledged else End.NO_SUCH_PROTOCOL
            _log.debug("not_mqtt", error=repr(error))
            self._end(end, f"{self._endpoint.where} sent what is no MQTT {self._version}")
        else:
            if failed:
                self._end(End.LOST, f"connection lost: {paho.error_string(failed)}")

    @property
    def _version(self) -> str:
        return "5" if self._protocol is Protocol.V5 else "3.1.1"

    def _make_client(self) -> SharedClient:
        endpoint, mqtt = self._endpoint, self._endpoint.mqtt
        clean = None if self._protocol is Protocol.V5 else not endpoint.keep_session
        client = SharedClient(
            CallbackAPIVersion.VERSION2,
            client_id=endpoint.client_id,
            clean_session=clean,
            protocol=MQTTProtocolVersion(self._protocol.value),
            transport=mqtt.transport,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        # Else paho holds back what exceeds its own limit of 20, and sends later messages first.
        client.max_inflight_messages_set(0)
        client.connect_timeout = _CONNECT_TIMEOUT_S
        proof = credentials.read(mqtt)
        if proof.username is not None:
            client.username_pw_set(proof.username, proof.password)
        if proof.tls is not None:
            client.tls_set_context(proof.tls)
        if mqtt.transport == "websockets":
            client.ws_set_options(path=mqtt.websocket_path)
        if endpoint.will is not None:
            will = endpoint.will(self._session)
            client.will_set(will.topic, will.payload, qos=1, retain=True)
        client.on_socket_open = self._on_socket_open
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        return client

    def _connect(self, client: paho.Client) -> None:
        mqtt, keep = self._endpoint.mqtt, self._endpoint.keep_session
        # paho gives a link up after two silent intervals: one before its ping, one after it.
        ping_s = mqtt.keepalive_s * 3 // 4
        if self._protocol is Protocol.V311:
            client.connect(mqtt.host, mqtt.port, ping_s)
            return
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = mqtt.session_expiry_s if keep else 0
        properties.ReceiveMaximum = _RECEIVE_MAXIMUM
        properties.MaximumPacketSize = mqtt.packet_bytes
        client.connect(mqtt.host, mqtt.port, ping_s, clean_start=not keep, properties=properties)

    def _end(self, end: End, reason: str) -> None:
        if self._ended is None:
            self._ended = Ended(end, reason)

    # paho's callbacks, called by one thread at a time: the session's, or a publisher's after a
    # write. An exception that left one would be taken for paho's own, so none does.

    def _on_socket_open(
        self, _client: paho.Client, _userdata: Any, opened: paho.SocketLike
    ) -> None:
        """Turn off Nagle's algorithm: it holds an answer back until the last is acknowledged."""
        plain = getattr(opened, "_socket", opened)  # paho wraps a websocket's socket
        if isinstance(plain, socket.socket) and plain.family != getattr(socket, "AF_UNIX", None):
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket = plain

    def _acknowledge_now(self) -> None:
        """Have TCP acknowledge at once: brokers wait for our ACK, which Linux delays by 40 ms.

        They keep Nagle's algorithm on. The kernel forgets the option, so each arrival sets it anew.
        """
        if self._socket is not None and hasattr(socket, "TCP_QUICKACK"):
            with contextlib.suppress(OSError):  # it is being closed
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

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
                end = End.NOT_LET_IN if reason.value in _NOT_LET_IN else End.LOST
                if reason.value == _UNSUPPORTED_VERSION:
                    end = End.NO_SUCH_PROTOCOL
                self._end(end, f"the broker at {self._endpoint.where} refused: {reason}")
                return
            self._acknowledged = True
            self._resumed = flags.session_present
            self._packet_bytes = getattr(properties, "MaximumPacketSize", self._packet_bytes)
            self._window = min(self._window, getattr(properties, "ReceiveMaximum", self._window))
            client.subscribe([(f, 1) for f in self._endpoint.filters])
        except Exception as error:  # noqa: BLE001 - see above
            _log.exception("callback_failed", callback="on_connect")
            self._end(End.LOST, f"fault in on_connect: {type(error).__name__}")

    def _on_subscribe(
        self,
        client: paho.Client,
        _userdata: Any,
        mid: int,
        reasons: list[ReasonCode],
        _properties: Properties | None,
    ) -> None:
        if self._subscribed:
            granted = tuple(not reason.is_failure for reason in reasons)
            self._post(Subscribed(self._session, mid, granted))
            return
        pairs = zip(self._endpoint.filters, reasons, strict=False)
        self._subscribed = True
        limit = self._endpoint.mqtt.send_bytes or MAX_PACKET_BYTES
        self._post(
            Connected(
                PahoLink(client, self._session, self._protocol),
                self._session,
                self._protocol,
                resumed=self._resumed,
                refused=tuple(f for f, reason in pairs if reason.is_failure),
                packet_bytes=min(self._packet_bytes, limit),
                window=max(1, self._window - _BESIDE),
                beside=self._window > _BESIDE,
            )
        )

    def _on_disconnect(
        self,
        _client: paho.Client,
        _userdata: Any,
        flags: paho.DisconnectFlags,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        if not self._acknowledged:
            why = f"{self._endpoint.where} closed the connection on our MQTT {self._version}"
            self._end(End.NO_SUCH_PROTOCOL, why)
        elif flags.is_disconnect_packet_from_server and reason.value == _TAKEN_OVER:
            client_id = self._endpoint.client_id
            self._end(End.TAKEN_OVER, f"another client has connected as {client_id!r}")
        else:
            self._end(End.LOST, f"connection lost: {reason}")

    def _on_publish(
        self,
        client: paho.Client,
        _userdata: Any,
        mid: int,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        self._acknowledge_now()
        self._post(
            Sent(
                self._session,
                mid,
                refusal=str(reason) if reason.is_failure else None,
                heard=reason.value != 0x10,  # "no matching subscribers"
            )
        )
        self._acknowledge(client)

    def _on_message(self, client: paho.Client, _userdata: Any, message: paho.MQTTMessage) -> None:
        self._acknowledge_now()
        if message.qos > 1 and not self._told_qos_2:
            # We subscribe at QoS 1: another program has subscribed with our client id, or the
            # broker itself subscribes us. It is as good to us as QoS 1.
            self._told_qos_2 = True
            _log.warning("qos_2_received", client_id=self._endpoint.client_id)
        decision = None
        try:
            assert isinstance(message, Received)
            decision = self._receive(message.inbound)
        except Exception:  # noqa: BLE001 - see above
            _log.exception("callback_failed", callback="on_message")
        if message.qos:
            self._received.append((message.mid, message.qos, decision))
            self._acknowledge(client)

    def _acknowledge(self, client: paho.Client) -> None:
        """Acknowledge messages to the broker in the order in which they came (MQTT 5, 4.6).

        One whose answer still waits to be published holds up those behind it. `_on_publish` tries
        again: such an answer waits only for the broker to take others from us.
        """
        assert isinstance(client, SharedClient)
        while self._received:
            mid, qos, decision = self._received[0]
            if decision is not None and not decision.acknowledges:
                return
            self._received.popleft()
            client.acknowledge(mid, qos)
