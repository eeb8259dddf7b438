"""paho as we use it: whichever thread publishes writes to the socket, and `packets` reads."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Sequence
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from phid import packets
from phid.traffic import Inbound, Protocol

_EXACTLY_ONCE = 2


class Received(paho.MQTTMessage):
    """A message as our callbacks get it: `inbound` is all that was read of it."""

    def __init__(self, mid: int, inbound: Inbound) -> None:
        super().__init__(mid, inbound.topic.encode())
        self.qos = inbound.qos
        self.inbound = inbound


class SharedClient(paho.Client):
    """A client whose publishers write to the socket themselves, unless another thread is at it.

    While an engine fills the processors, waking the reading thread takes longer than writing.
    paho's `publish` writes by itself where the loop is not paho's own, but does not guard against
    another thread that does. `heard_at` is when something last came from the broker, if only a part
    of a message.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._at_the_socket = threading.RLock()
        self.heard_at = 0.0

    def loop_read(self, max_packets: int = 1) -> MQTTErrorCode:
        """Read and call back, as paho does; it calls this when something has come."""
        with self._at_the_socket:
            failed = super().loop_read(max_packets)
            self.heard_at = time.monotonic()
            return failed

    def loop_write(self) -> MQTTErrorCode:
        """Write what waits; if the socket is taken, paho's loop, which is awake, does it next."""
        if not self._at_the_socket.acquire(blocking=False):
            return MQTTErrorCode.MQTT_ERR_SUCCESS
        try:
            return super().loop_write()
        finally:
            self._at_the_socket.release()

    def want_write(self) -> bool:
        """Whether something waits; lets a publisher end first, for it may put something back."""
        with self._at_the_socket:
            return super().want_write()

    def loop_misc(self) -> MQTTErrorCode:
        """Keep the connection alive, or close it, while nobody writes."""
        with self._at_the_socket:
            return super().loop_misc()

    def acknowledge(self, mid: int, qos: int) -> None:
        """Tell the broker that we have this message.

        At QoS 2 by PUBREC; the broker then sends PUBREL, and we PUBCOMP (MQTT 5, 4.3.3). paho would
        only send the last for us.
        """
        if qos == _EXACTLY_ONCE:
            self._send_pubrec(mid)
        else:
            self.ack(mid, qos)

    def _handle_pubrel(self) -> MQTTErrorCode:
        """Let the broker use the number of a message at QoS 2 again, known to us or not."""
        (mid,) = struct.unpack_from("!H", self._in_packet["packet"])
        return self._send_pubcomp(mid)

    def _handle_publish(self) -> MQTTErrorCode:
        """Call back with a message.

        paho would copy the rest of the packet, payload included, twice for each property, and with
        the GIL held: a few thousand of them stop every thread for a second.
        """
        head, packet = self._in_packet["command"], self._in_packet["packet"]
        if head >> 1 & 3 > _EXACTLY_ONCE:
            return MQTTErrorCode.MQTT_ERR_PROTOCOL
        mqtt_5 = self._protocol == MQTTProtocolVersion.MQTTv5
        mid, inbound = packets.read_publish(head, packet, mqtt_5=mqtt_5)
        self._handle_on_message(Received(mid, inbound))
        return MQTTErrorCode.MQTT_ERR_SUCCESS


class PahoLink:
    """A `Link` by paho."""

    def __init__(self, client: paho.Client, session: str, protocol: Protocol) -> None:
        self.session = session
        self._client = client
        self._protocol = protocol

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
        """The message id that a later Sent names; does not wait for the network.

        MQTT 3.1.1 has no properties: what they say must be in the payload too.
        """
        if self._protocol is Protocol.V311:
            return self._client.publish(topic, payload, qos, retain).mid
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

    def subscribe(self, filters: Sequence[str]) -> int:
        """Hear these too, at QoS 0 and without what is retained: the id a later Subscribed names.

        For what is worth nothing once it is old: a broker keeps none of it while we are away.
        """
        if self._protocol is Protocol.V311:
            wanted: list[Any] = [(f, 0) for f in filters]
        else:
            options = SubscribeOptions(qos=0, retainHandling=SubscribeOptions.RETAIN_DO_NOT_SEND)
            wanted = [(f, options) for f in filters]
        return self._client.subscribe(wanted)[1] or 0

    def unsubscribe(self, filters: Sequence[str]) -> None:
        """Hear these no more."""
        self._client.unsubscribe(list(filters))
