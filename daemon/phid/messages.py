"""What the device says: answers and reports, encoded; and decoded again by its clients."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from pydantic_core import from_json

from phid.errors import Code, Failure
from phid.jobs import Finish, Usage

VERSION = 1


class _Told(BaseModel):
    # A device of a later version may say more than a client of this one knows.
    model_config = ConfigDict(extra="ignore", frozen=True)


class Accepted(_Told):
    """Streaming only: the request is queued."""

    type: Literal["accepted"] = "accepted"
    id: str
    queue_pos: int = Field(description="Requests in front of it, the running one counted.")
    eta_ms: int | None = Field(None, description="Until its first token, when it can be told.")


class Delta(_Told):
    """Streaming only: more of the answer's text."""

    type: Literal["delta"] = "delta"
    id: str
    seq: int = Field(description="Counts 0, 1, 2...")
    text: str


class UsageReport(_Told):
    """Token counts."""

    prompt_tokens: int
    image_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int
    crops: int = Field(0, description="What the pictures were cut into, beside their global views.")

    @classmethod
    def of(cls, usage: Usage) -> Self:
        """The engine's own counts."""
        return cls(**asdict(usage))


class Timing(_Told):
    """Where the time went, in milliseconds."""

    queued_ms: int
    prefill_ms: int
    ttft_ms: int = Field(description="From arrival to the first token.")
    decode_ms: int
    total_ms: int
    tokens_per_s: float = Field(description="Of the decode phase.")


class Result(_Told):
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
    looped: Literal[True] | None = Field(
        None, description="It was cut, as `length`, for it only repeated itself."
    )
    session: str | None = Field(None, description="The conversation that it goes on with.")
    session_turns: int | None = Field(
        None, description="How many earlier turns of that the model was shown."
    )
    duplicate: Literal[True] | None = Field(None, description="It may have been sent before.")


class ErrorMessage(_Told):
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


class CtlReply(_Told):
    """What became of a command."""

    type: Literal["ctl"] = "ctl"
    id: str
    verb: str
    ok: bool
    data: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


class Status(_Told):
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


class JobEvent(_Told):
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


class StateEvent(_Told):
    """A change of the device's state, told on out/event."""

    type: Literal["state"] = "state"
    ts: int = Field(description="Unix seconds.")
    state: str
    was: str | None = None
    reason: str | None = None


class ModelEvent(_Told):
    """A model that is loaded now, or is not any more, told on out/event."""

    type: Literal["model"] = "model"
    ts: int = Field(description="Unix seconds.")
    model: str
    state: Literal["loading", "ready", "failed", "unloaded"]
    reason: str | None = None


class ReloadEvent(_Told):
    """The settings were read again, told on out/event; if not sound, the old ones hold."""

    type: Literal["reload"] = "reload"
    ts: int = Field(description="Unix seconds.")
    ok: bool
    changed: list[str] | None = Field(None, description="The settings that differ now.")
    restart_needed: list[str] | None = Field(None, description="Those of them that wait for it.")
    reason: str | None = Field(None, description="What is wrong, a line for each mistake.")


class ProviderReport(_Told):
    """What was found of one provider."""

    provider: str
    passed: bool
    says: str
    mend: str | None = Field(None, description="What helps where it did not pass.")
    placement: dict[str, float] | None = None
    tokens_per_s: float | None = None


class Provider(_Told):
    """Where the model runs, and why there."""

    requested: list[str] = Field(description="As in the settings.")
    actual: str | None = Field(None, description="Where most of the kernel time goes: measured.")
    placement: dict[str, float] = Field(
        description="Percent of kernel time by provider; sums to 100."
    )
    tokens_per_s: float | None = Field(None, description="A few tokens, while warming up.")
    report: list[ProviderReport] = Field(description="Of each that was looked at, in order.")


class ProviderEvent(_Told):
    """An engine is ready, and where it runs: told on out/event."""

    type: Literal["provider"] = "provider"
    ts: int = Field(description="Unix seconds.")
    model: str
    provider: Provider


class WatchResult(_Told):
    """What a standing prompt has found in a frame, told on out/watch/<name>/result."""

    type: Literal["watch_result"] = "watch_result"
    name: str = Field(description="The watch.")
    camera: str = Field(description="The topic's level at its filter's first wildcard.")
    topic: str = Field(description="Where the frame came from.")
    ts: float = Field(description="When the newest frame was taken, or else came; Unix seconds.")
    frames: int = Field(description="How many were looked at together.")
    device: str
    model: str
    provider: str = Field(description="Where it really ran.")
    text: str
    finish: Finish
    usage: UsageReport
    timing: Timing = Field(description="`queued_ms` is the frame's age when its turn came.")
    looped: Literal[True] | None = Field(
        None, description="It was cut, as `length`, for it only repeated itself."
    )


class WatchFailure(_Told):
    """Why a standing prompt has no answer for a frame: on the same topic."""

    type: Literal["watch_error"] = "watch_error"
    name: str
    camera: str
    topic: str
    ts: float = Field(description="When the newest frame came, Unix seconds.")
    code: Code
    status: int
    message: str
    field: str | None = None


class WatchStatus(_Told):
    """A standing prompt as it runs: retained on out/watch/<name>, and the answer to ctl/watch."""

    type: Literal["watch"] = "watch"
    name: str
    state: Literal["on", "off", "quiet", "suspended"]
    reason: str | None = Field(None, description="Why it is suspended, or not heard.")
    source: Literal["settings", "command"]
    ts: int = Field(description="When this was said, Unix seconds.")
    watch: dict[str, Any] = Field(description="Its definition, with every default.")


class Info(_Told):
    """What the device is and can do: retained."""

    v: Literal[1] = 1
    device: str
    version: str = Field(description="Of phid.")
    hardware: dict[str, Any] = Field(description="machine, os, python, cpus, ram_mb.")
    model: dict[str, Any] | None = Field(
        None,
        description="The default, or what is loaded in its place: name, kind, context...",
    )
    provider: Provider | None = Field(None, description="Where it runs, and why not elsewhere.")
    models: list[str] = Field(description="Names that requests may give as `model`.")
    loaded: list[str] = Field([], description="Those of them that answer at once.")
    limits: dict[str, int] = Field(description="As in the settings.")
    capabilities: list[str] = Field(
        description="Kinds of request that are answered, and whether sessions are kept."
    )


Answer = Accepted | Delta | Result | ErrorMessage | CtlReply
Outcome = Result | ErrorMessage
_ANSWERS: TypeAdapter[Answer] = TypeAdapter(Annotated[Answer, Field(discriminator="type")])


def encode(message: BaseModel) -> bytes:
    """The payload of a message: JSON without what is absent."""
    return message.model_dump_json(exclude_none=True).encode()


def decode_answer(payload: bytes) -> Answer:
    """What a device said to a requester. Raises ValueError if it is none of ours."""
    return _ANSWERS.validate_json(payload)


def decode_report(payload: bytes) -> dict[str, Any]:
    """What a device says of itself, as it says it. Raises ValueError if it is no JSON object."""
    content = from_json(payload)
    if not isinstance(content, dict):
        raise ValueError("no JSON object")  # noqa: TRY004 - as for any other wrong payload
    return content


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
