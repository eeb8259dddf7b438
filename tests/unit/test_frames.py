from __future__ import annotations

import os
import random
import struct
import time
import tracemalloc
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pictures
from phid import frames
from phid.errors import Code, Refused
from phid.images import ImageFacts, plan, shrink
from pictures import BLUE, RED, WHITE

TWO = pictures.two_colours(32, 16)
NOISY = pictures.busy(200, 100)


def near(one: Any, other: Any, within: float = 4) -> bool:
    return bool(np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= within)


def is_two_colours(picture: Any) -> bool:
    width = picture.shape[1]
    assert picture.dtype == np.uint8
    left, right = picture[:, : width // 2 - 2], picture[:, width // 2 + 2 :]
    return near(left, RED) and near(right, BLUE)


def refused(data: bytes) -> str:
    with pytest.raises(Refused) as caught:
        frames.decode(data)
    assert caught.value.failure.code is Code.UNSUPPORTED
    assert caught.value.failure.field == "images"
    return caught.value.failure.message


def filtered(rows: list[bytes]) -> bytes:
    return b"".join(b"\0" + row for row in rows)


HALF = bytes(16)
PALETTE = (b"PLTE", bytes((*RED, *BLUE)))
ROW16 = np.where(TWO[0], 0xFFFF, 0x00FF).astype(">u2").tobytes()


@pytest.mark.parametrize(
    "data",
    [
        pictures.jpeg(TWO),
        pictures.jpeg(TWO, progressive=True),
        pictures.CMYK_JPEG,
        pictures.encode(".png", TWO),
        pictures.encode(".webp", TWO),
        pictures.lossless_webp(TWO),
        pictures.encode(".bmp", TWO),
        pictures.png(32, 16, 8, 3, filtered([HALF + b"\1" * 16] * 16), PALETTE),
        pictures.png(32, 16, 1, 3, filtered([b"\0\0\xff\xff"] * 16), PALETTE),
        pictures.png(32, 16, 16, 2, filtered([ROW16] * 16)),
        pictures.jpeg(TWO) + b"PK\3\4 and a whole archive",
    ],
    ids=[
        *("jpeg", "progressive", "cmyk", "png", "webp", "lossless", "bmp"),
        *("palette", "palette of 1 bit", "16 bits", "polyglot"),
    ],
)
def test_each_kind_becomes_rgb(data: bytes) -> None:
    assert is_two_colours(frames.decode(data))


GREY = np.repeat(np.arange(32, dtype=np.uint8)[None] * 8, 16, 0)


@pytest.mark.parametrize(
    "data",
    [
        pictures.jpeg(GREY, 100),
        pictures.encode(".png", GREY),
        pictures.encode(".png", GREY.astype(np.uint16) * 257),
        pictures.encode(".bmp", GREY),
        pictures.png(32, 16, 8, 4, filtered([bytes(b for g in GREY[0] for b in (g, 255))] * 16)),
    ],
    ids=["jpeg", "png", "16 bits", "bmp", "with alpha"],
)
def test_grey_becomes_three_equal_channels(data: bytes) -> None:
    picture = frames.decode(data)
    assert (picture == picture[:, :, :1]).all()
    assert near(picture[:, :, 0], GREY, 1)


def with_alpha(alpha: Any) -> Any:
    return np.dstack([TWO, np.broadcast_to(np.uint8(alpha), TWO.shape[:2])])


@pytest.mark.parametrize("extension", [".png", ".webp"])
def test_what_is_transparent_shows_white(extension: str) -> None:
    assert is_two_colours(frames.decode(pictures.encode(extension, with_alpha(255))))
    gone = frames.decode(pictures.encode(extension, with_alpha(0)))
    assert near(gone, WHITE)
    half = frames.decode(pictures.encode(extension, with_alpha(128)))
    assert near(half[8, 4], (255, 127, 127))
    assert near(half[8, 28], (127, 127, 255))


def test_the_palettes_transparency_shows_white_too() -> None:
    chunks = (PALETTE, (b"tRNS", b"\0\xff"))
    data = pictures.png(32, 16, 8, 3, filtered([HALF + b"\1" * 16] * 16), *chunks)
    picture = frames.decode(data)
    assert near(picture[8, 4], WHITE)
    assert near(picture[8, 28], BLUE)


# What a camera that was turned or mirrored has stored of a picture with these corners.
CORNERS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [250, 250, 0]]], np.uint8)
STORED = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, 1),
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: np.rot90(p, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_a_turned_picture_is_put_upright(kind: str, orientation: int) -> None:
    picture = CORNERS.repeat(16, 0).repeat(24, 1)
    stored = np.ascontiguousarray(STORED[orientation](picture))
    write = {"jpeg": pictures.jpeg, "webp": pictures.lossless_webp}
    data = write[kind](stored) if kind in write else pictures.encode(".png", stored)
    upright = frames.decode(pictures.with_exif(data, pictures.tiff(orientation)))
    assert upright.shape == (32, 48, 3)
    seen = [upright[y, x] for y in (4, 28) for x in (4, 44)]
    assert near(seen, CORNERS.reshape(4, 3), 12)


def test_orientation_and_alpha_go_together() -> None:
    data = pictures.encode(".png", with_alpha(0))
    assert frames.decode(pictures.with_exif(data, pictures.tiff(6))).shape == (32, 16, 3)


# Bodies that are broken.

WHOLE = {
    "jpeg": pictures.jpeg(NOISY, 60),
    "progressive": pictures.jpeg(NOISY, 60, progressive=True),
    "png": pictures.encode(".png", NOISY),
    "webp": pictures.encode(".webp", NOISY),
    "lossless": pictures.lossless_webp(NOISY),
    "bmp": pictures.encode(".bmp", NOISY),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_body_that_ends_early_is_unsupported(kind: str) -> None:
    data = WHOLE[kind]
    rng = random.Random(kind)
    lengths = {len(data) // 2, len(data) - 1, *rng.sample(range(800, len(data)), 40)}
    for length in lengths:
        refused(data[:length])


@pytest.mark.parametrize("kind", ["jpeg", "progressive"])
def test_a_jpeg_that_is_only_said_to_be_whole_is_unsupported(kind: str) -> None:
    # libjpeg fills what is missing with grey and calls that a warning.
    data = WHOLE[kind]
    for length in (len(data) // 4, len(data) // 2, len(data) * 3 // 4):
        refused(data[:length] + b"\xff\xd9")


def test_a_thumbnails_end_is_not_the_pictures() -> None:
    exif = pictures.tiff(1) + pictures.jpeg(TWO)
    data = pictures.with_exif(WHOLE["jpeg"], exif)
    frames.decode(data)
    refused(data[: len(data) * 3 // 4])


def test_a_few_bytes_before_the_end_harm_nobody() -> None:
    data = WHOLE["jpeg"]
    frames.decode(data[:-2] + b"\0\0\0" + data[-2:])
    refused(data[:-2] + bytes(400) + data[-2:])


def test_damage_in_a_png_is_never_shown() -> None:
    rng = random.Random(1)
    data, shown = WHOLE["png"], 0
    picture = frames.decode(data)
    for _ in range(100):
        broken = bytearray(data)
        broken[rng.randrange(45, len(data) - 16)] ^= rng.randrange(1, 256)
        with suppress(Refused):
            shown += not (frames.decode(bytes(broken)) == picture).all()
    assert not shown


def test_a_picture_of_another_size_than_its_header_says_is_unsupported() -> None:
    inner = pictures.webp_chunk(WHOLE["webp"])
    refused(pictures.extended_webp(400, 100, 0, inner))
    refused(pictures.extended_webp(20, 20, 0, inner))


def test_a_jpeg_of_endless_scans_is_not_decoded() -> None:
    data = pictures.jpeg(np.zeros((3000, 4000), np.uint8), progressive=True)
    scan = data.rindex(b"\xff\xda")
    many = data[:scan] + data[scan:-2] * 500 + data[-2:]
    began_s = time.thread_time()
    assert "scans" in refused(many)
    assert time.thread_time() - began_s < 0.1


def test_a_large_jpeg_in_a_few_bytes_is_not_decoded() -> None:
    data = bytearray(pictures.jpeg(TWO))
    size = data.index(b"\xff\xc0") + 5
    data[size : size + 4] = struct.pack(">HH", 4000, 6000)
    began_s = time.thread_time()
    refused(bytes(data))
    assert time.thread_time() - began_s < 0.02


@pytest.mark.parametrize("kind", [b"IDAT", b"iCCP", b"tEXt", b"eXIf", b"fdAT"])
def test_a_chunk_that_claims_gigabytes_takes_none(kind: bytes) -> None:
    data = bytearray(WHOLE["png"])
    if kind != b"IDAT":
        data[33:33] = pictures.chunk(kind, b"")
    at = data.index(kind)
    data[at - 4 : at] = struct.pack(">I", 2**31 - 1)
    began_s = time.thread_time()
    refused(bytes(data))
    assert time.thread_time() - began_s < 0.02


def test_a_claim_behind_an_early_end_takes_nothing_either() -> None:
    data = WHOLE["png"]
    claim = struct.pack(">I", 2**31 - 1) + data[data.index(b"IDAT") :]
    began_s = time.thread_time()
    refused(data[:33] + pictures.chunk(b"IEND", b"") + claim)
    assert time.thread_time() - began_s < 0.02


def test_a_png_of_endless_chunks_is_not_walked_to_its_end() -> None:
    data = WHOLE["png"]
    began_s = time.thread_time()
    refused(data[:-12] + pictures.chunk(b"tEXt", b"") * 500_000 + data[-12:])
    assert time.thread_time() - began_s < 0.1


def test_a_png_that_inflates_to_more_than_its_rows_is_bounded() -> None:
    size = struct.pack(">IIBBBBB", 32, 16, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(50_000_000))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        pictures.chunk(*c) for c in ((b"IHDR", size), (b"IDAT", body), (b"IEND", b""))
    )
    began_s = time.thread_time()
    with suppress(Refused):
        assert frames.decode(data).shape == (16, 32, 3)
    assert time.thread_time() - began_s < 0.5


def test_broken_files_do_not_fill_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    for data in WHOLE.values():
        refused(data[: len(data) * 2 // 3])
    refused(WHOLE["jpeg"][:900] + b"\xff\xd9")
    assert capfd.readouterr() == ("", "")


def test_stderr_is_itself_again_afterwards(capfd: pytest.CaptureFixture[str]) -> None:
    handles = Path("/proc/self/fd")
    before = len(list(handles.iterdir())) if handles.is_dir() else 0
    for _ in range(50):
        refused(WHOLE["jpeg"][:900])
        frames.decode(WHOLE["jpeg"])
    if before:
        assert len(list(handles.iterdir())) == before
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"


def survives(data: bytes) -> bool:
    """Whether it is decoded; if so it keeps to what its header says."""
    try:
        picture = frames.decode(data)
    except Refused:
        return False
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    assert picture.shape[2] == 3
    return True


SMALL = [
    pictures.jpeg(TWO),
    pictures.jpeg(TWO, progressive=True),
    pictures.CMYK_JPEG,
    pictures.with_exif(pictures.jpeg(TWO[:, :, 0]), pictures.tiff(6)),
    pictures.encode(".png", TWO),
    pictures.encode(".png", with_alpha(100)),
    pictures.encode(".png", TWO.astype(np.uint16) * 257),
    pictures.png(32, 16, 8, 3, filtered([HALF + b"\1" * 16] * 16), PALETTE),
    pictures.encode(".webp", TWO),
    pictures.lossless_webp(TWO),
    pictures.encode(".webp", with_alpha(100)),
    pictures.encode(".bmp", TWO),
    pictures.jpeg(NOISY, 30),
    pictures.jpeg(NOISY, 30, progressive=True),
    pictures.encode(".webp", NOISY),
]


@settings(max_examples=300)
@given(st.sampled_from(SMALL), st.integers(2, 40), st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused(sound: bytes, kept: int, rest: bytes) -> None:
    survives(sound[:kept] + rest)


# The transform.


def normalised(colour: tuple[int, int, int]) -> Any:
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return (np.array(colour) / 255 - mean) / deviation


def test_the_values_are_clips() -> None:
    pixels = frames.transform(pictures.two_colours(672, 672), 1)
    assert pixels.values.dtype == np.float32
    assert pixels.values.shape == (2, 3, 336, 336)
    assert (pixels.size, pixels.tokens) == ((336, 336), 313)
    for view in pixels.values:
        assert np.allclose(view[:, 100, 50], normalised(RED), atol=1e-5)
        assert np.allclose(view[:, 100, 300], normalised(BLUE), atol=1e-5)


def test_the_global_view_is_first_and_crops_follow_row_by_row() -> None:
    picture = CORNERS.repeat(400, 0).repeat(400, 1)
    pixels = frames.transform(picture, 4)
    assert pixels.values.shape == (5, 3, 336, 336)
    middles = pixels.values[1:, :, 168, 168]
    for middle, colour in zip(middles, CORNERS.reshape(4, 3), strict=True):
        assert np.allclose(middle, normalised(tuple(colour)), atol=1e-5)
    whole = pixels.values[0]
    seen = [whole[:, y, x] for y in (84, 252) for x in (84, 252)]
    assert np.allclose(seen, middles, atol=1e-5)


@pytest.mark.parametrize("crops", [1, 4, 6, 16])
def test_a_portrait_is_a_landscape_on_its_side(crops: int) -> None:
    picture = pictures.busy(500, 300)
    lying = frames.transform(picture, crops)
    cut = plan(500, 300, crops)
    standing = frames.transform(np.ascontiguousarray(picture.swapaxes(0, 1)), crops)
    assert standing.size == lying.size[::-1]
    tiles = lying.values[1:].reshape(cut.rows, cut.columns, 3, 336, 336)
    expected = tiles.transpose(1, 0, 2, 4, 3).reshape(-1, 3, 336, 336)
    # Rounding to bytes happens between the two directions of a resize: one step of a byte.
    assert np.abs(standing.values[1:] - expected).max() < 0.031
    assert np.abs(standing.values[1:] - expected).mean() < 0.003


def test_the_ground_is_white_and_the_picture_in_its_middle() -> None:
    pixels = frames.transform(np.zeros((90, 160, 3), np.uint8), 1)
    column = pixels.values[1, 0, :, 168]
    white, black = normalised(WHITE)[0], normalised((0, 0, 0))[0]
    assert np.allclose(column[:73], white, atol=1e-5)
    assert np.allclose(column[74:262], black, atol=1e-5)
    assert np.allclose(column[263:], white, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "height"), [(1, 1), (1, 20_000), (20_000, 1), (3, 2), (337, 335)]
)
@pytest.mark.parametrize("crops", [1, 16])
def test_any_shape_is_cut(width: int, height: int, crops: int) -> None:
    pixels = frames.transform(np.full((height, width, 3), 255, np.uint8), crops)
    cut = plan(width, height, crops)
    assert pixels.size == cut.size
    assert pixels.values.shape == (cut.crops + 1, 3, 336, 336)
    assert np.allclose(pixels.values[:, 0], normalised(WHITE)[0], atol=1e-5)


def triangle(size: int, target: int) -> Any:
    """Weights (target, size) of bilinear resampling whose triangle grows with the ratio."""
    ratio = max(size / target, 1)
    middles = (np.arange(target) + 0.5) * size / target
    distance = np.abs(np.arange(size)[None] + 0.5 - middles[:, None]) / ratio
    weights = np.clip(1 - distance, 0, None)
    return weights / weights.sum(1, keepdims=True)


def in_triangles(picture: Any, crops: int) -> Any:
    """A picture's green, scaled as for its crops, in normalised units."""
    height, width = picture.shape[:2]
    cut = plan(width, height, crops)
    down, across = triangle(height, cut.height), triangle(width, cut.width)
    return (down @ picture[:, :, 1] @ across.T / 255 - 0.4578275) / 0.26130258


def ground(pixels: frames.Pixels, picture: Any, crops: int) -> Any:
    """The crops put together again, without what was padded."""
    cut = plan(picture.shape[1], picture.shape[0], crops)
    tall = pixels.values[1:].reshape(cut.rows, cut.columns, 3, 336, 336)
    whole = tall.transpose(0, 3, 1, 4, 2).reshape(*cut.size, 3)
    return whole[cut.top :, cut.left :][: cut.height, : cut.width]


@pytest.mark.parametrize(
    ("width", "height", "crops"),
    [
        *((1920, 1080, 1), (1920, 1080, 4), (1920, 1080, 16), (1280, 720, 1), (1280, 720, 4)),
        *((800, 600, 1), (800, 600, 4), (2592, 1944, 4), (640, 480, 16), (1001, 751, 1)),
        # Sides that are odd again and again as they are halved.
        *((1499, 1999, 1), (1999, 1499, 1), (4999, 463, 1)),
    ],
)
def test_scaling_is_bilinear_with_antialiasing(width: int, height: int, crops: int) -> None:
    picture = pictures.busy(width, height)
    pixels = frames.transform(picture, crops)
    green = in_triangles(picture, crops)
    assert np.abs(ground(pixels, picture, crops)[:, :, 1] - green).mean() < 0.02


# A JPEG far larger than its crops.


def shrink_for(facts: ImageFacts, crops: int) -> int:
    cut = plan(*facts.upright, crops)
    return shrink(facts, cut.width, cut.height)


@pytest.mark.parametrize(
    ("width", "height", "crops", "times"),
    [
        *((1920, 1080, 1, 2), (1920, 1080, 4, 1), (2592, 1944, 1, 2), (2592, 1944, 4, 1)),
        *((4000, 3000, 1, 4), (4000, 3000, 4, 2), (4000, 3000, 16, 1), (6000, 4000, 16, 2)),
        *((5000, 5000, 1, 4), (5000, 5000, 4, 2), (5376, 40, 1, 8), (672, 504, 1, 1)),
        *((1344, 1008, 1, 2), (1343, 1007, 1, 1), (640, 480, 1, 1), (16384, 1500, 1, 4)),
        # Too much of the last means would lie beyond the edge.
        *((5002, 5002, 1, 2), (5001, 5001, 1, 1), (1999, 1499, 1, 1)),
    ],
)
def test_a_large_jpeg_is_decoded_as_small_as_its_crops_allow(
    width: int, height: int, crops: int, times: int
) -> None:
    for size in ((width, height), (height, width)):
        for orientation in (1, 6):
            facts = ImageFacts("jpeg", *size, orientation)
            assert shrink_for(facts, crops) == times
    assert shrink_for(ImageFacts("png", width, height), crops) == 1


@pytest.mark.parametrize(
    ("width", "height", "crops", "progressive"),
    [
        *((1920, 1080, 1, False), (1280, 2000, 1, True), (2800, 2100, 4, False)),
        *((2800, 2100, 1, True), (5002, 40, 1, False), (1364, 1024, 1, False)),
    ],
)
def test_a_jpeg_decoded_small_looks_the_same(
    width: int, height: int, crops: int, progressive: bool
) -> None:
    data = pictures.jpeg(pictures.busy(width, height), 85, progressive=progressive)
    facts = frames.inspect(data)
    assert shrink_for(facts, crops) > 1
    small, whole = frames.look(data, crops), frames.decode(data)
    full = frames.transform(whole, crops)
    assert (small.size, small.values.shape) == (full.size, full.values.shape)
    assert np.abs(small.values - full.values).mean() < 0.005
    if height > 1000:
        green = in_triangles(whole, crops)
        assert np.abs(ground(small, whole, crops)[:, :, 1] - green).mean() < 0.02


@pytest.mark.parametrize("orientation", STORED)
def test_a_turned_jpeg_decoded_small_is_put_upright(orientation: int) -> None:
    picture = CORNERS.repeat(600, 0).repeat(800, 1)
    stored = np.ascontiguousarray(STORED[orientation](picture))
    data = pictures.with_exif(pictures.jpeg(stored), pictures.tiff(orientation))
    assert shrink_for(frames.inspect(data), 1) == 2
    seen, wanted = frames.look(data, 1), frames.transform(picture, 1)
    assert seen.size == wanted.size
    assert np.abs(seen.values - wanted.values).mean() < 0.02


def test_a_small_decoding_of_a_broken_jpeg_is_refused_too() -> None:
    for progressive in (False, True):
        data = pictures.jpeg(pictures.busy(2000, 1500), 60, progressive=progressive)
        frames.look(data, 1)
        for broken in (data[:-2], data[: len(data) // 2], data[: len(data) // 2] + b"\xff\xd9"):
            with pytest.raises(Refused) as caught:
                frames.look(broken, 1)
            assert caught.value.failure.code is Code.UNSUPPORTED


def test_what_is_decoded_small_takes_little_memory() -> None:
    data = pictures.jpeg(np.zeros((5000, 5000), np.uint8))
    tracemalloc.start()
    frames.look(data, 1)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


def test_pictures_of_different_crop_counts_are_stacked() -> None:
    small = frames.transform(pictures.busy(320, 240), 1)
    large = frames.transform(pictures.busy(320, 240), 4)
    batch = frames.stack([small, large], np.float16)
    assert batch.pixels.shape == (2, 5, 3, 336, 336)
    assert batch.pixels.dtype == np.float16
    assert not batch.pixels[0, 2:].any()
    assert np.abs(batch.pixels[1] - large.values).max() < 0.01
    assert (batch.sizes.tolist(), batch.tokens.tolist()) == ([[336, 336], [672, 672]], [313, 757])
    assert batch.sizes.dtype == batch.tokens.dtype == np.int64
    assert frames.stack([small], np.float32, 17).pixels.shape == (1, 17, 3, 336, 336)


def test_a_picture_written_as_png_is_the_same() -> None:
    assert (frames.decode(frames.as_png(NOISY)) == NOISY).all()
