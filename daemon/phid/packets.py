"""A PUBLISH of MQTT as it comes: read by offsets, and of its properties no more than a bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from phid.traffic import Inbound

# Bounds for one message: reading so many takes milliseconds, and a request has a few dozen.
_MAX_PROPERTIES = 1000
_MAX_PROPERTY_BYTES = 1 << 20


def read_publish(head: int, packet: bytes | bytearray, *, mqtt_5: bool) -> tuple[int, Inbound]:
    """The id (0 at QoS 0) and the message of a packet: `head` is its first byte.

    `packet` is what follows its length. Raises ValueError where no message can be made out. A
    message whose properties are malformed, or too many, has a `fault` and those read before it.
    """
    qos = head >> 1 & 3
    rest = _Section(packet, 0, len(packet))
    # A topic that is no text is none of ours either: its sender is told so.
    topic = rest.take(rest.number(2)).decode("utf-8", "replace")
    mid = rest.number(2) if qos else 0
    said: dict[str, Any] = {}
    if mqtt_5:
        size = rest.variable()
        said = _properties(packet, rest.skip(size), rest.at)
    payload = bytes(memoryview(packet)[rest.at :])
    return mid, Inbound(topic, payload, qos, retain=bool(head & 1), dup=bool(head & 8), **said)


class _Section:
    """What is left of a part of a packet, taken from its front. Raises ValueError at its end."""

    def __init__(self, packet: bytes | bytearray, at: int, end: int) -> None:
        self.at = at
        self.end = end
        self._packet = packet

    def skip(self, size: int) -> int:
        """Where these bytes begin."""
        began = self.at
        if size > self.end - began:
            raise ValueError("cut off in the middle")
        self.at = began + size
        return began

    def take(self, size: int) -> bytes:
        began = self.skip(size)
        return bytes(self._packet[began : self.at])

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size))

    def variable(self) -> int:
        number = 0
        for shift in (0, 7, 14, 21):
            byte = self.number(1)
            number |= (byte & 127) << shift
            if byte < 128:
                return number
        raise ValueError("a number of more than four bytes")

    def text(self) -> str:
        try:
            text = self.take(self.number(2)).decode()
        except UnicodeDecodeError:
            raise ValueError("text that is no UTF-8") from None
        if "\0" in text:
            raise ValueError("text with a null in it")
        return text


# A PUBLISH's properties (MQTT 5, 2.2.2.2): the field of an Inbound for each, if any; its reader.
_KINDS: dict[int, tuple[str | None, Callable[[_Section], object]]] = {
    0x01: (None, lambda section: section.number(1)),  # whether the payload is text
    0x02: ("expiry_s", lambda section: section.number(4)),
    0x03: (None, _Section.text),  # its type: the bytes tell
    0x08: ("response_topic", _Section.text),
    0x09: ("correlation", lambda section: section.take(section.number(2))),
    0x0B: (None, _Section.variable),  # the subscription's number: we have given none
    0x23: (None, lambda section: section.number(2)),  # a topic's alias: we have allowed none
    0x26: ("user", lambda section: (section.text(), section.text())),
}


def _properties(packet: bytes | bytearray, at: int, end: int) -> dict[str, Any]:
    """The properties as fields of an Inbound; `fault` if not all can be read."""
    said: dict[str, Any] = {}
    user: list[Any] = []
    try:
        for field, value in _read_all(_Section(packet, at, end)):
            if field == "user":
                user.append(value)
            elif field is not None:
                said[field] = value
        if end - at > _MAX_PROPERTY_BYTES:
            raise ValueError(f"more than {_MAX_PROPERTY_BYTES} bytes")
    except ValueError as error:
        said["fault"] = f"the message's MQTT properties: {error}"
    return said | {"user": tuple(user)}


def _read_all(section: _Section) -> Iterator[tuple[str | None, object]]:
    for _ in range(_MAX_PROPERTIES):
        if section.at == section.end:
            return
        number = section.number(1)
        if number not in _KINDS:
            raise ValueError(f"there is no number {number}")
        field, read = _KINDS[number]
        yield field, read(section)
    if section.at < section.end:
        raise ValueError(f"more than {_MAX_PROPERTIES}")
