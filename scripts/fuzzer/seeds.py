"""Small picture files of every kind that a camera or a person may send, by name."""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import pictures
from pictures import chunk, encode, extended_webp, png, tiff, webp_chunk, with_exif

# PNG's first pixel and step of each of Adam7's seven passes: x, y, across, down.
_ADAM7 = (
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
    *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
)
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


def seeds() -> dict[str, bytes]:
    """All of them; each is a whole file, though some are refused for what they are."""
    return _jpegs() | _pngs() | _webps() | _bmps() | _odd()


def _noisy(width: int = 61, height: int = 43) -> Any:
    return pictures.busy(width, height)


def _rgba(picture: Any) -> Any:
    slope = np.linspace(0, 255, picture.shape[1], dtype=picture.dtype)
    return np.dstack([picture, np.broadcast_to(slope, picture.shape[:2])])


def _jpegs() -> dict[str, bytes]:
    noisy, found = _noisy(), {}
    subsampling = {
        name: getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{name}")
        for name in ("411", "420", "422", "440", "444")
    }
    for name, factor in subsampling.items():
        options = (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor)
        found[f"jpeg {name}"] = encode(".jpg", noisy, *options)
    found["jpeg progressive"] = pictures.jpeg(noisy, 50, progressive=True)
    found["jpeg progressive grey"] = pictures.jpeg(noisy[:, :, 0], 50, progressive=True)
    found["jpeg restarts"] = encode(".jpg", noisy, cv2.IMWRITE_JPEG_RST_INTERVAL, 2)
    found["jpeg optimised"] = encode(".jpg", noisy, cv2.IMWRITE_JPEG_OPTIMIZE, 1)
    found["jpeg grey"] = pictures.jpeg(noisy[:, :, 0])
    found["jpeg cmyk"] = pictures.CMYK_JPEG
    found["jpeg 1x1"] = pictures.jpeg(_noisy(1, 1))
    found["jpeg strip"] = pictures.jpeg(_noisy(1200, 3))
    # So wide that they are decoded at a half, a quarter and an eighth.
    found["jpeg halved"] = pictures.jpeg(_noisy(1360, 24), 60)
    found["jpeg quartered"] = pictures.jpeg(_noisy(2720, 17), 60, progressive=True)
    found["jpeg eighth"] = with_exif(pictures.jpeg(_noisy(5440, 16)[:, :, 0], 40), tiff(6))
    plain = found["jpeg 420"]
    for orientation in range(1, 9):
        order = "<>"[orientation % 2]
        found[f"jpeg turned {orientation}"] = with_exif(plain, tiff(orientation, order))
    found["jpeg thumbnail"] = with_exif(plain, tiff(1) + pictures.jpeg())
    found["jpeg comments"] = plain[:2] + b"\xff\xfe\0\5abc" * 9 + plain[2:]
    found["jpeg 12 bits"] = plain.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c", 1)
    found["jpeg arithmetic"] = plain.replace(b"\xff\xc0", b"\xff\xc9", 1)
    return found


def _packed(levels: Any, depth: int) -> bytes:
    """A row's samples (0..255) at a depth, packed as PNG has them, its filter byte in front."""
    if depth == 16:
        return b"\0" + levels.astype(">u2").tobytes()
    bits = (levels.reshape(-1)[:, None] >> np.arange(7, 7 - depth, -1)) & 1
    return b"\0" + np.packbits(bits.astype(np.uint8)).tobytes()


def _png(colour: int, depth: int, *before: tuple[bytes, bytes], interlaced: bool = False) -> bytes:
    samples = np.dstack([_rgba(_noisy())] * 2)[:, :, : _CHANNELS[colour]].astype(np.uint16)
    if depth == 16:
        samples = samples * 257
    elif colour == 3:
        samples = samples >> (8 - depth) << (8 - depth)  # the high bits are the index
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    rows = [
        _packed(row, depth) for x, y, across, down in passes for row in samples[y::down, x::across]
    ]
    height, width = samples.shape[:2]
    if colour == 3:
        before = (*before, (b"PLTE", bytes(range(256)) * 3))
        before = (*before[:-1], (b"PLTE", before[-1][1][: 3 << depth]))
    made = png(width, height, depth, colour, b"".join(rows), *before)
    if not interlaced:
        return made
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 1)
    return made[:8] + chunk(b"IHDR", header) + made[33:]


def _pngs() -> dict[str, bytes]:
    found = {}
    for colour, depths in _DEPTHS.items():
        for depth in depths:
            found[f"png {colour} {depth}"] = _png(colour, depth)
            found[f"png {colour} {depth} interlaced"] = _png(colour, depth, interlaced=True)
    found["png"] = encode(".png", _noisy())
    found["png filtered"] = encode(".png", _noisy(), cv2.IMWRITE_PNG_STRATEGY, 1)
    plain = found["png"]
    extra = {
        "palette's alpha": _with_chunks(_png(3, 8), (b"tRNS", b"\0\x80\xff")),
        "one transparent": _with_chunks(plain, (b"tRNS", bytes(6))),
        "turned": with_exif(plain, tiff(6)),
        "profile": _with_chunks(plain, (b"iCCP", b"p\0\0" + zlib.compress(bytes(600)))),
        "text": _with_chunks(plain, (b"tEXt", b"a\0b"), (b"zTXt", b"a\0\0" + zlib.compress(b"b"))),
        "gamma": _with_chunks(plain, (b"gAMA", b"\0\0\xb1\x8f"), (b"sBIT", b"\5\5\5")),
        "animated": _with_chunks(plain, (b"acTL", struct.pack(">II", 2, 0))),
        "frames": _with_chunks(plain, (b"fcTL", struct.pack(">IIIIIHHBB", *(0, 61, 43), *[0] * 6))),
        "1x1": encode(".png", _noisy(1, 1)),
        "strip": encode(".png", _noisy(2, 1500)),
    }
    end = plain[:-12] + chunk(b"acTL", struct.pack(">II", 2, 0))
    extra["animated late"] = end + chunk(b"fdAT", bytes(4) + plain[41:80]) + plain[-12:]
    return found | {f"png {name}": data for name, data in extra.items()}


def _with_chunks(data: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """The PNG with more chunks before its pixels."""
    at = data.index(b"IDAT") - 4
    return data[:at] + b"".join(chunk(*part) for part in chunks) + data[at:]


def _webps() -> dict[str, bytes]:
    noisy = _noisy()
    lossy = encode(".webp", noisy, cv2.IMWRITE_WEBP_QUALITY, 40)
    lossless = pictures.lossless_webp(noisy)
    inner = webp_chunk(lossy)
    found = {
        "lossy": lossy,
        "lossless": lossless,
        "alpha": encode(".webp", _rgba(noisy), cv2.IMWRITE_WEBP_QUALITY, 40),
        "alpha lossless": pictures.lossless_webp(_rgba(noisy)),
        "turned": with_exif(lossy, tiff(8, ">")),
        "extended": extended_webp(61, 43, 0, inner),
        "profile": extended_webp(61, 43, 0x20, (b"ICCP", bytes(200)), inner),
        "words": extended_webp(61, 43, 0x04, inner, (b"XMP ", b"<x/>")),
        "raw alpha": extended_webp(61, 43, 0x10, (b"ALPH", b"\0" + bytes(61 * 43)), inner),
        "animated": extended_webp(61, 43, 0x02, (b"ANIM", bytes(6))),
        "1x1": encode(".webp", _noisy(1, 1)),
    }
    if hasattr(cv2, "imencodeanimation"):
        moving = cv2.Animation()
        moving.frames, moving.durations = [noisy, 255 - noisy], [50, 50]
        for extension in (".webp", ".png"):
            found[f"animated {extension}"] = bytes(cv2.imencodeanimation(extension, moving)[1])
    return {f"webp {name}": data for name, data in found.items()}


def _bmp(
    bits: int, width: int, height: int, body: bytes, *, pack: int = 0, tables: bytes = b""
) -> bytes:
    """A BMP of the header with 40 bytes, with masks or a palette after it."""
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, pack, len(body), 0, 0, 0, 0)
    start = 14 + len(head) + len(tables)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + head + tables + body


def _bmps() -> dict[str, bytes]:
    rng = np.random.default_rng(3)
    palette = rng.bytes(1024)
    body = rng.bytes(32 * 16 * 4)
    masks565 = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    rle8 = b"".join(b"\x10\1\x08\2\0\x08" + bytes(range(8)) + b"\0\0" for _ in range(16)) + b"\0\1"
    rle4 = b"".join(b"\x20\x12\0\0" for _ in range(16)) + b"\0\1"
    found = {
        "1": _bmp(1, 32, 16, body[:64], tables=palette[:8]),
        "4": _bmp(4, 32, 16, body[:256], tables=palette[:64]),
        "8": _bmp(8, 32, 16, body[:512], tables=palette),
        "8 run lengths": _bmp(8, 32, 16, rle8, pack=1, tables=palette),
        "4 run lengths": _bmp(4, 32, 16, rle4, pack=2, tables=palette[:64]),
        "15": _bmp(16, 32, 16, body[:1024]),
        "16": _bmp(16, 32, 16, body[:1024], pack=3, tables=masks565),
        "24": encode(".bmp", _noisy()),
        "24 from the top": _bmp(24, 32, -16, body[:1536]),
        "32": _bmp(32, 32, 16, body),
        "32 masks": encode(".bmp", _rgba(_noisy())),
        "grey": encode(".bmp", _noisy()[:, :, 0]),
        "1x1": encode(".bmp", _noisy(1, 1)),
    }
    core = struct.pack("<IHHHH", 12, 32, 16, 1, 24)
    found["core"] = b"BM" + struct.pack("<IHHI", 26 + 1536, 0, 0, 26) + core + body[:1536]
    return {f"bmp {name}": data for name, data in found.items()}


def _odd() -> dict[str, bytes]:
    """What is two things at once, ends early, or is something else."""
    jpeg, picture, lossy = pictures.jpeg(_noisy()), encode(".png", _noisy()), _webps()["webp lossy"]
    return {
        "jpeg and archive": jpeg + b"PK\3\4" + bytes(40) + b"PK\5\6" + bytes(18),
        "jpeg and page": jpeg + b"<html><script>1</script></html>",
        "jpeg and jpeg": jpeg + jpeg,
        "jpeg in png": _with_chunks(picture, (b"tEXt", b"a\0" + jpeg)),
        "png in jpeg": with_exif(jpeg, picture[:60_000]),
        "png in bmp": _bmp(24, 32, 16, picture),
        "webp in jpeg": with_exif(jpeg, lossy),
        "pdf and jpeg": b"%PDF-1.7\n" + jpeg,
        "gif and jpeg": b"GIF89a" + jpeg,
        "half a jpeg": jpeg[: len(jpeg) // 2],
        "half a jpeg, ended": jpeg[: len(jpeg) // 2] + b"\xff\xd9",
        "half a png": picture[: len(picture) // 2],
        "half a webp": lossy[: len(lossy) // 2],
        "bomb": png(65_536, 65_536, 1, 0, bytes(10_000)),
        "inflating": png(61, 43, 8, 2, bytes(3_000_000)),
        "text": b"Content-Type: image/jpeg\r\n\r\n",
        "nothing": b"",
    }
