"""phid ask: one request from the terminal, its answer streamed back."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from phid import messages, requests
from phid.client import Client, Unheard, Unreachable
from phid.errors import Code
from phid.jobs import Finish
from phid.messages import Delta, ErrorMessage, Outcome, Result
from phid.sections import Mqtt
from phid.topics import Topics

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_UNREACHABLE = 3
EXIT_NO_ANSWER = 4
EXIT_CANCELLED = 5
EXIT_DEADLINE = 6
EXIT_BUSY = 7
EXIT_INTERRUPTED = 130

EXITS = {
    EXIT_OK: "answered",
    EXIT_ERROR: "the device answered with an error",
    2: "wrong usage",
    EXIT_UNREACHABLE: "no broker, or the connection was lost",
    EXIT_NO_ANSWER: "no device answered in time",
    EXIT_CANCELLED: "cancelled",
    EXIT_DEADLINE: "the deadline passed",
    EXIT_BUSY: "busy, loading, paused or draining: try again",
    EXIT_INTERRUPTED: "interrupted",
}

_AGAIN_S = 1.0
_RETRIABLE = frozenset({Code.BUSY, Code.LOADING, Code.PAUSED, Code.DRAINING})


@dataclass(frozen=True, slots=True)
class Question:
    """What to ask of which device, and how long to wait; `fields` are those of a request."""

    device: str
    fields: dict[str, Any]
    timeout_s: float
    wait: bool = False
    as_json: bool = False
    client: str | None = None


def ask(mqtt: Mqtt, question: Question, out: TextIO, err: TextIO) -> int:
    """Ask, print, and give the exit status; see EXITS.

    With `wait` the request is sent again, under the same id, until a device takes it.
    """
    topics = Topics(mqtt.base, question.device)
    late = time.monotonic() + question.timeout_s
    name = question.client or f"cli-{uuid.uuid4().hex[:8]}"
    rx = topics.rx(name)
    request_id = question.fields.get("id") or uuid.uuid4().hex[:12]
    fields = question.fields | {"id": request_id, "stream": "delta", "client": name}
    request = requests.Request.model_validate(fields)
    try:
        with Client(mqtt, (rx,), name=name) as client:
            client.connect(question.timeout_s if question.wait else min(5, question.timeout_s))
            try:
                outcome = _converse(client, topics, question, request, late, out)
            except KeyboardInterrupt:
                cancel = messages.encode(requests.CancelRequest(id=request_id))
                client.publish(topics.cancel(name), cancel)
                print("\ncancelled", file=err)
                return EXIT_INTERRUPTED
    except Unheard:
        print(
            f"phid: no device named {question.device!r} listens on this broker: "
            "`phid fleet --once` shows who does",
            file=err,
        )
        return EXIT_NO_ANSWER
    except Unreachable as unreachable:
        print(f"phid: {unreachable} (mqtt.host, mqtt.port or --host, --port)", file=err)
        return EXIT_UNREACHABLE
    if outcome is None:
        print(
            f"phid: device {question.device!r} did not answer within {question.timeout_s:g} s: "
            "is `phid run` there, under this name? `phid fleet --once` shows who is",
            file=err,
        )
        return EXIT_NO_ANSWER
    return _report(outcome, question, out, err)


def _converse(
    client: Client,
    topics: Topics,
    question: Question,
    request: requests.Request,
    late: float,
    out: TextIO,
) -> Outcome | None:
    """The outcome, its text printed as it comes; None when time is up."""
    printed = _Printer(out, silent=question.as_json)
    while (now := time.monotonic()) < late:
        client.publish(
            (topics.frame if request.images else topics.text)(client.name),
            messages.encode(request),
            response_topic=topics.rx(client.name),
            expiry_s=max(1, round(late - now)),
            must_be_heard=not question.wait,
        )
        until = min(late, now + _AGAIN_S) if question.wait else late
        while (inbound := client.receive(until)) is not None:
            match _answer(inbound.payload, request.id):
                case None:
                    continue
                case Delta() as delta:
                    until = late
                    printed.add(delta)
                case Result() as result:
                    printed.finish(result.text)
                    return result
                case ErrorMessage() as error:
                    if not (question.wait and error.code in _RETRIABLE):
                        printed.break_off()
                        return error
                    time.sleep(_AGAIN_S)
                    break
                case _:  # accepted: from here on it is only a matter of time
                    until = late
    return None


def _answer(payload: bytes, request_id: str | None) -> messages.Answer | None:
    """What a device says to our request; None for anything else that reached our inbox."""
    try:
        answer = messages.decode_answer(payload)
    except ValueError:
        return None
    return answer if answer.id == request_id else None


class _Printer:
    """Prints deltas, and at the end whatever of the text they did not bring."""

    def __init__(self, out: TextIO, *, silent: bool) -> None:
        self._out = out
        self._silent = silent
        self._next_seq = 0
        self._text = ""

    def add(self, delta: Delta) -> None:
        # QoS 0: what comes after a gap cannot be shown before the result tells the whole text.
        if delta.seq == self._next_seq:
            self._next_seq += 1
            self._text += delta.text
            self._write(delta.text)

    def finish(self, text: str) -> None:
        if text.startswith(self._text):
            self._write(text[len(self._text) :] + "\n")
        else:
            self._write("\n" + text + "\n")

    def break_off(self) -> None:
        if self._text:
            self._write("\n")

    def _write(self, text: str) -> None:
        if not self._silent:
            print(text, end="", file=self._out, flush=True)


def _report(outcome: Outcome, question: Question, out: TextIO, err: TextIO) -> int:
    if question.as_json:
        print(outcome.model_dump_json(exclude_none=True), file=out)
    if isinstance(outcome, ErrorMessage):
        if not question.as_json:
            again = f" (again in {outcome.retry_after_ms} ms)" if outcome.retry_after_ms else ""
            print(f"phid: {outcome.code}: {outcome.message}{again}", file=err)
        if outcome.code in _RETRIABLE:
            return EXIT_BUSY
        return {Code.CANCELLED: EXIT_CANCELLED, Code.EXPIRED: EXIT_DEADLINE}.get(
            outcome.code, EXIT_ERROR
        )
    if not question.as_json:
        print(_summary(outcome), file=err)
    return {Finish.CANCELLED: EXIT_CANCELLED, Finish.DEADLINE: EXIT_DEADLINE}.get(
        outcome.finish, EXIT_OK
    )


def _summary(result: Result) -> str:
    usage, timing = result.usage, result.timing
    seen = f" ({usage.image_tokens} of images)" if usage.image_tokens else ""
    looped = " (it repeated itself)" if result.looped else ""
    return (
        f"{result.device}: {result.model} on {result.provider}; "
        f"{usage.prompt_tokens} tokens in{seen}, {usage.output_tokens} out; "
        f"first after {timing.ttft_ms} ms, all in {timing.total_ms} ms, "
        f"{timing.tokens_per_s:.1f} tokens/s; finish: {result.finish}{looped}"
    )


def request_fields(
    prompt: str,
    *,
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    images: Sequence[tuple[str, bytes]] = (),
    detail: str | None = None,
    model: str | None = None,
) -> dict[str, Any]:
    """The fields of a request, without those left to the device; of each image, label and file."""
    fields: dict[str, Any] = {
        "prompt": prompt,
        "system": system,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "model": model,
        "detail": int(detail) if detail is not None and detail.isdecimal() else detail,
    }
    if images:
        fields["images"] = tuple(
            {"b64": base64.b64encode(data).decode(), "label": label[:64]} for label, data in images
        )
    return {name: value for name, value in fields.items() if value is not None}
