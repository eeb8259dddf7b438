from __future__ import annotations

import random
import struct
import time
import tracemalloc

import cv2
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pictures
from phid.errors import Code, Refused
from phid.images import ImageFacts, image_tokens, inspect, plan

TWO = pictures.two_colours(32, 16)
SOUND = {
    "jpeg": pictures.jpeg(TWO),
    "jpeg, progressive": pictures.jpeg(TWO, progressive=True),
    "jpeg, grey": pictures.jpeg(TWO[:, :, 0]),
    "jpeg, CMYK": pictures.CMYK_JPEG,
    "png": pictures.encode(".png", TWO),
    "png, 16 bits": pictures.encode(".png", TWO.astype("uint16") * 257),
    "webp": pictures.encode(".webp", TWO),
    "webp, lossless": pictures.lossless_webp(TWO),
    "webp, extended": pictures.extended_webp(
        32, 16, 0, pictures.webp_chunk(pictures.encode(".webp", TWO))
    ),
    "bmp": pictures.encode(".bmp", TWO),
}


def code(data: bytes, **limits: int) -> Code:
    with pytest.raises(Refused) as refused:
        inspect(data, **limits)
    assert refused.value.failure.field == "images"
    assert refused.value.failure.message[0].islower()
    return refused.value.failure.code


def outcome(data: bytes) -> ImageFacts | Code:
    try:
        return inspect(data)
    except Refused as refused:
        return refused.failure.code


@pytest.mark.parametrize("kind", SOUND)
def test_the_type_and_size_are_in_the_bytes(kind: str) -> None:
    facts = inspect(SOUND[kind])
    assert (facts.type, facts.width, facts.height) == (kind.partition(",")[0], 32, 16)
    assert (facts.orientation, facts.upright) == (1, (32, 16))


def test_no_bytes_are_a_bad_request() -> None:
    assert code(b"") is Code.BAD_REQUEST


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"Content-Type: image/jpeg", "no image"),
        (b"{}", "no image"),
        (b"\xff", "no image"),
        (b"BMW is a car and not a picture, whatever its two first letters say", "no image"),
        (b"GIF89a" + SOUND["jpeg"], "GIF"),
        (b"%PDF-1.7", "PDF"),
        (b"II*\0", "TIFF"),
        (b"\0\0\0\x20ftypavif", "AVIF"),
        (b"\0\0\0\x20ftypheic", "HEIC"),
        (b"\0\0\0\x20ftypisom", "video"),
        (b"RIFF\0\0\0\0WAVEfmt ", "no image"),
        (pictures.jpeg_header(32, 16, bits=12), "12 bits"),
    ],
)
def test_what_is_no_picture_is_told_what_it_is(data: bytes, name: str) -> None:
    assert code(data) is Code.UNSUPPORTED
    with pytest.raises(Refused, match=name):
        inspect(data)


BOMBS = {
    "jpeg": pictures.jpeg_header(65_000, 65_000),
    "png": pictures.png(2**31 - 1, 2**31 - 1, 16, 6, b"", (b"sRGB", b"\0")),
    "png, 64k": pictures.png(65_536, 65_536, 1, 0, bytes(10_000)),
    "webp": b"RIFF\0\0\0\0WEBPVP8L\0\0\0\0\x2f\xff\xff\xff\x0f",
    "webp, extended": pictures.extended_webp(2**24, 2**24, 0),
    "bmp": b"BM" + bytes(12) + struct.pack("<Iii", 40, 2**31 - 1, -(2**31)),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_for_next_to_nothing(kind: str) -> None:
    tracemalloc.start()
    assert code(BOMBS[kind]) is Code.TOO_LARGE
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_the_limits_are_the_callers() -> None:
    data = SOUND["png"]
    assert inspect(data, max_bytes=len(data), max_pixels=32 * 16, max_side=32)
    assert code(data, max_bytes=len(data) - 1) is Code.TOO_LARGE
    assert code(data, max_pixels=32 * 16 - 1) is Code.TOO_LARGE
    assert code(data, max_side=31) is Code.TOO_LARGE
    assert code(pictures.jpeg_header(1, 20_000)) is Code.TOO_LARGE
    assert inspect(pictures.jpeg_header(1, 20_000), max_side=20_000).height == 20_000


def test_a_picture_without_a_size_is_unsupported() -> None:
    # A height of 0 means: told after the first scan. Nothing here reads such a JPEG.
    assert code(pictures.jpeg_header(32, 0)) is Code.UNSUPPORTED
    assert code(pictures.png(0, 16, 8, 2, b"")) is Code.UNSUPPORTED
    assert code(b"BM" + bytes(12) + struct.pack("<Iii", 40, -5, 5)) is Code.UNSUPPORTED


def test_what_moves_is_unsupported() -> None:
    still = SOUND["png"]
    moving = still[:33] + pictures.chunk(b"acTL", struct.pack(">II", 2, 0)) + still[33:]
    assert code(moving) is Code.UNSUPPORTED
    assert code(pictures.extended_webp(32, 16, 0x02)) is Code.UNSUPPORTED


@pytest.mark.skipif(not hasattr(cv2, "imencodeanimation"), reason="this OpenCV writes none")
@pytest.mark.parametrize("extension", [".png", ".webp"])
def test_what_moves_is_found_in_real_files(extension: str) -> None:
    animation = cv2.Animation()
    animation.frames = [TWO, 255 - TWO]
    animation.durations = [100, 100]
    _, data = cv2.imencodeanimation(extension, animation)
    with pytest.raises(Refused, match="animated"):
        inspect(bytes(data))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "webp, lossless"])
def test_the_orientation_is_read(kind: str, order: str) -> None:
    for orientation in range(1, 9):
        exif = pictures.tiff(orientation, order)
        facts = inspect(pictures.with_exif(SOUND[kind], exif))
        assert facts.orientation == orientation
        assert facts.upright == ((32, 16) if orientation < 5 else (16, 32))


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"II*\0",
        b"XX*\0" + bytes(30),
        pictures.tiff(0),
        pictures.tiff(9),
        pictures.tiff(6, kind=4),
        pictures.tiff(6)[:30],
        b"II*\0" + struct.pack("<I", 2**32 - 1),
        b"II*\0" + struct.pack("<IH", 8, 65_535) + bytes(60_000),
    ],
)
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_broken_exif_is_no_orientation(kind: str, exif: bytes) -> None:
    assert inspect(pictures.with_exif(SOUND[kind], exif)).orientation == 1


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8" + b"\xff" * 8_000_000,
        b"\xff\xd8" + b"\xff\xe0\0\2" * 2_000_000,
        b"\xff\xd8" + b"\xff\xe0\0\0" * 2_000_000,
        b"\xff\xd8" + b"\xff\xd0" * 4_000_000,
        SOUND["png"][:33] + pictures.chunk(b"tEXt", b"") * 600_000,
        pictures.extended_webp(32, 16, 0x08) + (b"junk" + bytes(4)) * 1_000_000,
    ],
    ids=["fill", "segments", "lengths of 0", "restarts", "chunks", "webp chunks"],
)
def test_a_header_without_end_is_not_read_to_its_end(data: bytes) -> None:
    began_s = time.thread_time()
    read = ImageFacts("webp", 32, 16, body=30, decoder_bytes=4.0)
    assert outcome(data) in {Code.UNSUPPORTED, read}
    assert time.thread_time() - began_s < 0.02


@pytest.mark.parametrize("kind", [kind for kind in SOUND if kind.startswith("jpeg")])
def test_any_channels_of_a_jpeg_are_read_or_refused(kind: str) -> None:
    at = max(SOUND[kind].find(marker) for marker in (b"\xff\xc0", b"\xff\xc2"))
    for count in (*range(6), 255):
        for factors in (0x11, 0x00, 0xFF):
            data = bytearray(SOUND[kind])
            data[at + 9] = count
            data[at + 11] = factors
            outcome(bytes(data))
    data = bytearray(SOUND[kind])
    data[at + 9] = 0
    assert code(bytes(data)) is Code.UNSUPPORTED


@pytest.mark.parametrize("kind", SOUND)
def test_every_beginning_of_a_file_is_read_or_refused(kind: str) -> None:
    data = SOUND[kind]
    whole = inspect(data)
    for length in range(1, min(len(data), 1000)):
        assert outcome(data[:length]) in {Code.UNSUPPORTED, whole}


def taken(data: bytes) -> ImageFacts | None:
    """What a file that is not refused must keep to."""
    try:
        facts = inspect(data, max_pixels=1_000_000, max_side=2_000)
    except Refused:
        return None
    assert 0 < facts.width <= 2_000
    assert 0 < facts.height <= 2_000
    assert facts.width * facts.height <= 1_000_000
    assert 1 <= facts.orientation <= 8
    return facts


@given(
    magic=st.sampled_from([b"", *{data[:n] for data in SOUND.values() for n in (2, 4, 16, 30)}]),
    rest=st.binary(max_size=80),
)
def test_any_bytes_are_read_or_refused(magic: bytes, rest: bytes) -> None:
    taken(magic + rest)


@given(kind=st.sampled_from(sorted(SOUND)), seed=st.integers(0, 2**32))
def test_a_mutated_file_is_read_or_refused(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    data = bytearray(SOUND[kind])
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(min(len(data), 120))] = rng.randrange(256)
    taken(bytes(data))


# What a picture costs.


@pytest.mark.parametrize(
    ("width", "height", "crops", "size", "tokens"),
    [
        (640, 480, 1, (336, 336), 313),
        (1920, 1080, 1, (336, 336), 313),
        (640, 480, 4, (672, 672), 757),
        (1920, 1080, 4, (672, 672), 757),
        (1920, 1080, 6, (672, 1008), 1045),
        (640, 480, 16, (1008, 1344), 1921),
        (1920, 1080, 16, (1008, 1680), 2353),
        (1080, 1920, 16, (1680, 1008), 2377),
        (336, 336, 16, (1344, 1344), 2509),
        (1, 1, 16, (1344, 1344), 2509),
        (1, 20_000, 16, (5376, 336), 2653),
        (20_000, 1, 16, (336, 5376), 2473),
    ],
)
def test_known_pictures_cost_what_they_are_known_to(
    width: int, height: int, crops: int, size: tuple[int, int], tokens: int
) -> None:
    cut = plan(width, height, crops)
    assert (cut.size, cut.tokens) == (size, tokens)
    assert image_tokens(*size) == tokens


SIDES = st.integers(1, 20_000)


@given(width=SIDES, height=SIDES, crops=st.integers(1, 16))
def test_a_plan_keeps_to_its_budget_and_to_the_picture(width: int, height: int, crops: int) -> None:
    cut = plan(width, height, crops)
    assert 1 <= cut.crops <= crops
    assert 0 <= cut.left <= cut.left + cut.width <= cut.columns * 336
    assert 0 <= cut.top <= cut.top + cut.height <= cut.rows * 336
    # No crop is all padding, and what is thinner than a pixel is all that is distorted.
    assert (cut.columns - 1) * 336 < cut.width
    assert (cut.rows - 1) * 336 < cut.height
    if min(cut.width, cut.height) > 1:
        assert abs(cut.width * height - cut.height * width) <= max(width, height) * 2
    lying = plan(height, width, crops)
    assert (lying.size, lying.width) == (cut.size[::-1], cut.height) or width == height


@given(width=SIDES, height=SIDES, crops=st.integers(1, 15))
def test_a_larger_budget_never_costs_less(width: int, height: int, crops: int) -> None:
    assert plan(width, height, crops).crops <= plan(width, height, crops + 1).crops


def test_a_budget_out_of_range_is_the_nearest() -> None:
    assert plan(640, 480, 0) == plan(640, 480, 1)
    assert plan(640, 480, 99) == plan(640, 480, 16)
