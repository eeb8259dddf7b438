"""Decodes picture files, and cuts them into the pixel values Phi-3.5-vision was trained on."""

from __future__ import annotations

import math
import os
import re
import struct
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from struct import unpack_from
from typing import TYPE_CHECKING, Any, TypeAlias

import cv2
import numpy as np

from phid import images
from phid.errors import Code, Refused
from phid.images import CROP_SIDE, MOST_BEYOND, ImageFacts, Plan, image_tokens, inspect, plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

# RGB uint8 (height, width, 3) unless said otherwise.
Picture: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

# One job at a time, one thread: a pool beside the model's own would only take cores from it.
cv2.setNumThreads(1)

_WHITE = (255, 255, 255)
# CLIP's mean and deviation of red, green and blue; then the result for each value of a byte.
_MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)
_DEVIATION = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)
_NORMALISED = ((np.arange(256, dtype=np.float32)[:, None] / np.float32(255) - _MEAN) / _DEVIATION)[
    None
]

_THUMBNAIL = 32
# Rows that are converted at a time.
_BAND = 64

# A progressive JPEG is decoded once for each scan; encoders write about ten.
_MOST_SCANS = 32
_MOST_SCANNED_PIXELS = 400_000_000
# A JPEG's block of 64 pixels takes a bit at the least; this asks for half of that.
_MOST_PIXELS_PER_BYTE = 1024
_MOST_CHUNKS = 20_000
_SCAN, _END = b"\xff\xda", b"\xff\xd9"
# Cameras are known to leave a few bytes before a marker. More of them: the decoder lost its place.
_HARMLESS_BYTES = 16
_EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker")

_SHRUNK = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}

# The steps that undo each EXIF orientation, in order.
_UPRIGHT: dict[int, tuple[Callable[[Any], Any], ...]] = {
    2: (lambda p: cv2.flip(p, 1),),
    3: (lambda p: cv2.rotate(p, cv2.ROTATE_180),),
    4: (lambda p: cv2.flip(p, 0),),
    5: (cv2.transpose,),
    6: (lambda p: cv2.rotate(p, cv2.ROTATE_90_CLOCKWISE),),
    7: (lambda p: cv2.rotate(p, cv2.ROTATE_180), cv2.transpose),
    8: (lambda p: cv2.rotate(p, cv2.ROTATE_90_COUNTERCLOCKWISE),),
}


@dataclass(frozen=True, slots=True, eq=False)
class Pixels:
    """One picture as a vision graph takes it.

    `values` is float32 (crops + 1, 3, 336, 336), the global view first, then the crops row by row;
    `size` is the (height, width) in pixels of the ground the crops were cut from.
    """

    values: NDArray[np.float32]
    size: tuple[int, int]

    @property
    def tokens(self) -> int:
        """How many tokens of the context the picture takes."""
        return image_tokens(*self.size)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The pictures of one job in the order of their tags, as a vision graph takes them.

    `pixels` is (n, views, 3, 336, 336) in the graph's own type; `sizes` int64 (n, 2), the height
    and width of each picture's ground; `tokens` what each takes of the context.
    """

    pixels: NDArray[Any]
    sizes: NDArray[np.int64]
    tokens: NDArray[np.int64]


def look(data: bytes, crops: int) -> Pixels:
    """Decode a file and cut its picture, as `decode` and `transform` do one after the other.

    A JPEG that is far larger than its crops is not decoded whole, but at a half, a quarter or an
    eighth of each side: in half the time or less, and with a tenth of the memory.
    """
    facts = inspect(data)
    cut = plan(*facts.upright, crops)
    return _cut(decode(data, facts, images.shrink(facts, cut.width, cut.height)), cut)


def decode(data: bytes, facts: ImageFacts | None = None, shrink: int = 1) -> Picture:
    """Decode a JPEG, PNG, WebP or BMP file into an upright picture.

    Grey becomes three equal channels, 16 bits are rounded to 8, CMYK is converted as if printed
    without a profile, and what is transparent shows white, as the ground of the crops is. With
    `shrink` (2, 4 or 8) a JPEG's sides are so many times shorter, rounded up. The caller sees to it
    that there is memory for it (`images.decoding_bytes`).
    Raises Refused (unsupported) for a body that is broken or ends early.
    """
    facts = facts or inspect(data)
    assert shrink == 1 or facts.type == "jpeg"
    if facts.type == "jpeg":
        _check_scans(data, facts)
    elif facts.type == "png":
        _check_chunks(data, facts)
    with _listening() as said:
        try:
            picture = cv2.imdecode(np.frombuffer(data, np.uint8), _flags(facts, shrink))
        except (cv2.error, MemoryError):
            picture = None
        words = said()
    if picture is None:
        raise _broken(facts)
    if picture.shape[:2] != (-(-facts.height // shrink), -(-facts.width // shrink)):
        raise Refused(
            Code.UNSUPPORTED, "the image is not of the size its header says", field="images"
        )
    if facts.type == "jpeg":
        _check_words(words, facts)
    picture = _rgb(picture, facts)
    for undo in _UPRIGHT.get(facts.orientation, ()):
        picture = undo(picture)
    return picture


def as_png(picture: Picture) -> bytes:
    """Write a picture as an uncompressed PNG, for decoders that trust what they are given."""
    fast = [cv2.IMWRITE_PNG_COMPRESSION, 0]
    done, data = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), fast)
    assert done
    return data.tobytes()


def transform(picture: Picture, crops: int) -> Pixels:
    """Cut an RGB picture into at most `crops` crops and a global view of the whole.

    The HD transform of Phi-3.5-vision's published processor: bilinear with the antialiasing of
    Pillow (nearly: see `_resize`), white ground, CLIP's normalisation, global view by bicubic
    interpolation without antialiasing.
    """
    return _cut(picture, plan(picture.shape[1], picture.shape[0], crops))


def _cut(picture: Picture, cut: Plan) -> Pixels:
    height, width = cut.size
    scaled = _resize(picture, cut.width, cut.height)
    below = height - cut.height - cut.top
    right = width - cut.width - cut.left
    ground = cv2.copyMakeBorder(
        scaled, cut.top, below, cut.left, right, cv2.BORDER_CONSTANT, value=_WHITE
    )
    whole = cv2.LUT(ground, _NORMALISED)
    values = np.empty((cut.crops + 1, 3, CROP_SIDE, CROP_SIDE), np.float32)
    side = (CROP_SIDE, CROP_SIDE)
    values[0] = cv2.resize(whole, side, interpolation=cv2.INTER_CUBIC).transpose(2, 0, 1)
    tiles = whole.reshape(cut.rows, CROP_SIDE, cut.columns, CROP_SIDE, 3)
    values[1:].reshape(cut.rows, cut.columns, 3, *side)[:] = tiles.transpose(0, 2, 4, 1, 3)
    return Pixels(values, cut.size)


def thumbnail(data: bytes, facts: ImageFacts) -> Picture:
    """A file's grey levels, uint8 (32, 32): each is the mean of an area, which evens out noise.

    A large JPEG is decoded at a reduced size.
    """
    picture = decode(data, facts, thumbnail_shrink(facts))
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    return cv2.resize(grey, (_THUMBNAIL, _THUMBNAIL), interpolation=cv2.INTER_AREA)


def thumbnail_shrink(facts: ImageFacts) -> int:
    """How many times shorter a JPEG's sides are as `thumbnail` decodes it."""
    return images.shrink(facts, _THUMBNAIL, _THUMBNAIL)


def difference_pct(one: Picture, other: Picture) -> float:
    """How much two thumbnails differ where they differ most, in percent of the grey levels.

    The mean would not see a person who fills a hundredth of the picture.
    """
    return float(np.abs(one.astype(np.int16) - other).max()) / 2.55


def stack(pictures: Sequence[Pixels], dtype: Any, views: int = 0) -> Batch:
    """Put pictures of different crop counts together: the smaller end in black views.

    There are as many views as the largest has, or `views` if that is more.
    """
    most = max(views, *(len(picture.values) for picture in pictures))
    pixels = np.zeros((len(pictures), most, *pictures[0].values.shape[1:]), dtype)
    for row, picture in zip(pixels, pictures, strict=True):
        row[: len(picture.values)] = picture.values
    return Batch(
        pixels,
        np.array([picture.size for picture in pictures], np.int64),
        np.array([picture.tokens for picture in pictures], np.int64),
    )


def _flags(facts: ImageFacts, shrink: int) -> int:
    if facts.type in {"png", "webp"}:
        return int(cv2.IMREAD_UNCHANGED)  # with alpha, and with 16 bits
    # The orientation is applied here: which formats OpenCV does it for depends on its version.
    return int(_SHRUNK[shrink] | cv2.IMREAD_IGNORE_ORIENTATION)


def _rgb(picture: Picture, facts: ImageFacts) -> Picture:
    """Convert to RGB of 8 bits, some rows at a time: each step copies what it converts."""
    if picture.dtype not in (np.uint8, np.uint16):
        raise _broken(facts)
    made = np.empty((*picture.shape[:2], 3), np.uint8)
    for top in range(0, len(picture), _BAND):
        made[top : top + _BAND] = _rgb_band(picture[top : top + _BAND])
    return made


def _rgb_band(picture: Picture) -> Picture:
    if picture.dtype == np.uint16:
        picture = cv2.convertScaleAbs(picture, alpha=1 / 257)
    if picture.ndim == 2:
        return cv2.cvtColor(picture, cv2.COLOR_GRAY2RGB)
    if picture.shape[2] == 3:
        return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
    rgb = cv2.cvtColor(picture, cv2.COLOR_BGRA2RGB)
    alpha = cv2.cvtColor(picture[:, :, 3], cv2.COLOR_GRAY2RGB)
    if alpha.min() == 255:
        return rgb
    # White where nothing is: c * a + 255 * (1 - a).
    shown = cv2.multiply(rgb, alpha, scale=1 / 255)
    return cv2.add(shown, cv2.bitwise_not(alpha))


def _resize(picture: Picture, width: int, height: int) -> Picture:
    """Scale as Pillow's bilinear filter does, whose triangle grows with the ratio.

    OpenCV's bilinear has no antialiasing and its area filter takes a core 30 ms for a 1080p frame
    (it is used where the sides are odd so often that halvings would lose an edge).
    So: halve while far away, then blur by what is missing of the triangle's variance (ratio**2 / 6;
    a halving brings 1/4 of a pixel, the interpolation 1/6), then interpolate. Within 0.02 of
    Pillow on average, in normalised units.
    """
    rows, columns = picture.shape[:2]
    ratio = max(rows / height, columns / width)
    scale = 1.0
    if ratio >= 3 and (
        _loses_an_edge(rows, height, ratio) or _loses_an_edge(columns, width, ratio)
    ):
        scale = ratio / 2
        picture = cv2.resize(picture, (2 * width, 2 * height), interpolation=cv2.INTER_AREA)
    while ratio / scale >= 3 and min(picture.shape[:2]) >= 2:
        rows, columns = picture.shape[0] // 2, picture.shape[1] // 2
        even = picture[: rows * 2, : columns * 2]
        picture = cv2.resize(even, (columns, rows), interpolation=cv2.INTER_AREA)
        scale *= 2
    missing = (ratio**2 / 6 - (scale**2 - 1) / 12) / scale**2 - 1 / 6
    if missing > 0.01:
        picture = _blur(picture, missing)
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_LINEAR)


def _loses_an_edge(side: int, wanted: int, ratio: float) -> bool:
    """Whether halvings, each of which drops an odd last pixel, lose too much of a side."""
    halved, scale = side, 1
    while ratio / scale >= 3 and halved >= 2:
        halved, scale = halved // 2, scale * 2
    return (side - halved * scale) * wanted > MOST_BEYOND * side


def _blur(picture: Picture, variance: float) -> Picture:
    edge = cv2.BORDER_REPLICATE
    outer = variance / 2
    if outer > 0.3:
        return cv2.GaussianBlur(picture, (0, 0), math.sqrt(variance), borderType=edge)
    # Three taps have this variance when the outer two weigh half of it; a Gaussian cut off to
    # three has another, so it is asked for by its weights.
    sigma = math.sqrt(-0.5 / math.log(outer / (1 - 2 * outer)))
    return cv2.GaussianBlur(picture, (3, 3), sigma, borderType=edge)


def _broken(facts: ImageFacts) -> Refused:
    return Refused(
        Code.UNSUPPORTED,
        f"the {facts.type.upper()} is broken or ends early",
        field="images",
    )


def _check_scans(data: bytes, facts: ImageFacts) -> None:
    # Neither marker can be compressed data: there 0xff is followed by 0. The search begins after
    # the header, for a thumbnail in it can have an end marker of its own.
    first = data.find(_SCAN, facts.body)
    pixels = facts.width * facts.height
    if first < 0 or data.rfind(_END, first) < 0 or pixels > len(data) * _MOST_PIXELS_PER_BYTE:
        raise _broken(facts)
    most = min(_MOST_SCANS, _MOST_SCANNED_PIXELS // pixels)
    if data.count(_SCAN, facts.body) > most:
        raise Refused(
            Code.UNSUPPORTED, f"the JPEG has more than {most} scans for its size", field="images"
        )


def _check_chunks(data: bytes, facts: ImageFacts) -> None:
    """Refuse a PNG whose chunks reach beyond its end: OpenCV makes room for all they claim."""
    at = 8
    try:
        for _ in range(_MOST_CHUNKS):
            length, kind = unpack_from(">I4s", data, at)
            if kind == b"IEND" and at < facts.body:
                break  # OpenCV reads on for the pixels, and believes what comes
            at += 12 + length
            if kind == b"IEND" and at <= len(data):
                return
    except struct.error:
        pass
    raise _broken(facts)


def _check_words(words: str, facts: ImageFacts) -> None:
    """Refuse a JPEG that the decoder mended: it fills in grey, and says so only on stderr."""
    extraneous = _EXTRANEOUS.search(words)
    if extraneous is not None and int(extraneous[1]) > _HARMLESS_BYTES:
        raise _broken(facts)
    for complaint in ("premature end", "Premature end", "bad Huffman", "code table"):
        if complaint in words:
            raise _broken(facts)


@contextmanager
def _listening() -> Iterator[Callable[[], str]]:
    """Collect what is written to the process's stderr meanwhile; gives what has come so far.

    The native decoders know no other way to warn, and a sender of broken files could flood the
    log with it. No more than a pipe holds is kept.
    """
    if sys.platform == "win32":
        # Its decoder has a stderr of its own.
        yield str
        return
    reading, writing = os.pipe()
    own = os.dup(2)
    try:
        os.set_blocking(reading, False)
        os.set_blocking(writing, False)
        os.dup2(writing, 2)
        yield lambda: _read(reading)
    finally:
        os.dup2(own, 2)
        for handle in (own, reading, writing):
            os.close(handle)


def _read(handle: int) -> str:
    try:
        return os.read(handle, 1 << 16).decode("utf-8", "replace")
    except BlockingIOError:
        return ""
