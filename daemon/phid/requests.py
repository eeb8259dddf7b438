"""What requesters say: requests, decoded and checked."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError, from_json

from phid import topics
from phid.decoding import decode, is_all_brackets, mistake, refusal
from phid.errors import Code, Refused
from phid.formats import ResponseFormat

MAX_TOPIC_CHARS = 512
_MAX_TAGS = 16
_MAX_TAG_CHARS = 256
_PLAIN = "answers are text, or JSON by response_format, in this version"
_PICTURE = 'a picture is {"b64":"..."}, its bytes in base64 or a data URL'
# Fields that other servers take, and what is said to whoever sends one.
_FOREIGN = {
    "format": "here it is response_format",
    **dict.fromkeys(("tools", "tool_choice", "functions"), _PLAIN),
    "stream_options": "every result has its usage",
    "options": "what would be in it stands beside prompt: temperature, top_p, top_k, seed, stop",
    "max_completion_tokens": "here it is max_tokens",
    "max_new_tokens": "here it is max_tokens",
    "num_predict": "here it is max_tokens",
    "user": "who asks is client, the last level of the topic",
    "n": "a request has one answer",
    "keep_alive": "the device's setting engine.keep_alive_s says it",
    "image": "here it is images",
    "image_url": "here it is images",
    "images.type": _PICTURE,
    "images.image_url": _PICTURE,
    "images.url": f"nothing is fetched: {_PICTURE}",
    "images.data": _PICTURE,
}


def _level(text: str) -> str:
    if not topics.is_level(text):
        raise PydanticCustomError("level", "must be 1 to 64 of A-Z a-z 0-9 _ -")
    return text


def _topic(text: str) -> str:
    if not topics.is_publishable(text):
        raise PydanticCustomError("topic", "must be a topic, without wildcards")
    return text


def _detail(value: Any) -> Any:
    # A union's own mistakes name its branches instead of the field.
    if type(value) not in {str, int} or value not in {"low", "auto", "high", *range(1, 17)}:
        raise PydanticCustomError("detail", "must be low, auto, high or 1 to 16 crops")
    return value


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise PydanticCustomError("nul", "must not contain NUL")
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank", "must not be empty")
    return text


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > _MAX_TAGS:
        raise PydanticCustomError("tags", f"at most {_MAX_TAGS}")
    return value


def _tag(value: Any) -> Any:
    if not isinstance(value, str | int | float):
        raise PydanticCustomError("tag", "must be text, a number, true or false")
    if isinstance(value, float) and not math.isfinite(value):
        raise PydanticCustomError("tag", "must be a finite number")
    if len(str(value)) > _MAX_TAG_CHARS:
        raise PydanticCustomError("tag", f"at most {_MAX_TAG_CHARS} characters")
    return value


Level = Annotated[str, AfterValidator(_level)]
Text = Annotated[str, AfterValidator(_without_nul)]
TagName = Annotated[str, Field(max_length=64)]
Tag = Annotated[Any, AfterValidator(_tag)]


class Message(BaseModel):
    """What comes in: every field of it is known."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ChatMessage(Message):
    """One turn of `messages`."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[Text, AfterValidator(_not_blank)]


class ImageRef(Message):
    """One picture of a request: its bytes in base64, a part sent apart, or a camera's newest."""

    b64: str | None = Field(
        None, min_length=1, description="The file's bytes in base64, or a data URL."
    )
    mime: str | None = Field(None, max_length=64, description="Ignored: the bytes tell.")
    label: Text | None = Field(None, max_length=64, description="A name, for the asker's own use.")
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = Field(
        None, description="Of the bytes, to be checked."
    )
    part: int | None = Field(
        None, ge=0, le=999, description="The bytes come on in/part/<client>/<id>/<part>."
    )
    topic: Annotated[str, AfterValidator(_topic)] | None = Field(
        None, max_length=MAX_TOPIC_CHARS, description="The newest frame of this camera topic."
    )

    @model_validator(mode="after")
    def _has_a_source(self) -> ImageRef:
        if [self.b64, self.part, self.topic].count(None) != 2:
            raise mistake("images", "each needs one of b64, part and topic")
        return self


Detail = Annotated[
    Literal["low", "auto", "high"] | Annotated[int, Field(ge=1, le=16)], BeforeValidator(_detail)
]


class Request(Message):
    """A request for text; the fields' defaults are what applies when they are absent."""

    foreign: ClassVar[dict[str, str]] = _FOREIGN

    v: Literal[1] = Field(1, description="Version of the wire.")
    id: Level | None = Field(None, description="Names the request; made up when absent.")
    client: Level | None = Field(
        None, description="Who asks; must equal the topic's client level where there is one."
    )
    prompt: Annotated[Text, AfterValidator(_not_blank)] | None = Field(
        None, description="What to answer; this or `messages`."
    )
    messages: tuple[ChatMessage, ...] | None = Field(
        None,
        min_length=1,
        fail_fast=True,
        examples=[[{"role": "user", "content": "Hi"}]],
        description="A whole conversation, its last turn the user's.",
    )
    system: Text | None = Field(None, description="The system turn, put in front.")
    model: str | None = Field(None, description="A loaded model's name; the device's own if absent")
    max_tokens: int = Field(256, ge=1, description="Most tokens of the answer.")
    temperature: float = Field(0.0, ge=0, le=2, allow_inf_nan=False, description="0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False, description="Nucleus sampling.")
    top_k: int = Field(50, ge=1, le=1000, description="Choose among so many likeliest tokens.")
    seed: int | None = Field(
        None, ge=0, le=2**31 - 1, description="Makes sampling repeatable on one device."
    )
    stop: tuple[Annotated[Text, Field(min_length=1, max_length=128)], ...] = Field(
        (),
        max_length=8,
        fail_fast=True,
        examples=[["\n", "END"]],
        description="The answer ends before any of these.",
    )
    stream: Literal["none", "delta"] = Field(
        "none", description="none: one message is the answer; delta: text as it comes, too."
    )
    response_format: ResponseFormat = Field(
        ResponseFormat(),
        examples=[{"type": "json_object"}],
        description="As in OpenAI's API: text, any JSON object, or by a schema.",
    )
    deadline_ms: int = Field(
        600_000, ge=1, description="Not wanted any more after so long, counted from arrival."
    )
    priority: int = Field(5, ge=0, le=9, description="Higher goes first.")
    reply_to: str | None = Field(
        None,
        max_length=MAX_TOPIC_CHARS,
        description="Reply topic; MQTT 5's Response Topic wins.",
    )
    session: Level | None = Field(
        None, description="Goes on with this conversation of the client's, kept on the device."
    )
    images: tuple[ImageRef, ...] = Field(
        (),
        fail_fast=True,
        examples=[[{"b64": "..."}]],
        description="Pictures to look at: [{b64}, {part} or {topic}]; on in/frame only.",
    )
    detail: Detail = Field(
        "auto", description="Most crops a picture is cut into: low 1, auto 4, high 16, or 1 to 16."
    )
    tags: Annotated[dict[TagName, Tag], BeforeValidator(_few)] = Field(
        default_factory=dict,
        examples=[{"room": "hall"}],
        description="Echoed in the event line, not used.",
    )

    @model_validator(mode="after")
    def _has_onemistake(self) -> Request:
        if self.prompt is None and self.messages is None:
            raise mistake("prompt", "give prompt or messages")
        if self.prompt is not None and self.messages is not None:
            raise mistake("messages", "give either prompt or messages")
        if self.messages is not None:
            if self.messages[-1].role != "user":
                raise mistake("messages", "the last of them must be the user's")
            if any(m.role == "system" for m in self.messages[1:]) or (
                self.system is not None and self.messages[0].role == "system"
            ):
                raise mistake("messages", "one system turn, and it comes first")
        return self

    def digest(self, topic_kind: str, images: tuple[str, ...] = ()) -> str:
        """The request's content as a SHA-256: equal for retries, whatever their reply topic.

        `images` are the SHA-256s of its pictures. A field at its default is as good as absent, so
        that a field which a later version adds leaves the digests of all others as they were.
        """
        content = self.model_dump(
            mode="json",
            exclude={"id", "client", "deadline_ms", "reply_to", "images"},
            exclude_defaults=True,
        )
        canonical = json.dumps([topic_kind, content, images], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


class CameraPicture(Message):
    """A camera's frame as JSON: bytes as an image's, and when it was taken. The rest is ignored."""

    model_config = ConfigDict(extra="ignore")

    b64: str | None = None
    image: str | None = None
    ts: float | None = Field(None, allow_inf_nan=False, description="Unix seconds.")

    @model_validator(mode="after")
    def _has_bytes(self) -> CameraPicture:
        if not (self.b64 or self.image):
            raise mistake("b64", "a frame in JSON needs b64 or image")
        return self


def decode_request(payload: bytes, limit_bytes: int) -> Request:
    """The request in a payload. Raises Refused with what is wrong and where."""
    return decode(Request, payload, limit_bytes)


def decode_properties(user: tuple[tuple[str, str], ...]) -> Request:
    """The request that goes with a raw frame: its fields as MQTT 5 user properties.

    A value is text as it stands, or a number; `stop` may come several times, and `response_format`
    is JSON. Raises Refused.
    """
    content: dict[str, Any] = {}
    for name, value in user:
        if name == "stop":
            content.setdefault(name, []).append(value)
        elif name in ("v", "detail") and value.isdecimal():
            content[name] = int(value[:4])
        elif name == "response_format":
            content[name] = _json(name, value)
        elif name in ("images", "messages", "tags"):
            raise Refused(Code.BAD_REQUEST, f"{name}: not as a property", field=name)
        else:
            content[name] = value
    return checked(content)


def checked(fields: dict[str, Any]) -> Request:
    """The request of these fields. Raises Refused."""
    try:
        return Request.model_validate(fields)
    except ValidationError as error:
        raise refusal(Request, error) from None


def _json(name: str, text: str) -> Any:
    try:
        return from_json(text)
    except ValueError:
        raise Refused(Code.BAD_REQUEST, f"{name}: must be JSON", field=name) from None


def decode_picture(payload: bytes, limit_bytes: int) -> CameraPicture:
    """A camera's frame in JSON. Raises Refused."""
    return decode(CameraPicture, payload, limit_bytes)


def salvage(payload: bytes, limit_bytes: int) -> tuple[str | None, str | None]:
    """The id and reply_to of a payload that was refused, as far as they can be read.

    So that the error reaches whoever waits for it.
    """
    if len(payload) > limit_bytes or is_all_brackets(payload):
        return None, None
    try:
        content = from_json(payload)
    except ValueError:
        return None, None
    if not isinstance(content, dict):
        return None, None
    request_id, reply_to = content.get("id"), content.get("reply_to")
    return (
        request_id if isinstance(request_id, str) and topics.is_level(request_id) else None,
        reply_to if isinstance(reply_to, str) else None,
    )
