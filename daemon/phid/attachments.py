"""The pictures of a request: taken out of its payload, held against the limits, and hashed."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from phid import images, requests
from phid.errors import Code, Failure, Refused
from phid.jobs import Image
from phid.requests import Detail, ImageRef, Request
from phid.sections import Vision

# How many bytes a frame in JSON may have beside the picture.
_JSON_BYTES = 65_536
_CROPS = {"low": 1, "auto": 4, "high": 16}


@dataclass(frozen=True, slots=True)
class PictureLimits:
    """The most a request may bring: how many pictures, and how large each (bytes, pixels)."""

    count: int = 4
    image_bytes: int = images.MAX_BYTES
    pixels: int = images.MAX_PIXELS
    side: int = images.MAX_SIDE

    @classmethod
    def of(cls, vision: Vision) -> Self:
        """Those that the settings name."""
        return cls(vision.max_images, vision.image_bytes, vision.max_pixels, vision.max_side)


@dataclass(frozen=True, slots=True)
class PartRef:
    """A picture whose bytes are sent apart."""

    n: int
    label: str = ""
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class TopicRef:
    """A picture that is a camera's newest frame."""

    topic: str
    field: str
    label: str = ""


Picture = Image | PartRef | TopicRef


def crops_of(detail: Detail) -> int:
    """The most crops a picture may be cut into at this level of detail."""
    return detail if isinstance(detail, int) else _CROPS[detail]


def of_request(request: Request, limits: PictureLimits) -> tuple[Picture, ...]:
    """The pictures a request names; the headers of those it brings are sound. Raises Refused."""
    _check_count(len(request.images), limits)
    return tuple(_decode(ref, n, limits) for n, ref in enumerate(request.images))


def of_part(payload: bytes, limits: PictureLimits) -> bytes | Failure:
    """A part's bytes if its header is sound, else what its request is told."""
    try:
        _inspect(payload, limits)
    except Refused as refused:
        return refused.failure
    return payload


def complete(pictures: tuple[Picture, ...], parts: dict[int, bytes | Failure]) -> tuple[Image, ...]:
    """The pictures with the bytes of each part put in; all must have come. Raises Refused."""
    filled = (_fill(p, parts[p.n]) if isinstance(p, PartRef) else p for p in pictures)
    return tuple(p for p in filled if isinstance(p, Image))


def seen(pictures: tuple[Picture, ...], look: Callable[[TopicRef], Image]) -> tuple[Picture, ...]:
    """The pictures with the cameras' frames put in. Raises Refused where `look` does."""
    return tuple(look(p) if isinstance(p, TopicRef) else p for p in pictures)


def wanted(pictures: tuple[Picture, ...]) -> frozenset[int]:
    """The numbers of the parts that are sent apart."""
    return frozenset(picture.n for picture in pictures if isinstance(picture, PartRef))


def of_payload(payload: bytes, limits: PictureLimits) -> tuple[Image, ...]:
    """The one picture that a raw payload is. Raises Refused."""
    _check_count(1, limits)
    _inspect(payload, limits)
    return (Image(payload),)


def of_camera(payload: bytes, limits: PictureLimits) -> tuple[Image, float | None]:
    """The picture that a camera published, raw or in JSON, and when it says it was taken.

    Unix seconds, or None where it does not say. Raises Refused.
    """
    if not is_json(payload):
        _inspect(payload, limits)
        return Image(payload), None
    picture = requests.decode_picture(payload, limits.image_bytes * 4 // 3 + _JSON_BYTES)
    return _decode_bytes(ImageRef(b64=picture.b64 or picture.image), 0, limits), picture.ts


def is_json(payload: bytes) -> bool:
    """True for a payload that begins with a brace: no picture does."""
    return payload[:16].lstrip().startswith(b"{")


def hashes(pictures: tuple[Picture, ...]) -> tuple[str, ...]:
    """The SHA-256 of each picture, for the request's digest.

    A part has the hash that the request gives, for its bytes may come later, or else its number.
    A camera has its topic: the same question asked again is not a new one.
    """
    return tuple(_hash(picture) for picture in pictures)


def _hash(picture: Picture) -> str:
    match picture:
        case Image(data):
            return hashlib.sha256(data).hexdigest()
        case PartRef(n, _, sha256):
            return sha256 or f"part {n}"
        case TopicRef(topic):
            return f"topic {topic}"


def _fill(ref: PartRef, part: bytes | Failure) -> Image:
    field = f"part.{ref.n}"
    if isinstance(part, Failure):
        says, wait_ms = f"part {ref.n}: {part.message}", part.retry_after_ms
        raise Refused(part.code, says, field=field, retry_after_ms=wait_ms)
    if ref.sha256 is not None and hashlib.sha256(part).hexdigest() != ref.sha256:
        raise Refused(Code.BAD_REQUEST, f"part {ref.n} has another SHA-256", field=field)
    return Image(part, ref.label)


def _check_count(count: int, limits: PictureLimits) -> None:
    if count == 0:
        raise Refused(Code.BAD_REQUEST, "images: a frame request needs one", field="images")
    if count > limits.count:
        says = f"images: {count} are too many, {limits.count} are allowed"
        raise Refused(Code.TOO_LARGE, says, field="images")


def _decode(ref: ImageRef, n: int, limits: PictureLimits) -> Picture:
    if ref.part is not None:
        return PartRef(ref.part, ref.label or "", ref.sha256)
    if ref.topic is not None:
        return TopicRef(ref.topic, f"images.{n}.topic", ref.label or "")
    return _decode_bytes(ref, n, limits)


def _decode_bytes(ref: ImageRef, n: int, limits: PictureLimits) -> Image:
    assert ref.b64 is not None
    field = f"images.{n}.b64"
    text = _without_head(ref.b64, field)
    # Four characters carry three bytes: no need to decode what is too large.
    if len(text) * 3 // 4 > limits.image_bytes + 3:
        says = f"the image has over {limits.image_bytes} bytes"
        raise Refused(Code.TOO_LARGE, says, field=field)
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(Code.BAD_REQUEST, f"{field}: not base64", field=field) from None
    if ref.sha256 is not None and hashlib.sha256(data).hexdigest() != ref.sha256:
        raise Refused(
            Code.BAD_REQUEST, "the bytes have another SHA-256", field=f"images.{n}.sha256"
        )
    _inspect(data, limits)
    return Image(data, ref.label or "")


def _without_head(text: str, field: str) -> str:
    """The base64 in a text, which may be a data URL (RFC 2397) of any type.

    Raises Refused.
    """
    if text[:5].lower() != "data:":
        return text
    head, comma, data = text.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        says = f"{field}: a data URL must be in base64, data:image/jpeg;base64,..."
        raise Refused(Code.BAD_REQUEST, says, field=field)
    return data


def _inspect(data: bytes, limits: PictureLimits) -> None:
    images.inspect(
        data, max_bytes=limits.image_bytes, max_pixels=limits.pixels, max_side=limits.side
    )
