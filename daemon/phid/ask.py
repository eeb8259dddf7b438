"""phid ask: one request from the terminal, its answer streamed back."""

from __future__ import annotations

import argparse
import base64
import json
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from phid import amounts, exits, messages, requests
from phid.client import Client, Forbidden, Unheard
from phid.commands import CancelRequest
from phid.errors import Code, Refused
from phid.jobs import Finish
from phid.messages import Delta, ErrorMessage, Outcome, Result
from phid.requests import Request
from phid.settings import Settings
from phid.topics import Topics
from phid.traffic import Inbound

_EXITS = {
    exits.OK: "answered",
    exits.ERROR: "the device answered with an error",
    exits.USAGE: "wrong usage",
    exits.UNREACHABLE: "no broker, or the connection was lost",
    exits.NO_ANSWER: "no device answered in time",
    exits.CANCELLED: "cancelled",
    exits.DEADLINE: "the deadline passed",
    exits.BUSY: "busy, loading, paused or draining: try again",
    exits.INTERRUPTED: "interrupted",
}

_AGAIN_S = 1.0
# How long the answer may still take to come after the deadline.
_GRACE_S = 1.5
_RETRIABLE = frozenset({Code.BUSY, Code.LOADING, Code.PAUSED, Code.DRAINING})


@dataclass(frozen=True, slots=True)
class Question:
    """What to ask, and how long to wait. With `wait` it is asked until a device takes it."""

    request: Request
    timeout_s: float
    wait: bool = False
    as_json: bool = False


def add_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    parents: list[argparse.ArgumentParser],
) -> None:
    """Give the command line `phid ask`."""
    statuses = "\n".join(f"  {status:3}  {meaning}" for status, meaning in _EXITS.items())
    asks = commands.add_parser(
        "ask",
        parents=parents,
        help="send a request and stream its answer",
        description="Send a request and stream its answer to stdout; the summary goes to stderr.",
        epilog=f"exit status:\n{statuses}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    asks.add_argument("prompt", help="what to ask; - reads it from stdin")
    asks.add_argument("--system", help="the system turn")
    asks.add_argument(
        "--session", metavar="NAME", help="go on with this conversation; it is --client's"
    )
    asks.add_argument("--model", metavar="NAME", help="one of out/info's models")
    asks.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of the answer")
    asks.add_argument("--temperature", type=float, metavar="T", help="0 (default) is greedy")
    asks.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a picture to look at; may come several times",
    )
    asks.add_argument(
        "--video",
        action="append",
        default=[],
        metavar="FILE",
        help="frames from evenly spread places of a film, in one request",
    )
    asks.add_argument(
        "--camera",
        metavar="N",
        help="frames of a local camera: its number, device file or address",
    )
    asks.add_argument(
        "--frames",
        type=amounts.count,
        default=4,
        metavar="K",
        help="of each film or camera (default 4)",
    )
    asks.add_argument(
        "--every",
        type=amounts.number,
        default=1.0,
        metavar="S",
        help="between a camera's (default 1)",
    )
    asks.add_argument(
        "--schema", type=Path, metavar="FILE", help="a JSON Schema that the answer is held to"
    )
    asks.add_argument("--detail", metavar="D", help="low, auto (default), high, or crops 1 to 16")
    asks.add_argument("--client", metavar="NAME", help="our level in the topics (default: random)")
    asks.add_argument(
        "--timeout", type=amounts.time_s, default=120.0, metavar="S", help="default 120"
    )
    asks.add_argument(
        "--wait", action="store_true", help="ask again until a device takes it, or time is up"
    )
    asks.add_argument("--json", action="store_true", help="print the outcome's JSON, nothing else")
    asks.set_defaults(command=_run)


def _run(settings: Settings, options: argparse.Namespace) -> int:
    try:
        request = _request(options)
    except Refused as refused:
        return _misused(refused.failure.message)
    except (OSError, ValueError) as error:
        return _misused(str(error))
    question = Question(request, options.timeout, options.wait, options.json)
    return ask(settings, question, sys.stdout, sys.stderr)


def _misused(says: str) -> int:
    print(f"phid ask: {says}", file=sys.stderr)
    return exits.USAGE


def _request(options: argparse.Namespace) -> Request:
    """What to send. Raises Refused, or OSError or ValueError with what to say."""
    detail = options.detail
    if options.session and not options.client:
        raise ValueError("--session wants --client: a conversation belongs to who has it")
    fields = {
        "id": uuid.uuid4().hex[:12],
        "client": options.client or f"cli-{uuid.uuid4().hex[:8]}",
        "stream": "delta",
        "prompt": sys.stdin.read() if options.prompt == "-" else options.prompt,
        "system": options.system,
        "session": options.session,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "response_format": _held_to(options.schema) if options.schema else None,
        "model": options.model,
        "detail": int(detail) if detail is not None and detail.isdecimal() else detail,
        "images": tuple(
            {"b64": base64.b64encode(data).decode(), "label": label[:64]}
            for label, data in _pictures(options)
        ),
    }
    # What is not given is left to the device.
    return requests.checked({n: v for n, v in fields.items() if v not in (None, ())})


def _held_to(path: Path) -> dict[str, Any]:
    """The response_format for a file's schema. Raises OSError or ValueError, with what to say."""
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from None
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def _pictures(options: argparse.Namespace) -> list[tuple[str, bytes]]:
    """The label and the file of each picture. Raises OSError or ValueError, with what to say."""
    pictures = [(path.name, path.read_bytes()) for path in options.image]
    if options.video or options.camera:
        from phid import clips  # noqa: PLC0415 - it brings OpenCV, which only this needs

        count, every_s = options.frames, options.every
        for film in options.video:
            pictures += [(still.label, still.jpeg) for still in clips.of_film(film, count)]
        if options.camera:
            stills = clips.of_camera(options.camera, count, every_s)
            pictures += [(still.label, still.jpeg) for still in stills]
    return pictures


def ask(settings: Settings, question: Question, out: TextIO, err: TextIO) -> int:
    """Ask, print, and give the exit status. Raises client.Unreachable.

    Ctrl-C cancels the request.
    """
    topics, name = settings.topics, question.request.client
    assert name is not None
    late = time.monotonic() + question.timeout_s
    try:
        with Client(settings.mqtt, (topics.rx(name),), name=name) as client:
            client.connect(question.timeout_s if question.wait else min(5, question.timeout_s))
            try:
                outcome = _converse(client, topics, question, late, out)
            except KeyboardInterrupt:
                cancel = messages.encode(CancelRequest(id=question.request.id))
                client.publish(topics.cancel(name), cancel)
                print("\ncancelled", file=err)
                return exits.INTERRUPTED
    except Forbidden as refused:
        print(
            f"phid: the broker does not let us ask as client {name!r} ({refused}): where users have"
            " an ACL of phid's, --client is the user's name",
            file=err,
        )
        return exits.NO_ANSWER
    except Unheard:
        print(
            f"phid: no device named {settings.device!r} listens on this broker: "
            "`phid fleet --once` shows who does",
            file=err,
        )
        return exits.NO_ANSWER
    if outcome is None:
        print(
            f"phid: device {settings.device!r} did not answer within {question.timeout_s:g} s: "
            "is `phid run` there, under this name? `phid fleet --once` shows who is",
            file=err,
        )
        return exits.NO_ANSWER
    return _report(outcome, question, out, err)


def _converse(
    client: Client,
    topics: Topics,
    question: Question,
    late: float,
    out: TextIO,
) -> Outcome | None:
    """The outcome, its text printed as it comes; None when time is up."""
    request = question.request
    printed = _Printer(out, silent=question.as_json)
    while (now := time.monotonic()) < late:
        client.publish(
            (topics.frame if request.images else topics.text)(client.name),
            messages.encode(request),
            response_topic=topics.rx(client.name),
            correlation=_correlation(request),
            expiry_s=max(1, round(late - now)),
            must_be_heard=not question.wait,
        )
        # The device answers when the deadline passes, with what there is by then.
        last = late + _GRACE_S
        until = min(last, now + _AGAIN_S) if question.wait else last
        while (inbound := client.receive(until)) is not None:
            match _answer(inbound, request):
                case None:
                    continue
                case Delta() as delta:
                    until = last
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
                    until = last
    return None


def _answer(inbound: Inbound, request: Request) -> messages.Answer | None:
    """What a device says to our request; None for anything else that reached our inbox.

    A device that could not read our request does not know its id: then the correlation data tell.
    """
    try:
        answer = messages.decode_answer(inbound.payload)
    except ValueError:
        return None
    ours = answer.id == request.id or inbound.correlation == _correlation(request)
    return answer if ours else None


def _correlation(request: Request) -> bytes:
    return (request.id or "").encode()


class _Printer:
    """Prints deltas, and at the end the text that they did not bring."""

    def __init__(self, out: TextIO, *, silent: bool) -> None:
        self._out = out
        self._silent = silent
        self._next_seq = 0
        self._text = ""

    def add(self, delta: Delta) -> None:
        # Deltas come at QoS 0: after a gap, the rest is shown once the result has the whole text.
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
            return exits.BUSY
        return {Code.CANCELLED: exits.CANCELLED, Code.EXPIRED: exits.DEADLINE}.get(
            outcome.code, exits.ERROR
        )
    if not question.as_json:
        print(_summary(outcome), file=err)
    return {Finish.CANCELLED: exits.CANCELLED, Finish.DEADLINE: exits.DEADLINE}.get(
        outcome.finish, exits.OK
    )


def _summary(result: Result) -> str:
    usage, timing = result.usage, result.timing
    parts = ((usage.image_tokens, "of images"), (usage.cached_tokens, "from the cache"))
    told = ", ".join(f"{count} {what}" for count, what in parts if count)
    seen = f" ({told})" if told else ""
    looped = " (it repeated itself)" if result.looped else ""
    before = f"; after {result.session_turns} turns" if result.session_turns is not None else ""
    return (
        f"{result.device}: {result.model} on {result.provider}; "
        f"{usage.prompt_tokens} tokens in{seen}, {usage.output_tokens} out; "
        f"first after {timing.ttft_ms} ms, all in {timing.total_ms} ms, "
        f"{timing.tokens_per_s:.1f} tokens/s; finish: {result.finish}{looped}{before}"
    )
