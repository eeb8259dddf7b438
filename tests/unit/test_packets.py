from __future__ import annotations

import contextlib
import statistics
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from few_words import variable
from phid.packets import read_publish
from phid.traffic import Inbound
from wire import SLOWNESS

TOPIC = b"\0\x02in"
USER = b"\x26\0\x01a\0\x01b"
ANSWER_TO = b"\x08\0\x02rx"
QOS_1, DUP, RETAIN = 0x32, 8, 1


def packet(properties: bytes = b"", payload: bytes = b"what") -> bytes:
    return TOPIC + b"\0\x07" + variable(len(properties)) + properties + payload


def read(properties: bytes) -> Inbound:
    return read_publish(QOS_1, packet(properties), mqtt_5=True)[1]


def test_a_message_is_read_as_its_sender_wrote_it() -> None:
    said = Properties(PacketTypes.PUBLISH)
    said.PayloadFormatIndicator = 1
    said.MessageExpiryInterval = 2**32 - 1
    said.ContentType = "image/jpeg"
    said.ResponseTopic = "räx"
    said.CorrelationData = b"\0\xff"
    said.UserProperty = [("a", "b"), ("a", "c"), ("", "x" * 65535)]
    body = TOPIC + b"\x01\x00" + said.pack() + b"\0payload"
    assert read_publish(QOS_1 | DUP | RETAIN, bytearray(body), mqtt_5=True) == (
        256,
        Inbound(
            "in",
            b"\0payload",
            1,
            retain=True,
            dup=True,
            response_topic="räx",
            correlation=b"\0\xff",
            expiry_s=2**32 - 1,
            user=tuple(said.UserProperty),
        ),
    )


def test_at_qos_0_there_is_no_id_and_in_3_1_1_there_are_no_properties() -> None:
    plain = Inbound("in", b"", 0, retain=False, dup=False)
    assert read_publish(0x30, TOPIC + b"\0", mqtt_5=True) == (0, plain)
    assert read_publish(0x30, TOPIC, mqtt_5=False) == (0, plain)


def test_a_text_may_begin_with_a_byte_order_mark() -> None:
    """MQTT 5, 1.5.4: it is data like any other."""
    assert read(b"\x26\0\x01a" + b"\0\x04\xef\xbb\xbfb").user == (("a", "\ufeffb"),)


@pytest.mark.parametrize(
    ("properties", "fault"),
    [
        (USER * 1001, "more than 1000"),
        (b"\x26" + b"\xff\xff" + b"x" * 65535 + b"\xff\xff" + b"y" * 65535, None),
        ((b"\x26" + b"\xff\xff" + b"x" * 65535 + b"\0\0") * 16, "more than 1048576 bytes"),
        (USER[:-1], "cut off in the middle"),
        (b"\x26\0\x01a\0\x01\xff", "no UTF-8"),
        (b"\x26\0\x01a\0\x01\0", "a null"),
        (b"\x7f\0", "no number 127"),
        (b"\x0b\x80\x80\x80\x80\x01", "more than four bytes"),
    ],
)
def test_what_cannot_be_read_of_its_properties_keeps_nothing_else_from_being_read(
    properties: bytes, fault: str | None
) -> None:
    mid, inbound = read_publish(QOS_1, packet(ANSWER_TO + properties), mqtt_5=True)
    assert (mid, inbound.topic, inbound.payload) == (7, "in", b"what")
    assert inbound.response_topic == "rx"
    assert (fault or "None") in str(inbound.fault)
    assert len(inbound.user) <= 1000


@given(st.integers(0, 255), st.binary(max_size=60), st.booleans())
def test_whatever_comes_is_a_message_or_a_value_error(head: int, body: bytes, mqtt_5: bool) -> None:
    with contextlib.suppress(ValueError):
        read_publish(head, body, mqtt_5=mqtt_5)


@given(st.binary(max_size=60))
def test_whatever_the_properties_are_the_payload_is_behind_them(properties: bytes) -> None:
    assert read(properties).payload == b"what"


@pytest.mark.measures
@pytest.mark.parametrize(("properties", "payload"), [(20_000, 0), (500, 8_000_000), (4, 8_000_000)])
def test_no_number_of_properties_holds_the_interpreter_for_long(
    properties: int, payload: int
) -> None:
    body = packet(USER * properties, bytes(payload))
    ours, pahos = [], []
    for _ in range(5):
        began = time.thread_time()
        read_publish(QOS_1, bytearray(body), mqtt_5=True)
        ours.append(time.thread_time() - began)
        began = time.thread_time()
        Properties(PacketTypes.PUBLISH).unpack(bytearray(body[6:]))
        pahos.append(time.thread_time() - began)
    ours_ms, pahos_ms = statistics.median(ours) * 1000, statistics.median(pahos) * 1000
    print(f"{properties} properties, {payload} bytes: {ours_ms:.1f} ms, paho {pahos_ms:.1f} ms")
    assert ours_ms < 30 * SLOWNESS
