"""The words of the wire: requests and commands decoded, answers and reports encoded."""

from __future__ import annotations

import difflib
import hashlib
import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError, from_json

from phid import topics
from phid.errors import Code, Failure, Refused
from phid.jobs import Finish

VERSION = 1


def _not_yet(value: Any) -> Any:
    if value is not None:
        raise PydanticCustomError("unsupported", "not supported by this version")
    return value


def _level(text: str) -> str:
    if not topics.is_level(text):
        raise PydanticCustomError("level", "must be 1 to 64 of A-Z a-z 0-9 _ -")
    return text


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise PydanticCustomError("nul", "must not contain NUL")
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank", "must not be empty")
    return text


Level = Annotated[str, AfterValidator(_level)]
Text = Annotated[str, AfterValidator(_without_nul)]
NotYet = Annotated[Any, BeforeValidator(_not_yet)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


M = TypeVar("M", bound=_Message)

# In: what requesters and operators send.


class ChatMessage(_Message):
    """One turn of `messages`."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[Text, AfterValidator(_not_blank)]


class TextFormat(_Message):
    """The only answer format so far: plain text."""

    type: Literal["text"] = "text"


def _format(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type") not in (None, "text"):
        raise PydanticCustomError("unsupported", "only type text is supported by this version")
    return value


class Request(_Message):
    """A request for text; the fields' defaults are what applies when they are absent."""

    v: Literal[1] = Field(1, description="Version of the wire.")
    id: Level | None = Field(None, description="Names the request; made up when absent.")
    client: Level | None = Field(
        None, description="Who asks; must equal the topic's client level where there is one."
    )
    prompt: Annotated[Text, AfterValidator(_not_blank)] | None = Field(
        None, description="What to answer; this or `messages`."
    )
    messages: tuple[ChatMessage, ...] | None = Field(
        None, min_length=1, description="A whole conversation, its last turn the user's."
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
        (), max_length=8, description="The answer ends before any of these."
    )
    stream: Literal["none", "delta"] = Field(
        "none", description="none: one message is the answer; delta: text as it comes, too."
    )
    format: Annotated[TextFormat, BeforeValidator(_format)] = Field(
        TextFormat(), description="Shape of the answer: {type: text}."
    )
    deadline_ms: int = Field(
        600_000, ge=1, description="Not wanted any more after so long, counted from arrival."
    )
    priority: int = Field(5, ge=0, le=9, description="Higher goes first.")
    reply_to: str | None = Field(None, description="Reply topic; MQTT 5's Response Topic wins.")
    session: NotYet = Field(None, description="Not yet: a conversation kept on the device.")
    images: NotYet = Field(None, description="Not yet: images to look at.")
    detail: NotYet = Field(None, description="Not yet: how closely images are looked at.")
    tags: dict[str, str | int | float | bool] = Field(
        default_factory=dict, max_length=16, description="Echoed in the event line, not used."
    )

    @model_validator(mode="after")
    def _has_one_question(self) -> Request:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("question", "give either prompt or messages")
        if self.messages is not None:
            if self.messages[-1].role != "user":
                raise PydanticCustomError("question", "the last of messages must be the user's")
            if any(m.role == "system" for m in self.messages[1:]) or (
                self.system is not None and self.messages[0].role == "system"
            ):
                raise PydanticCustomError("question", "one system turn, and it comes first")
        return self

    def digest(self, topic_kind: str) -> str:
        """The request's content as a SHA-256: equal for retries, whatever their reply topic."""
        content = self.model_dump(
            mode="json", exclude={"id", "client", "deadline_ms", "reply_to"}, exclude_none=True
        )
        canonical = json.dumps([topic_kind, content], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


class CancelRequest(_Message):
    """Ends one of the sender's own requests."""

    id: Level = Field(description="The request to end.")


class Command(_Message):
    """The payload of a ctl topic; empty is fine for verbs that need nothing."""

    id: Level | None = Field(None, description="Names the command; made up when absent.")
    reply_to: str | None = Field(None, description="Reply topic; MQTT 5's Response Topic wins.")
    level: Literal["debug", "info", "warning", "error"] | None = Field(
        None, description="log: the new level."
    )
    for_s: float | None = Field(
        None, gt=0, le=86400, allow_inf_nan=False, description="log: back to the old level after."
    )
    what: Literal["engine", "service"] = Field("engine", description="restart: which program.")


# Out: what the device says.


class Accepted(_Message):
    """Streaming only: the request is queued."""

    type: Literal["accepted"] = "accepted"
    id: str
    queue_pos: int = Field(description="Requests in front of it, the running one counted.")
    eta_ms: int | None = Field(None, description="Until its first token, when it can be told.")


class Delta(_Message):
    """Streaming only: more of the answer's text."""

    type: Literal["delta"] = "delta"
    id: str
    seq: int = Field(description="Counts 0, 1, 2...")
    text: str


class UsageReport(_Message):
    """Token counts."""

    prompt_tokens: int
    image_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int


class Timing(_Message):
    """Where the time went, in milliseconds."""

    queued_ms: int
    prefill_ms: int
    ttft_ms: int = Field(description="From arrival to the first token.")
    decode_ms: int
    total_ms: int
    tokens_per_s: float = Field(description="Of the decode phase.")


class Result(_Message):
    """The answer."""

    type: Literal["result"] = "result"
    id: str
    client: str
    device: str
    model: str
    provider: str = Field(description="Where it really ran.")
    text: str
    finish: Finish
    usage: UsageReport
    timing: Timing
    deltas: int = Field(description="How many deltas were published for it.")
    duplicate: Literal[True] | None = Field(None, description="It may have been sent before.")


class ErrorMessage(_Message):
    """Why there is no answer."""

    type: Literal["error"] = "error"
    id: str
    code: Code
    status: int
    message: str
    field: str | None = None
    retry_after_ms: int | None = None
    text: str | None = Field(None, description="What had been generated before it failed.")
    duplicate: Literal[True] | None = None


class CtlReply(_Message):
    """What became of a command."""

    type: Literal["ctl"] = "ctl"
    id: str
    verb: str
    ok: bool
    data: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


class Status(_Message):
    """The device's state: retained, and as `offline` its will."""

    v: Literal[1] = 1
    state: Literal["loading", "online", "degraded", "paused", "draining", "offline"]
    session: str = Field(description="This connection; an offline of another one is stale.")
    since: int = Field(description="When the state began, Unix seconds.")
    ts: int = Field(description="When this was said, Unix seconds.")
    reason: str | None = None
    queue: int = 0
    model: str | None = None
    provider: str | None = None
    version: str


class JobEvent(_Message):
    """A finished job, told on out/event; never its prompt or its answer."""

    type: Literal["job"] = "job"
    ts: int = Field(description="Unix seconds.")
    id: str
    client: str
    outcome: str = Field(description="The result's finish, or the error's code.")
    model: str | None = None
    output_tokens: int = 0
    total_ms: int = Field(description="From arrival to outcome.")
    tags: dict[str, Any] | None = None


class StateEvent(_Message):
    """A change of the device's state, told on out/event."""

    type: Literal["state"] = "state"
    ts: int = Field(description="Unix seconds.")
    state: str
    was: str | None = None
    reason: str | None = None


class Info(_Message):
    """What the device is and can do: retained."""

    v: Literal[1] = 1
    device: str
    version: str = Field(description="Of phid.")
    hardware: dict[str, Any] = Field(description="machine, os, python, cpus, ram_mb.")
    model: dict[str, Any] | None = Field(
        None, description="The loaded one: name, kind, context, provider, threads, runtime..."
    )
    models: list[str] = Field(description="Names that requests may give as `model`.")
    limits: dict[str, int] = Field(description="As in the settings.")
    capabilities: list[str] = Field(description="Kinds of request that are answered.")


Answer = Accepted | Delta | Result | ErrorMessage | CtlReply
Outcome = Result | ErrorMessage
_ANSWERS: TypeAdapter[Answer] = TypeAdapter(Annotated[Answer, Field(discriminator="type")])


def encode(message: BaseModel) -> bytes:
    """The payload of a message: JSON without what is absent."""
    return message.model_dump_json(exclude_none=True).encode()


def decode_answer(payload: bytes) -> Answer:
    """What a device said to a requester. Raises ValueError if it is none of ours."""
    return _ANSWERS.validate_json(payload)


def error_message(request_id: str, failure: Failure) -> ErrorMessage:
    """The message that tells a failure."""
    return ErrorMessage(
        id=request_id,
        code=failure.code,
        status=failure.code.status,
        message=failure.message,
        field=failure.field,
        retry_after_ms=failure.retry_after_ms,
        text=failure.text,
    )


def decode_request(payload: bytes, limit_bytes: int) -> Request:
    """The request in a payload. Raises Refused with what is wrong and where."""
    return _decode(Request, payload, limit_bytes)


def decode_cancel(payload: bytes) -> CancelRequest:
    """The id to cancel. Raises Refused."""
    return _decode(CancelRequest, payload, 4096)


def decode_command(payload: bytes) -> Command:
    """The options of a command; an empty payload has none. Raises Refused."""
    return _decode(Command, payload or b"{}", 4096)


def salvage(payload: bytes, limit_bytes: int) -> tuple[str | None, str | None]:
    """The id and reply_to of a payload that was refused, as far as they can be read.

    So that the error reaches whoever waits for it.
    """
    if len(payload) > limit_bytes:
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


def _decode(model: type[M], payload: bytes, limit_bytes: int) -> M:
    if len(payload) > limit_bytes:
        raise Refused(
            Code.TOO_LARGE, f"payload of {len(payload)} bytes: the limit is {limit_bytes}"
        )
    try:
        return model.model_validate_json(payload, strict=True)
    except ValidationError as error:
        # The first mistake is enough, and an unknown field explains the ones after it.
        mistakes = error.errors(include_url=False, include_input=False)
        mistakes.sort(key=lambda e: e["type"] != "extra_forbidden")
        raise _refused(model, dict(mistakes[0])) from None


def _refused(model: type[_Message], mistake: dict[str, Any]) -> Refused:
    field = ".".join(str(level) for level in mistake["loc"]) or None
    kind, says = mistake["type"], mistake["msg"]
    if kind == "json_invalid":
        return Refused(Code.BAD_REQUEST, says)
    if kind == "model_type":
        return Refused(Code.BAD_REQUEST, "the payload must be a JSON object")
    if kind == "extra_forbidden":
        name = str(mistake["loc"][-1])[:64]
        close = difflib.get_close_matches(name, list(model.model_fields), n=1)
        hint = f": did you mean {close[0]}?" if close else ""
        return Refused(Code.BAD_REQUEST, f"unknown field {name!r}{hint}", field=name)
    code = Code.UNSUPPORTED if kind == "unsupported" else Code.BAD_REQUEST
    return Refused(code, f"{field}: {says}" if field else says, field=field)
