"""Standing prompts: what one says, when it is quiet, and the question it makes of a topic."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from phid import topics
from phid.decoding import refusal
from phid.errors import Code, Refused
from phid.formats import ResponseFormat
from phid.requests import Detail, Level, Text

MAX_WATCHES = 32
"""Of settings and commands together."""

_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)\Z")
_PLACE = re.compile(r"\{(camera|label)\}")


def _filter(text: str) -> str:
    if not topics.is_filter(text):
        raise PydanticCustomError("filter", "must be a topic filter, such as cameras/+/snapshot")
    return text


def _hours(text: str) -> str:
    if _HOURS.match(text) is None:
        raise PydanticCustomError("hours", "must be two times of day, such as 22:00-06:00")
    return text


class Watch(BaseModel):
    """A standing prompt on camera topics; the defaults are what applies to absent fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Level = Field(description="Its level in out/watch/<name>.")
    topic: Annotated[str, AfterValidator(_filter)] = Field(
        max_length=512, description="Where the frames come: an MQTT topic filter."
    )
    prompt: Text = Field(
        min_length=1,
        max_length=8192,
        description="What to ask of each; {camera} and {label} are taken from the topic.",
    )
    system: Text | None = Field(None, max_length=8192, description="The system turn, in front.")
    model: str | None = Field(None, description="A loaded model's name; the device's own if absent")
    detail: Detail = Field("auto", description="As in a request.")
    max_tokens: int = Field(128, ge=1, le=4096, description="Most tokens of an answer.")
    response_format: ResponseFormat = Field(
        ResponseFormat(), description="As in a request: what an answer is to look like."
    )
    min_interval_s: float = Field(
        10.0, ge=0, le=86400, allow_inf_nan=False, description="Between two frames of one camera."
    )
    max_age_s: float = Field(
        10.0, gt=0, le=86400, allow_inf_nan=False, description="Older frames are not looked at."
    )
    frames: int = Field(1, ge=1, le=16, description="So many of the last frames in one question.")
    every_s: float = Field(
        1.0, gt=0, le=3600, allow_inf_nan=False, description="At least so far apart, where several."
    )
    min_change_pct: float = Field(
        0.0,
        ge=0,
        le=100,
        allow_inf_nan=False,
        description="Skip what differs less from the last one answered, at its most; 0: none.",
    )
    quiet_hours: Annotated[str, AfterValidator(_hours)] | None = Field(
        None, description="Nothing is looked at between these, local time: 22:00-06:00."
    )
    enabled: bool = Field(True, description="false: defined, and not running.")

    def is_quiet(self, minute: int) -> bool:
        """True if this minute of the day lies in the quiet hours, which may cross midnight."""
        hours = _HOURS.match(self.quiet_hours or "")
        if hours is None:
            return False
        begin, end = (int(hours[n]) * 60 + int(hours[n + 1]) for n in (1, 3))
        if begin <= end:
            return begin <= minute < end
        return minute >= begin or minute < end

    def camera(self, topic: str) -> str:
        """What stands in this topic at the filter's first wildcard; without one, our own name."""
        found = self._wild_levels(topic)
        return found[0] if found else self.name

    def question(self, topic: str) -> str:
        """The prompt for a frame of this topic; a name in the topic is text, never a marker."""
        found = self._wild_levels(topic)
        named = {"camera": self.camera(topic), "label": found[1] if len(found) > 1 else ""}
        # Only the operator may write an image tag, <|image_1|>: a camera's name must not make one.
        return _PLACE.sub(lambda m: named[m[1]].replace("|", "/"), self.prompt)

    def _wild_levels(self, topic: str) -> list[str]:
        """The topic's levels under the filter's `+`, and the first under a final `#`."""
        pairs = zip(self.topic.split("/"), topic.split("/"), strict=False)
        # A level can be as long as a topic, and it goes into a prompt.
        return [level[:64] for wanted, level in pairs if wanted in ("+", "#")]


def minute_of_day() -> int:
    """The minute of the day, in this machine's local time: quiet hours are in that."""
    now = time.localtime()
    return now.tm_hour * 60 + now.tm_min


def merged(old: Watch | None, fresh: Mapping[str, Any]) -> Watch:
    """The watch with these fields; what they do not name is as it was. Raises Refused."""
    content = (old.model_dump() if old else {}) | dict(fresh)
    try:
        return Watch.model_validate(content, strict=True)
    except ValidationError as error:
        failure = refusal(Watch, error).failure
        # Every field is a flat one: what comes behind a dot is the library's word for its type.
        field = failure.field.partition(".")[0] if failure.field else None
        raise Refused(failure.code, failure.message, field=field) from None


def check(watch: Watch, base: str, max_images: int) -> None:
    """Raises Refused for a watch that this device cannot run."""
    if topics.overlap(watch.topic, f"{base}/#"):
        says = f"topic: {watch.topic} covers topics of our own, below {base}"
        raise Refused(Code.BAD_REQUEST, says, field="topic")
    if watch.frames > max_images:
        says = f"frames: at most {max_images} here, by vision.max_images"
        raise Refused(Code.BAD_REQUEST, says, field="frames")


def check_all(watches: Iterable[Watch], base: str, max_images: int) -> None:
    """Raises Refused for the first that cannot be run beside the others."""
    seen: set[str] = set()
    for watch in watches:
        if watch.name in seen:
            raise Refused(Code.BAD_REQUEST, f"two watches are named {watch.name}", field="name")
        seen.add(watch.name)
        check(watch, base, max_images)
    if len(seen) > MAX_WATCHES:
        raise Refused(Code.TOO_LARGE, f"at most {MAX_WATCHES} watches", field="name")
