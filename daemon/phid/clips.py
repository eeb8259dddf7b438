"""Frames of a film or of a local camera, as JPEG files: what `phid ask` sends as one request."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2

if TYPE_CHECKING:
    from collections.abc import Iterator

# The largest crop budget is 16 crops of 336 pixels: at 16:9 five of them side by side.
_MOST_SIDE = 1920
_QUALITY = 90
# Cameras need a few frames to find their exposure.
_WARM_UP_S = 0.5
_SILENCE_S = 5.0


class ClipError(ValueError):
    """No frames can be had; the message says of what, and why."""


@dataclass(frozen=True, slots=True)
class Still:
    """One frame: a JPEG file, and seconds since the beginning."""

    jpeg: bytes
    at_s: float

    @property
    def label(self) -> str:
        """The time, for people: 01:02.5."""
        minutes, seconds = divmod(self.at_s, 60)
        return f"{int(minutes):02}:{seconds:04.1f}"


def of_film(path: str, count: int) -> list[Still]:
    """`count` frames (fewer if it has no more) from evenly spread places of a film.

    Each stands for its share of the film and is taken from the middle of it. Raises ClipError.
    """
    with _opened(path) as capture:
        length = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        rate = capture.get(cv2.CAP_PROP_FPS) or 25.0
        wanted = sorted({int((n + 0.5) * length / count) for n in range(count)})
        stills = []
        if length > 0:
            stills = [_still(picture, at / rate) for at, picture in _sought(capture, wanted)]
        if len(stills) < len(wanted):
            # Its length is unknown, or it cannot be sought in: read it from end to end.
            capture.open(path)
            stills = [_still(picture, at / rate) for at, picture in _thinned(capture, count)]
    if not stills:
        raise ClipError(f"{path}: no frame of it can be decoded")
    return stills


def of_camera(name: str, count: int, every_s: float) -> list[Still]:
    """`count` frames, `every_s` seconds apart, of a camera: its number, device file or address.

    Raises ClipError.
    """
    stills: list[Still] = []
    with _opened(int(name) if name.isdecimal() else name) as capture:
        began = heard = time.monotonic()
        due = began + _WARM_UP_S
        while len(stills) < count:
            # Frames that are not wanted are read too, for the driver's queue keeps old ones.
            if capture.grab():
                heard = time.monotonic()
            elif time.monotonic() - heard > _SILENCE_S:
                raise ClipError(f"camera {name}: no frame for {_SILENCE_S:g} s")
            else:
                time.sleep(0.01)
                continue
            if heard >= due:
                sound, picture = capture.retrieve()
                if sound:
                    stills.append(_still(picture, heard - began))
                    due = heard + every_s
    return stills


@contextmanager
def _opened(source: str | int) -> Iterator[cv2.VideoCapture]:
    capture = cv2.VideoCapture(source)
    try:
        if not capture.isOpened():
            raise ClipError(f"{source}: cannot be opened as a film or a camera")
        yield capture
    finally:
        capture.release()


def _sought(capture: cv2.VideoCapture, wanted: list[int]) -> Iterator[tuple[int, Any]]:
    """Give (number, picture) of the frames that can be sought and decoded."""
    for number in wanted:
        capture.set(cv2.CAP_PROP_POS_FRAMES, number)
        sound, picture = capture.read()
        if sound:
            yield number, picture


def _thinned(capture: cv2.VideoCapture, count: int) -> list[tuple[int, Any]]:
    """Read to the end and keep `count` frames, evenly spread: bounded, however long the film is.

    Every `stride`-th is kept; when there are twice too many, every other goes.
    """
    kept: list[tuple[int, Any]] = []
    number, stride = 0, 1
    while capture.grab():
        if number % stride == 0:
            sound, picture = capture.retrieve()
            if sound:
                kept.append((number, picture))
        if len(kept) > 2 * count:
            kept, stride = kept[::2], stride * 2
        number += 1
    if not kept:
        return []
    middles = [(n + 0.5) * number / count for n in range(count)]
    nearest = {min((abs(at - middle), at) for at, _ in kept)[1] for middle in middles}
    return [(at, picture) for at, picture in kept if at in nearest]


def _still(picture: Any, at_s: float) -> Still:
    height, width = picture.shape[:2]
    scale = _MOST_SIDE / max(height, width)
    if scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    sound, jpeg = cv2.imencode(".jpg", picture, (cv2.IMWRITE_JPEG_QUALITY, _QUALITY))
    assert sound
    return Still(jpeg.tobytes(), at_s)
