"""A broker of few words, written by hand: for what no real one does when it is asked to."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import BinaryIO, Self


class FewWords:
    """Serves one connection after another, each by `serve`, which has the socket and the packets.

    A packet is its first byte, and what follows its length.
    """

    def __init__(self, serve: Callable[[socket.socket, Iterator[tuple[int, bytes]]], None]) -> None:
        self._serve = serve
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with suppress(OSError), connection, connection.makefile("rb") as incoming:
                    self._serve(connection, _packets(incoming))


def connack(*properties: int) -> bytes:
    """Yes to a connection, in MQTT 5; there was no session."""
    return bytes([0x20, 3 + len(properties), 0, 0, len(properties), *properties])


def suback(subscribe: bytes, filters: int = 1) -> bytes:
    """Yes to each filter of this SUBSCRIBE."""
    return bytes([0x90, 3 + filters, *subscribe[:2], 0, *[1] * filters])


def publish(topic: str, payload: bytes, mid: int, qos: int = 1) -> bytes:
    """A PUBLISH of MQTT 5 at QoS 1 or 2, without properties."""
    name = topic.encode()
    body = len(name).to_bytes(2, "big") + name + mid.to_bytes(2, "big") + b"\0" + payload
    return bytes([0x30 | qos << 1]) + variable(len(body)) + body


def variable(number: int) -> bytes:
    """A variable byte integer."""
    out = bytearray()
    while True:
        number, low = divmod(number, 128)
        out.append(low | (128 if number else 0))
        if not number:
            return bytes(out)


def _packets(incoming: BinaryIO) -> Iterator[tuple[int, bytes]]:
    while head := incoming.read(1):
        length = shift = 0
        while True:
            (byte,) = incoming.read(1)
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        yield head[0], incoming.read(length)
