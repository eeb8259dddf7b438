"""Engines in child processes, and the runtimes that one suite is run over."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phid import channel
from phid.jobs import (
    Command,
    Event,
    Failed,
    Finished,
    Job,
    Load,
    LoadFailed,
    Prefilled,
    Ready,
    Sampling,
    Tokens,
    Turn,
)
from wire import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE_S = 30 * PATIENCE
DEMO = "smollm2-135m-instruct"
# The suite runs where it is told to: scripts/prove-providers has it run on a GPU.
PROVIDER = os.environ.get("PHID_TEST_PROVIDER", "cpu")


class EngineProcess:
    """An engine in a child process, seen from the service's side of its channel."""

    def __init__(self) -> None:
        self.child, self.connection = channel.spawn(channel.ENGINE)

    def send(self, *commands: Command) -> None:
        for command in commands:
            self.connection.send(command)

    def receive(self, within_s: float = PATIENCE_S) -> Event:
        """The next event; raises EOFError when the engine is gone."""
        if not self.connection.poll(within_s):
            raise TimeoutError(f"no event within {within_s} s")
        try:
            event: Event = self.connection.recv()
        except ConnectionResetError as error:
            raise EOFError from error
        return event

    def load(self, load: Load) -> list[Event]:
        self.send(load)
        return self.until(Ready, LoadFailed)

    def until(self, *last: type) -> list[Event]:
        events = [self.receive()]
        while not isinstance(events[-1], last):
            events.append(self.receive())
        return events

    def ask(self, job: Job) -> list[Event]:
        self.send(job)
        return self.until(Finished, Failed)

    def wait(self, within_s: float = 10 * PATIENCE) -> int:
        return self.child.wait(within_s)

    def rest(self) -> list[Event]:
        """What still comes until the engine is gone."""
        events: list[Event] = []
        try:
            while True:
                events.append(self.receive())
        except EOFError:
            return events

    def said(self) -> str:
        """What it wrote to stderr; waits for its end."""
        assert self.child.stderr is not None
        return self.child.stderr.read().decode()

    def close(self) -> None:
        """End it whatever it does."""
        self.connection.close()
        self.child.kill()
        with self.child:
            pass


@dataclass(frozen=True)
class Subject:
    """A runtime under test, and how to bring it into each situation."""

    load: Load
    talk: Callable[[int], str]
    """A user turn answered with at least so many tokens, slowly enough to be interrupted."""
    read: Callable[[int], str]
    """A user turn of at least so many tokens, slow enough to be interrupted in the prefill."""
    emoji: tuple[Turn, ...]
    """A conversation answered with characters of several bytes, cut between tokens."""
    says: str
    """A character that answer must contain."""

    def job(
        self,
        said: str | tuple[Turn, ...],
        job_id: str = "job",
        budget_s: float | None = None,
        **how: object,
    ) -> Job:
        """A job of one user turn, or of these turns."""
        turns = (Turn("user", said),) if isinstance(said, str) else said
        sampling = Sampling(**({"max_tokens": 64} | how))  # type: ignore[arg-type]
        return Job(job_id, turns, sampling, budget_s)


def script(**directive: object) -> str:
    return "@script " + json.dumps(directive)


def scripted() -> Subject:
    return Subject(
        load=Load("scripted", "scripted", ""),
        talk=lambda tokens: script(tokens=tokens, token_ms=4),
        read=lambda tokens: script(tokens=3, prompt_tokens=tokens, prefill_ms=tokens),
        emoji=(Turn("user", script(tokens=["Hi 👩‍🚀", " 日本", "é😀"], bytes_split=True)),),
        says="😀",
    )


def genai(folder: Path) -> Subject:
    return Subject(
        load=Load("genai", DEMO, str(folder), prefill_slice=64, provider=PROVIDER),
        talk=lambda _: "Tell me a very long story about a lighthouse keeper and his dog.",
        read=lambda tokens: "The sea was calm that day. " * (tokens // 7 + 1),
        emoji=(*(Turn("user", "😀😀😀"), Turn("assistant", "😀😀😀")) * 2, Turn("user", "😀😀😀")),
        says="😀",
    )


def texts(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Tokens)]


def slices(events: list[Event]) -> list[int]:
    return [event.tokens for event in events if isinstance(event, Prefilled)]


def gone(pid: int, within_s: float) -> bool:
    """Whether the process (not a child of ours) ends in time; a zombie has ended."""
    end_s = time.monotonic() + within_s
    while time.monotonic() < end_s:
        try:
            state = (
                Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
            )
        except (FileNotFoundError, ProcessLookupError):  # it may go while it is read
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False
