"""As much of a websocket's client (RFC 6455) as two programs on loopback ask for."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
from typing import Any

_TEXT, _CLOSE, _PING, _PONG = 0x1, 0x8, 0x9, 0xA


class WebSocket:
    """JSON messages over one connection."""

    def __init__(self, port: int, path: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), 10)
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._stream = self._socket.makefile("rb")
        status = self._stream.readline()
        assert b" 101 " in status, status
        while self._stream.readline().strip():
            pass
        self._socket.settimeout(None)

    def send(self, message: Any) -> None:
        self._write(_TEXT, json.dumps(message).encode())

    def receive(self) -> Any:
        """The next message; None when the other side has ended it."""
        text = b""
        while True:
            try:
                first, second = self._stream.read(2)
                size = second & 0x7F
                if size >= 126:
                    wide = 2 if size == 126 else 8
                    size = int.from_bytes(self._stream.read(wide), "big")
                data = self._stream.read(size)
            except (OSError, ValueError):
                return None
            if first & 0xF == _CLOSE:
                return None
            if first & 0xF == _PING:
                self._write(_PONG, data)
            elif first & 0xF != _PONG:
                text += data
                if first & 0x80:
                    return json.loads(text)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _write(self, kind: int, data: bytes) -> None:
        # What a client sends is masked.
        mask = os.urandom(4)
        if len(data) < 126:
            head = struct.pack(">BB", 0x80 | kind, 0x80 | len(data))
        else:
            head = struct.pack(">BBH", 0x80 | kind, 0x80 | 126, len(data))
        masked = bytes(byte ^ mask[n % 4] for n, byte in enumerate(data))
        self._socket.sendall(head + mask + masked)
