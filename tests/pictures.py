"""Picture files of every kind that comes, and of kinds that should not."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import cv2
import numpy as np

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)

# 32 x 16 pixels, red on the left and blue on the right; Adobe's marker, inverted as they are.
CMYK_JPEG = base64.b64decode(
    "/9j/7gAOQWRvYmUAZAAAAAAA/9sAQwANCQoLCggNCwoLDg4NDxMgFRMSEhMnHB4XIC4pMTAuKS0sMzpKPjM2RjcsLUBX"
    "QUZMTlJTUjI+WmFaUGBKUVJP/8AAFAgAEAAgBEMRAE0RAFkRAEsRAP/EAB8AAAEFAQEBAQEBAAAAAAAAAAABAgMEBQYH"
    "CAkKC//EALUQAAIBAwMCBAMFBQQEAAABfQECAwAEEQUSITFBBhNRYQcicRQygZGhCCNCscEVUtHwJDNicoIJChYXGBka"
    "JSYnKCkqNDU2Nzg5OkNERUZHSElKU1RVVldYWVpjZGVmZ2hpanN0dXZ3eHl6g4SFhoeIiYqSk5SVlpeYmZqio6Slpqeo"
    "qaqys7S1tre4ubrCw8TFxsfIycrS09TV1tfY2drh4uPk5ebn6Onq8fLz9PX29/j5+v/aAA4EQwBNAFkASwAAPwD06vMK"
    "8wr06iiiivmKivp2iiiiivp2ivmKiiiiivmKivp2iiiiiv/Z"
)


def two_colours(width: int = 32, height: int = 16) -> Any:
    """An RGB picture: red on the left, blue on the right."""
    picture = np.empty((height, width, 3), np.uint8)
    picture[:, : width // 2], picture[:, width // 2 :] = RED, BLUE
    return picture


def busy(width: int, height: int, seed: int = 0) -> Any:
    """An RGB picture of slopes, sharp edges and a little noise."""
    rng = np.random.default_rng((seed, width, height))
    small = rng.integers(0, 255, (max(height // 90, 2), max(width // 90, 2), 3), np.uint8)
    picture = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(20):
        colour = tuple(int(n) for n in rng.integers(0, 255, 3))
        ends = [(int(rng.integers(0, width)), int(rng.integers(0, height))) for _ in range(2)]
        cv2.line(picture, *ends, colour, 1 + max(width, height) // 400)
        cv2.putText(picture, "lamp 42", ends[0], cv2.FONT_HERSHEY_SIMPLEX, 0.8, colour, 2)
    noise = rng.integers(-6, 7, picture.shape)
    return np.clip(picture.astype(int) + noise, 0, 255).astype(np.uint8)


def encode(extension: str, picture: Any, *options: int) -> bytes:
    """A picture (RGB, RGBA, grey; 8 or 16 bits) as OpenCV writes it."""
    if picture.ndim == 3:
        turn = cv2.COLOR_RGB2BGR if picture.shape[2] == 3 else cv2.COLOR_RGBA2BGRA
        picture = cv2.cvtColor(picture, turn)
    done, data = cv2.imencode(extension, picture, list(options))
    assert done
    return bytes(data)


def jpeg(picture: Any = None, quality: int = 90, *, progressive: bool = False) -> bytes:
    picture = two_colours() if picture is None else picture
    options = (cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_PROGRESSIVE, int(progressive))
    return encode(".jpg", picture, *options)


def lossless_webp(picture: Any = None) -> bytes:
    picture = two_colours() if picture is None else picture
    return encode(".webp", picture, cv2.IMWRITE_WEBP_QUALITY, 101)


def extended_webp(width: int, height: int, flags: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A WebP of the extended form with these chunks."""
    head = struct.pack("<I", flags) + (width - 1).to_bytes(3, "little")
    body = b"".join(
        name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
        for name, data in ((b"VP8X", head + (height - 1).to_bytes(3, "little")), *chunks)
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def webp_chunk(data: bytes) -> tuple[bytes, bytes]:
    """The only chunk of a WebP of the simple form."""
    return data[12:16], data[20 : 20 + struct.unpack_from("<I", data, 16)[0]]


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, depth: int, colour: int, rows: bytes, *before: tuple[bytes, bytes]
) -> bytes:
    """A PNG of these rows, each with its filter byte in front, and of chunks before them."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)),
        *before,
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def jpeg_header(width: int, height: int, bits: int = 8) -> bytes:
    """The beginning of a JPEG, up to where its first scan would be."""
    return b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB9x", 17, bits, height, width, 3)


def tiff(orientation: int, order: str = "<", kind: int = 3) -> bytes:
    """EXIF with an orientation and an entry before it."""
    entries = struct.pack(f"{order}HHIHH", 0x010F, 3, 1, 7, 0)
    entries += struct.pack(f"{order}HHIHH", 0x0112, kind, 1, orientation, 0)
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return start + struct.pack(f"{order}H", 2) + entries + bytes(4)


def with_exif(data: bytes, exif: bytes) -> bytes:
    """The JPEG, PNG or simple WebP with EXIF in it."""
    if data[:2] == b"\xff\xd8":
        payload = b"Exif\0\0" + exif
        return data[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(payload)) + payload + data[2:]
    if data[:4] == b"RIFF":
        width, height = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).shape[1::-1]
        return extended_webp(width, height, 0x08, webp_chunk(data), (b"EXIF", exif))
    return data[:33] + chunk(b"eXIf", exif) + data[33:]
