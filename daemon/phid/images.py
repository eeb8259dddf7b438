"""What can be told of a picture file without decoding it: type, size, limits, cost in tokens."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from struct import unpack_from
from typing import TYPE_CHECKING, Literal

from phid.errors import Code, Refused

if TYPE_CHECKING:
    from collections.abc import Iterator

ImageType = Literal["jpeg", "png", "webp", "bmp"]

MAX_BYTES = 16 << 20
MAX_PIXELS = 25_000_000
MAX_SIDE = 16_384

CROP_SIDE = 336
MAX_CROPS = 16
# How far a JPEG decoded smaller may reach over the picture's edge, in pixels of the crops; and how
# much of it halvings may lose.
MOST_BEYOND = 0.05
_TILE = 12  # tokens along one side of a crop: 24 patches of 14 pixels, merged two by two

# A sound header needs a dozen steps; a hostile one could have millions.
_MOST_STEPS = 500
_MOST_TAGS = 200
_ORIENTATION = 0x0112
_RGB = 3
# The bytes that a WebP's pixel takes, and those that the decoder takes for it.
_OPAQUE, _TRANSPARENT = (3, 4.0), (4, 6.0)

_FOREIGN = (
    (0, b"GIF8", "GIF"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"%PDF", "PDF"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftypmif1", "HEIC"),
    (4, b"ftyp", "video"),
)


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What a file's header says: `width` and `height` in pixels as stored, before `orientation`.

    `orientation` is EXIF's number, 1 (upright) to 8. `body` is where the compressed data begins
    at the earliest. A decoded pixel takes `pixel_bytes`; the decoder takes another `decoder_bytes`
    for each stored pixel, whatever the size it decodes to.
    """

    type: ImageType
    width: int
    height: int
    orientation: int = 1
    body: int = 0
    pixel_bytes: int = 3
    decoder_bytes: float = 0.0

    @property
    def upright(self) -> tuple[int, int]:
        """(width, height) of the picture as a person sees it."""
        turned = self.orientation >= 5
        return (self.height, self.width) if turned else (self.width, self.height)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a picture is cut: `rows` by `columns` crops of 336 pixels.

    It is scaled to `width` by `height` pixels and lies at `left`, `top` on a white ground of the
    crops' size.
    """

    rows: int
    columns: int
    width: int
    height: int
    left: int
    top: int

    @property
    def crops(self) -> int:
        """How many crops there are beside the global view."""
        return self.rows * self.columns

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the ground in pixels: a model's image_sizes."""
        return self.rows * CROP_SIDE, self.columns * CROP_SIDE

    @property
    def tokens(self) -> int:
        """How many tokens of the context the picture takes."""
        return image_tokens(*self.size)


def inspect(
    data: bytes,
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    max_side: int = MAX_SIDE,
) -> ImageFacts:
    """Read type and size from the header, whatever the file is called or said to be.

    Nothing is decoded: the work is bounded whatever the bytes are. Raises Refused: bad_request
    for no bytes at all, too_large over a limit, unsupported for anything else that is no single
    JPEG, PNG, WebP or BMP picture. The body can still be broken: only decoding tells.
    """
    if not data:
        raise Refused(Code.BAD_REQUEST, "the image is empty", field="images")
    if len(data) > max_bytes:
        raise Refused(
            Code.TOO_LARGE,
            f"the image has {len(data)} bytes and {max_bytes} are allowed",
            field="images",
        )
    try:
        facts = _read(data)
    except (struct.error, IndexError):
        raise _unsupported("the image ends inside its header") from None
    if not facts.width or not facts.height:
        raise _unsupported("the image's header gives it no size")
    if max(facts.width, facts.height) > max_side:
        raise _too_large(facts, f"{max_side} pixels a side")
    if facts.width * facts.height > max_pixels:
        raise _too_large(facts, f"{max_pixels} pixels")
    return facts


def plan(width: int, height: int, crops: int) -> Plan:
    """Cut an upright picture of this size into at most `crops` crops, as Phi-3.5-vision does.

    The HD transform of its published processor: the picture becomes as wide (the longer side) as
    the budget allows and is padded to whole crops; a portrait is treated as if lying on its side.
    """
    crops = min(max(crops, 1), MAX_CROPS)
    if width < height:
        lying = plan(height, width, crops)
        return Plan(
            rows=lying.columns,
            columns=lying.rows,
            width=lying.height,
            height=lying.width,
            left=lying.top,
            top=lying.left,
        )
    ratio = width / height
    columns = 1
    while (columns + 1) * math.ceil((columns + 1) / ratio) <= crops:
        columns += 1
    scaled_width = columns * CROP_SIDE
    # A line thinner than a pixel is still seen.
    scaled_height = max(int(scaled_width / ratio), 1)
    rows = math.ceil(scaled_height / CROP_SIDE)
    top = (rows * CROP_SIDE - scaled_height) // 2
    return Plan(rows, columns, scaled_width, scaled_height, 0, top)


def shrink(facts: ImageFacts, width: int, height: int) -> int:
    """How many times shorter a JPEG's sides may be decoded, if it is to be scaled to this size.

    The decoder has the means of 2, 4 or 8 pixels each way at hand. They are as good a start for
    scaling as halvings, as long as twice the wanted size is left.
    """
    if facts.type != "jpeg":
        return 1
    across, down = facts.upright
    sides = ((across, width), (down, height))
    for times in (8, 4, 2):
        if all(
            side >= times * 2 * wanted and -side % times * wanted <= MOST_BEYOND * side
            for side, wanted in sides
        ):
            return times
    return 1


def decoding_bytes(facts: ImageFacts, times: int = 1) -> int:
    """The most memory that decoding takes beside the file, with sides so many times shorter.

    The peak of three steps: decoding, making it RGB, turning or scaling that. Measured as the
    process's peak (OpenCV 5.0); the rest of that is a copy of the file.
    """
    made = facts.decoder_bytes + facts.pixel_bytes / times**2
    converted = (max(facts.pixel_bytes, _RGB) + _RGB) / times**2
    return round(facts.width * facts.height * max(made, converted))


def image_tokens(height: int, width: int) -> int:
    """Count the tokens of a picture whose ground has this size, in pixels.

    Each crop and the global view are 12 by 12 tokens; every row of them, over the whole width,
    ends in one more, and one lies between the crops and the global view.
    """
    rows, columns = height // CROP_SIDE, width // CROP_SIDE
    return (rows * columns + 1) * _TILE * _TILE + 1 + (rows + 1) * _TILE


def _unsupported(message: str) -> Refused:
    return Refused(Code.UNSUPPORTED, message, field="images")


def _too_large(facts: ImageFacts, allowed: str) -> Refused:
    size = f"{facts.width} x {facts.height}"
    return Refused(
        Code.TOO_LARGE, f"the image is {size} pixels and {allowed} are allowed", field="images"
    )


def _read(data: bytes) -> ImageFacts:
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp(data)
    if data.startswith(b"BM"):
        return _bmp(data)
    for at, magic, name in _FOREIGN:
        if data.startswith(magic, at):
            raise _unsupported(f"this is a {name} file: JPEG, PNG, WebP and BMP are read")
    raise _unsupported("this is no image: JPEG, PNG, WebP and BMP are read")


def _jpeg(data: bytes) -> ImageFacts:
    """Walk the segments up to the frame header (ITU-T T.81, B.1.1 and B.2.2)."""
    orientation = 1
    at = 2
    for _ in range(_MOST_STEPS):
        if data[at] != 0xFF:
            break
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker in {0xD9, 0xDA}:  # the end or a scan, and no frame yet
            break
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # they stand alone
            at += 2
            continue
        (length,) = unpack_from(">H", data, at + 2)
        if 0xC0 <= marker <= 0xCF and marker not in {0xC4, 0xC8, 0xCC}:
            bits, height, width = unpack_from(">BHH", data, at + 4)
            if bits != 8:
                raise _unsupported(f"this is a JPEG of {bits} bits a channel: 8 are read")
            if not data[at + 9]:
                raise _unsupported("this is a JPEG without channels")
            beside = _jpeg_decoder_bytes(data, at)
            return ImageFacts("jpeg", width, height, orientation, at, decoder_bytes=beside)
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = _orientation(data[at + 10 : at + 2 + length])
        at += 2 + max(length, 2)
    raise _unsupported("the JPEG's header is broken")


def _jpeg_decoder_bytes(data: bytes, at: int) -> float:
    """Bytes a pixel of the coefficients, two bytes each, if they come in more than one scan.

    `at` is the frame header's place. libjpeg keeps none for a baseline JPEG whose first scan has
    all channels.
    """
    length, count = unpack_from(">H", data, at + 2)[0], data[at + 9]
    factors = [data[at + 11 + 3 * n] for n in range(count)]
    areas = [(factor >> 4) * (factor & 15) for factor in factors]
    if data[at + 1] in {0xC0, 0xC1}:
        scan = data.find(b"\xff\xda", at + 2 + length)
        if scan < 0 or data[scan + 4 : scan + 5] in {b"", bytes([count])}:
            return 0.0
    return 2 * sum(areas) / max([*areas, 1]) + 1


def _png(data: bytes) -> ImageFacts:
    """Walk the chunks up to the first of the picture's own (PNG 3rd edition, 5.3)."""
    length, kind, width, height, depth, colour = unpack_from(">I4sIIBB", data, 8)
    channels = {0: 1, 4: 4, 6: 4}.get(colour, 3)
    if (length, kind) != (13, b"IHDR"):
        raise _unsupported("the PNG's header is broken")
    orientation = 1
    at = 33
    for _ in range(_MOST_STEPS):
        length, kind = unpack_from(">I4s", data, at)
        if kind == b"acTL":
            raise _unsupported("this is an animated PNG: send one picture")
        if kind == b"eXIf":
            orientation = _orientation(data[at + 8 : at + 8 + min(length, 0xFFFF)])
        if kind == b"tRNS":
            channels = 4
        if kind == b"IDAT":
            pixel = channels * (2 if depth == 16 else 1)
            return ImageFacts("png", width, height, orientation, at, pixel, pixel)
        at += 12 + length
    raise _unsupported("the PNG's header is broken")


def _webp(data: bytes) -> ImageFacts:
    """Read the first chunk, lossy (RFC 6386, 9.1), lossless or extended (RFC 9649)."""
    kind = data[12:16]
    if kind == b"VP8 ":
        start, width, height = unpack_from("<3sHH", data, 23)
        if data[20] & 1 or start != b"\x9d\x01\x2a":
            raise _unsupported("the WebP's header is broken")
        # The two bits above a size's 14 only ask for scaling when shown.
        return ImageFacts("webp", width & 0x3FFF, height & 0x3FFF, 1, 20, *_OPAQUE)
    if kind == b"VP8L":
        signature, bits = unpack_from("<BI", data, 20)
        if signature != 0x2F:
            raise _unsupported("the WebP's header is broken")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        taken = _TRANSPARENT if bits >> 28 & 1 else _OPAQUE
        return ImageFacts("webp", width, height, 1, 20, *taken)
    if kind == b"VP8X":
        flags, width, width_high, height, height_high = unpack_from("<B3xHBHB", data, 20)
        if flags & 0x02:
            raise _unsupported("this is an animated WebP: send one picture")
        return ImageFacts(
            "webp",
            (width | width_high << 16) + 1,
            (height | height_high << 16) + 1,
            _webp_orientation(data) if flags & 0x08 else 1,
            30,
            *(_TRANSPARENT if flags & 0x10 else _OPAQUE),
        )
    raise _unsupported("the WebP's header is broken")


def _webp_orientation(data: bytes) -> int:
    at = 12
    for _ in range(_MOST_STEPS):
        if at + 8 > len(data):
            break
        kind, length = unpack_from("<4sI", data, at)
        if kind == b"EXIF":
            tiff = data[at + 8 : at + 8 + min(length, 0xFFFF)]
            return _orientation(tiff.removeprefix(b"Exif\0\0"))
        at += 8 + length + (length & 1)
    return 1


def _bmp(data: bytes) -> ImageFacts:
    """Read the bitmap header that follows the 14 bytes of the file's own."""
    (size,) = unpack_from("<I", data, 14)
    if size == 12:
        width, height = unpack_from("<HH", data, 18)
    elif size in {40, 52, 56, 64, 108, 124}:
        # A negative height says that the rows begin at the top.
        width, height = unpack_from("<ii", data, 18)
    else:
        raise _unsupported("this is no image: JPEG, PNG, WebP and BMP are read")
    if width < 0:
        raise _unsupported("the BMP's header is broken")
    return ImageFacts("bmp", width, abs(height), body=14 + size)


def _orientation(tiff: bytes) -> int:
    """Find the orientation in EXIF's first directory (TIFF 6.0, section 2); 1 where it is not."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        for tag, kind, value in _entries(tiff, order):
            if tag == _ORIENTATION and kind == 3 and 1 <= value <= 8:
                return value
    except struct.error:
        pass
    return 1


def _entries(tiff: bytes, order: str) -> Iterator[tuple[int, int, int]]:
    """Give (tag, type, first short of the value) of each entry."""
    (at,) = unpack_from(f"{order}I", tiff, 4)
    (count,) = unpack_from(f"{order}H", tiff, at)
    for entry in range(min(count, _MOST_TAGS)):
        yield unpack_from(f"{order}HH4xH", tiff, at + 2 + 12 * entry)
