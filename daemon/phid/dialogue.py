"""phid chat: a conversation from the terminal, kept on the device."""

from __future__ import annotations

import argparse
import contextlib
import sys
import uuid
from collections.abc import Iterator
from typing import Any

from phid import amounts, exits, messages, requests
from phid.ask import Question, ask
from phid.client import Client, Unreachable
from phid.commands import CancelRequest
from phid.errors import Refused
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
        "stdout, and what was said before is kept on the device. Ctrl-C ends an answer; at the "
        "prompt it ends the conversation, as Ctrl-D does.",
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
    client = options.client or f"cli-{uuid.uuid4().hex[:8]}"
    session = options.session or f"chat-{uuid.uuid4().hex[:8]}"
    told = {"client": client, "session": session, "stream": "delta"}
    for name in ("system", "model", "max_tokens", "temperature"):
        if (value := getattr(options, name)) is not None:
            told[name] = value
    try:
        if options.session and not options.client:
            raise ValueError("--session wants --client: a conversation belongs to who has it")
        requests.checked(told | {"prompt": "-"})  # whatever is wrong with it is told at once
    except (Refused, ValueError) as error:
        print(f"phid chat: {error}", file=sys.stderr)
        return exits.USAGE
    try:
        return _talk(settings, told, options.timeout)
    finally:
        if not options.session:
            _forget(settings, client, session)


def _talk(settings: Settings, told: dict[str, Any], timeout_s: float) -> int:
    """Ask line by line: the exit status; for lines of a pipe, that of the first that failed."""
    typed = sys.stdin is not None and sys.stdin.isatty()
    failed = exits.OK
    try:
        for line in _typed() if typed else sys.stdin or ():
            if not line.strip():
                continue
            request = requests.checked(
                told | {"id": uuid.uuid4().hex, "prompt": line.removesuffix("\n")}
            )
            status = ask(settings, Question(request, timeout_s), sys.stdout, sys.stderr)
            if status == exits.NO_ANSWER or (status == exits.INTERRUPTED and not typed):
                return status
            failed = failed or status
    except (Refused, ValueError) as error:  # a line that is not UTF-8, or has a NUL in it
        print(f"phid chat: {error}", file=sys.stderr)
        return exits.USAGE
    return exits.OK if typed else failed


def _typed() -> Iterator[str]:
    with contextlib.suppress(ImportError):  # with it, lines can be edited
        import readline  # noqa: F401, PLC0415
    while True:
        try:
            yield input(_PROMPT)
        except (EOFError, KeyboardInterrupt):
            print()
            return


def _forget(settings: Settings, client: str, session: str) -> None:
    """Have the device forget it; a device out of reach forgets it in time by itself."""
    topics = settings.topics
    forget = messages.encode(CancelRequest(session=session))
    with (
        contextlib.suppress(Unreachable),
        Client(settings.mqtt, (topics.rx(client),), name=client) as line,
    ):
        line.connect(_GOODBYE_S)
        line.wait_for(line.publish(topics.cancel(client), forget), _GOODBYE_S)
