"""Picture files gone wrong: the n-th of a seed is the same whoever asks for it."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable

from fuzzer.seeds import seeds

_SIDES = (0, 1, 2, 3, 255, 256, 1499, 4096, 5000, 16_383, 16_384, 16_385, 65_535, 2**24, 2**31 - 1)
_BYTES = (0, 1, 0x7F, 0x80, 0xD8, 0xD9, 0xDA, 0xFE, 0xFF)
_MAGIC = (
    *(b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\0\x10JFIF\0", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"BM"),
    *(b"RIFF\xff\xff\0\0WEBPVP8 ", b"RIFF\xff\xff\0\0WEBPVP8L", b"RIFF\xff\xff\0\0WEBPVP8X"),
)
_MARKERS = (0xC0, 0xC1, 0xC2, 0xC3, 0xC4, 0xC9, 0xCC, 0xD0, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xE1)

Part = tuple[bytes, bytes]


class Payloads:
    """Random and mutated picture files."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._whole = list(seeds().values())
        self._dice = random.Random(seed)

    def payload(self, n: int) -> bytes:
        """The n-th payload; one in forty is a seed as it is, one in twenty nothing but chance."""
        self._dice = random.Random(f"{self._seed}:{n}")
        dice, kind = self._dice, self._dice.random()
        if kind < 0.025:
            return dice.choice(self._whole)
        if kind < 0.075:
            return dice.choice((b"", *_MAGIC)) + dice.randbytes(dice.choice((0, 1, 9, 80, 2000)))
        whole = data = dice.choice(self._whole)
        for _ in range(dice.choice((1, 1, 1, 2, 3))):
            data = self._change(data)(data)
        if dice.random() < 0.5:
            # With its own beginning, or the header's check would keep nearly everything out.
            kept = dice.choice((4, 16, 40, 150))
            data = whole[:kept] + data[kept:]
        if data.startswith(b"\x89PNG") and dice.random() < 0.7:
            # With right checksums, for few mistakes get past wrong ones.
            data = _join_png(_split_png(data))
        return data

    def _change(self, data: bytes) -> Callable[[bytes], bytes]:
        """One way to spoil this file, those that know its format as often as those that don't."""
        # Few of those that are cut or spliced get beyond the first check.
        often = (self._flipped, self._overwritten)
        blind = (*often * 3, self._moved, self._moved, self._cut, self._spliced)
        knowing = {
            b"\x89PNG": (self._png_parts, self._png_rows, self._png_size, self._png_claims),
            b"RIFF": (self._webp_parts, self._webp_size),
        }.get(data[:4])
        knowing = knowing or {
            b"\xff\xd8": (self._jpeg_parts, self._jpeg_marker, self._jpeg_size),
            b"BM": (self._bmp_head,),
        }.get(data[:2])
        dice = self._dice
        return dice.choice(knowing if knowing and dice.random() < 0.5 else blind)

    # What needs no knowledge of the format.

    def _flipped(self, data: bytes) -> bytes:
        work = bytearray(data)
        for _ in range(self._dice.choice((1, 1, 1, 2, 8, 64)) if work else 0):
            work[self._at(work)] ^= 1 << self._dice.randrange(8)
        return bytes(work)

    def _overwritten(self, data: bytes) -> bytes:
        work = bytearray(data)
        for _ in range(self._dice.choice((1, 1, 2, 8)) if work else 0):
            at, value = self._at(work), self._dice.choice((*_BYTES, self._dice.randrange(256)))
            work[at : at + self._dice.choice((1, 1, 2, 4))] = bytes([value])
        return bytes(work)

    def _cut(self, data: bytes) -> bytes:
        at = self._at(data)
        if self._dice.random() < 0.5:
            return data[:at]
        return data[:at] + data[at + self._dice.choice((1, 2, 4, 16, 200)) :]

    def _spliced(self, data: bytes) -> bytes:
        other = self._dice.choice(self._whole)
        end = other[self._at(other) :]
        return data[: self._at(data)] + end[: self._dice.choice((4, 40, len(end)))]

    def _moved(self, data: bytes) -> bytes:
        """A stretch of it once more somewhere else, or chance in its place."""
        at, to = self._at(data), self._at(data)
        stretch = data[at : at + self._dice.choice((1, 8, 64, 500))]
        if self._dice.random() < 0.3:
            stretch = self._dice.randbytes(len(stretch))
        return data[:to] + stretch * self._dice.choice((1, 1, 2, 40)) + data[to:]

    def _at(self, data: bytes | bytearray) -> int:
        """A place in it, in the header more often than by chance."""
        most = min(len(data), 120) if self._dice.random() < 0.4 else len(data)
        return self._dice.randrange(most) if most else 0

    # What keeps to the format, and breaks what it says.

    def _shuffled(self, parts: list[Part]) -> list[Part]:
        """The parts with one of them dropped, doubled, moved, or changed inside."""
        dice = self._dice
        if not parts:
            return parts
        at = dice.randrange(len(parts))
        kind, inside = parts[at]
        match dice.randrange(6):
            case 0:
                del parts[at]
            case 1:
                parts.insert(dice.randrange(len(parts) + 1), parts[at])
            case 2:
                parts.insert(dice.randrange(len(parts)), parts.pop(at))
            case 3:
                parts[at] = kind, self._flipped(inside)
            case 4:
                parts[at] = kind, inside[: self._at(inside)]
            case _:
                parts[at] = dice.choice(parts)[0], inside
        return parts

    def _png_parts(self, data: bytes) -> bytes:
        return _join_png(self._shuffled(_split_png(data)))

    def _png_rows(self, data: bytes) -> bytes:
        """Rows with wrong filters or of a wrong length, well compressed."""
        parts = _split_png(data)
        packed = b"".join(inside for kind, inside in parts if kind == b"IDAT")
        try:
            rows = zlib.decompressobj().decompress(packed, 100_000)
        except zlib.error:
            return data
        dice = self._dice
        rows = dice.choice((self._flipped, self._overwritten, self._cut, self._moved))(rows)
        again = zlib.compress(rows, dice.choice((0, 1, 9)))
        if dice.random() < 0.2:
            again = self._flipped(again)
        first = next((n for n, (kind, _) in enumerate(parts) if kind == b"IDAT"), 0)
        kept = [part for part in parts if part[0] != b"IDAT"]
        return _join_png([*kept[:first], (b"IDAT", again), *kept[first:]])

    def _png_size(self, data: bytes) -> bytes:
        """Another size, depth, kind of colour or interlacing, with a right checksum."""
        parts = _split_png(data)
        if not parts or len(parts[0][1]) != 13:
            return data
        head = bytearray(parts[0][1])
        if self._dice.random() < 0.6:
            struct.pack_into(">I", head, self._dice.choice((0, 4)), self._side(2**32))
        else:
            head[self._dice.randrange(8, 13)] = self._dice.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
        return _join_png([(b"IHDR", bytes(head)), *parts[1:]])

    def _png_claims(self, data: bytes) -> bytes:
        """A chunk that says it is longer than it is, or than the file."""
        parts = _split_png(data)
        if not parts:
            return data
        before = sum(12 + len(inside) for _, inside in parts[: self._dice.randrange(len(parts))])
        claim = self._dice.choice((len(data), 2**20, 2**29, 2**31 - 1, 2**31, 2**32 - 1))
        return data[: 8 + before] + struct.pack(">I", claim) + data[12 + before :]

    def _jpeg_parts(self, data: bytes) -> bytes:
        parts, rest = _split_jpeg(data)
        made = b"".join(kind + inside for kind, inside in self._shuffled(parts))
        return data[:2] + made + rest

    def _jpeg_marker(self, data: bytes) -> bytes:
        """Another marker in the place of one, or one more."""
        at = data.find(b"\xff", self._at(data))
        new = bytes([0xFF, self._dice.choice(_MARKERS)])
        return data[:at] + new + data[at + self._dice.choice((0, 2)) :]

    def _jpeg_size(self, data: bytes) -> bytes:
        """Another size, or other sampling factors."""
        work = bytearray(data)
        at = next((at for m in b"\xc0\xc2" if (at := data.find(bytes([0xFF, m]))) > 0), 0)
        if not at or at + 19 > len(work):
            return data
        if self._dice.random() < 0.7:
            struct.pack_into(">H", work, at + self._dice.choice((5, 7)), self._side(2**16))
        else:
            work[at + self._dice.choice((4, 9, 10, 11, 12, 14))] = self._dice.randrange(256)
        return bytes(work)

    def _webp_parts(self, data: bytes) -> bytes:
        return _join_webp(self._shuffled(_split_webp(data)))

    def _webp_size(self, data: bytes) -> bytes:
        """Another size or other flags in the first chunk's header."""
        work = bytearray(data)
        if len(work) < 31:
            return data
        if self._dice.random() < 0.5:
            width_at = {b"VP8 ": 26, b"VP8X": 24}.get(data[12:16], 21)
            struct.pack_into(
                "<H", work, self._dice.choice((width_at, width_at + 2)), self._side(2**16)
            )
        else:
            work[20 + self._dice.randrange(10)] ^= 1 << self._dice.randrange(8)
        return bytes(work)

    def _bmp_head(self, data: bytes) -> bytes:
        """Another size, depth, packing, number of colours, or place of the pixels."""
        work, dice = bytearray(data), self._dice
        if len(work) < 54:
            return data
        match dice.randrange(4):
            case 0:
                side = self._side(2**31) * dice.choice((1, 1, -1))
                struct.pack_into("<i", work, dice.choice((18, 22)), side)
            case 1:
                struct.pack_into("<H", work, 28, dice.choice((0, 1, 2, 4, 8, 15, 16, 24, 32, 64)))
            case 2:
                struct.pack_into("<I", work, 30, dice.choice((0, 1, 2, 3, 4, 6, 2**32 - 1)))
            case _:
                value = dice.choice((0, 1, 256, 257, len(data), 2**31, 2**32 - 1))
                struct.pack_into("<I", work, dice.choice((2, 10, 14, 34, 46)), value)
        return bytes(work)

    def _side(self, below: int) -> int:
        return self._dice.choice((*_SIDES, self._dice.randrange(300))) % below


def _split_png(data: bytes) -> list[Part]:
    parts, at = [], 8
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        parts.append((kind, data[at + 8 : at + 8 + length]))
        at += 12 + length
    return parts


def _join_png(parts: list[Part]) -> bytes:
    made = b"\x89PNG\r\n\x1a\n"
    for kind, inside in parts:
        sum_ = zlib.crc32(kind + inside)
        made += struct.pack(">I", len(inside)) + kind + inside + struct.pack(">I", sum_)
    return made


def _split_jpeg(data: bytes) -> tuple[list[Part], bytes]:
    """The segments up to the first scan's data, and the rest."""
    parts, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        length = max(struct.unpack_from(">H", data, at + 2)[0], 2)
        parts.append((data[at : at + 2], data[at + 2 : at + 2 + length]))
        at += 2 + length
        if parts[-1][0][1] == 0xDA:
            break
    return parts, data[at:]


def _split_webp(data: bytes) -> list[Part]:
    parts, at = [], 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        parts.append((kind, data[at + 8 : at + 8 + length]))
        at += 8 + length + length % 2
    return parts


def _join_webp(parts: list[Part]) -> bytes:
    body = b"".join(
        kind + struct.pack("<I", len(inside)) + inside + bytes(len(inside) % 2)
        for kind, inside in parts
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body
