from __future__ import annotations

import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest

from ip_camera import ip_camera
from phid import clips


def film(path: Path, frames: int, size: tuple[int, int] = (64, 48), rate: float = 10.0) -> str:
    """A film whose n-th frame is grey of the value n (mod 256)."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), rate, size)
    assert writer.isOpened()
    for n in range(frames):
        writer.write(np.full((size[1], size[0], 3), n % 256, np.uint8))
    writer.release()
    return str(path)


def grey(still: clips.Still) -> int:
    picture = cv2.imdecode(np.frombuffer(still.jpeg, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert picture is not None
    return round(float(picture.mean()))


def test_frames_come_from_the_middle_of_each_share(tmp_path: Path) -> None:
    stills = clips.of_film(film(tmp_path / "f.avi", 100), 4)
    assert [still.at_s for still in stills] == pytest.approx([1.2, 3.7, 6.2, 8.7], abs=0.051)
    assert [grey(still) for still in stills] == pytest.approx([12, 37, 62, 87], abs=2)
    assert stills[0].label == "00:01.2"


def test_a_short_film_gives_what_it_has(tmp_path: Path) -> None:
    path = film(tmp_path / "f.avi", 3)
    assert [grey(still) for still in clips.of_film(path, 8)] == pytest.approx([0, 1, 2], abs=1)


@pytest.mark.parametrize("frames", [2, 7, 8, 9, 100, 201])
def test_a_film_that_does_not_know_its_length_is_read_to_the_end(
    tmp_path: Path, frames: int
) -> None:
    path = film(tmp_path / "f.avi", frames)
    # A bare stream of JPEG files has no index, and no end that is told.
    bare = tmp_path / "f.mjpeg"
    data = Path(path).read_bytes()
    bare.write_bytes(b"".join(_jpegs(data)))
    stills = clips.of_film(str(bare), 4)
    assert len(stills) == min(4, frames)
    values = [grey(still) for still in stills]
    even = [(n + 0.5) * frames / len(stills) for n in range(len(stills))]
    assert values == pytest.approx(even, abs=max(2, frames / 8))


def _jpegs(data: bytes) -> list[bytes]:
    found = []
    at = data.find(b"\xff\xd8\xff")
    while at >= 0:
        end = data.index(b"\xff\xd9", at) + 2
        found.append(data[at:end])
        at = data.find(b"\xff\xd8\xff", end)
    return found


def test_large_frames_are_made_smaller(tmp_path: Path) -> None:
    (still,) = clips.of_film(film(tmp_path / "f.avi", 1, (3840, 2160)), 1)
    picture = cv2.imdecode(np.frombuffer(still.jpeg, np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    assert picture.shape == (1080, 1920, 3)


def test_a_camera_is_read_in_its_own_time() -> None:
    jpeg = cv2.imencode(".jpg", np.zeros((48, 64, 3), np.uint8))[1].tobytes()
    with ip_camera(jpeg) as address:
        stills = clips.of_camera(address, 3, 0.3)
    gaps = [b.at_s - a.at_s for a, b in itertools.pairwise(stills)]
    assert len(stills) == 3
    assert all(0.3 <= gap < 0.6 for gap in gaps)
    assert stills[0].at_s >= 0.5


@pytest.mark.parametrize("content", [None, b"", b"not a film at all"])
def test_what_is_no_film_is_told(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(clips.ClipError, match=r"x\.mp4"):
        clips.of_film(str(path), 4)


def test_a_camera_that_is_not_there_is_told() -> None:
    with pytest.raises(clips.ClipError, match="97"):
        clips.of_camera("97", 1, 1.0)
