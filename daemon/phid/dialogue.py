"""phid chat: a conversation from the terminal, kept on the device."""

from __future__ import annotations

import argparse
import contextlib
import sys
import uuid
from collections.abc import Iterator
from typing import TextIO

from pydantic import ValidationError

from phid import amounts, exits, messages
from phid.ask import Question, ask
from phid.client import Client, Unreachable
from phid.decoding import refusal
from phid.requests import CancelRequest, Request
from phid.settings import Settings

_PROMPT = "> "
_GOODBYE_S = 2.0


def add_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    parents: list[argparse.ArgumentParser],
) -> None:
    """Give the command line `phid chat`."""
    chats = commands.add_parser(
        "chat",
        parents=parents,
        help="talk with a device, line by line",
        description="Talk with a device: each line of stdin is a question, the answer goes to "
        "stdout, and what was said before is kept on the device. Ctrl-C ends an answer, "
        "Ctrl-D the conversation.",
    )
    chats.add_argument("--system", help="the system turn")
    chats.add_argument("--model", metavar="NAME", help="one of out/info's models")
    chats.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of an answer")
    chats.add_argument("--temperature", type=float, metavar="T", help="0 (default) is greedy")
    chats.add_argument("--client", metavar="NAME", help="our level in the topics (default: random)")
    chats.add_argument(
        "--session",
        metavar="NAME",
        help="go on with this one of --client's, and keep it (default: a new one, which is "
        "forgotten at the end)",
    )
    chats.add_argument(
        "--timeout", type=amounts.time_s, default=120.0, metavar="S", help="of one answer"
    )
    chats.set_defaults(command=_run)


def _run(settings: Settings, options: argparse.Namespace) -> int:
    if options.session and not options.client:
        print("phid chat: --session wants --client: it belongs to who has it", file=sys.stderr)
        return exits.USAGE
    client = options.client or f"cli-{uuid.uuid4().hex[:8]}"
    session = options.session or f"chat-{uuid.uuid4().hex[:8]}"
    told = {"client": client, "session": session, "stream": "delta"}
    for name in ("system", "model", "max_tokens", "temperature"):
        if (value := getattr(options, name)) is not None:
            told[name] = value
    status = exits.OK
    try:
        for line in _lines(sys.stdin):
            try:
                request = Request.model_validate(told | {"id": uuid.uuid4().hex, "prompt": line})
            except ValidationError as error:
                says = refusal(Request, error).failure.message
                print(f"phid chat: {says}", file=sys.stderr)
                return exits.USAGE
            status = ask(settings, Question(request, options.timeout), sys.stdout, sys.stderr)
            if status == exits.NO_ANSWER or (status == exits.INTERRUPTED and not _is_typed()):
                return status
    finally:
        if not options.session:
            _forget(settings, client, session)
    return exits.OK if _is_typed() else status


def _is_typed() -> bool:
    return sys.stdin.isatty()


def _lines(source: TextIO) -> Iterator[str]:
    """What is asked: a line each, without those that are blank."""
    if not _is_typed():
        yield from (line.rstrip("\n") for line in source if line.strip())
        return
    with contextlib.suppress(ImportError):  # lines can be edited where it is there
        import readline  # noqa: F401, PLC0415
    while True:
        try:
            line = input(_PROMPT)
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line.strip():
            yield line


def _forget(settings: Settings, client: str, session: str) -> None:
    """Leave nothing of it on the device; if that cannot be told, its time will come."""
    topics = settings.topics
    forget = messages.encode(CancelRequest(session=session))
    with (
        contextlib.suppress(Unreachable),
        Client(settings.mqtt, (topics.rx(client),), name=client) as line,
    ):
        line.connect(_GOODBYE_S)
        line.wait_for(line.publish(topics.cancel(client), forget), _GOODBYE_S)
