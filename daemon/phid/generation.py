"""How a job is decoded, whatever the runtime: slices, tokens, stop strings, cancel, deadline."""

from __future__ import annotations

import codecs
import json
import math
import re
import time
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from phid import loops
from phid.errors import Code, Refused
from phid.jobs import (
    EngineFacts,
    Failed,
    Finish,
    Finished,
    Job,
    Prefilled,
    RunEvent,
    Started,
    Tokens,
    Turn,
    Usage,
)
from phid.stops import StopFilter

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

# What ONNX Runtime says, GenAI for a job's cache, and CUDA.
_NO_MEMORY = re.compile(
    r"Failed to allocate memory|Could not allocate the key-value cache|out of memory", re.IGNORECASE
)


# A conversation leaves a quarter of the context to the answer, if that may be so long.
_ANSWERS_SHARE = 4


class Stream(Protocol):
    """One job inside a runtime: its prompt is encoded and fits, nothing has been computed."""

    @property
    def prompt_tokens(self) -> int:
        """How long the prompt is, images and all."""

    @property
    def image_tokens(self) -> int:
        """How many of the prompt's tokens are images."""

    @property
    def cached_tokens(self) -> int:
        """How many of the prompt's tokens are in the cache already, from the job before."""

    @property
    def crops(self) -> int:
        """How many crops the images were cut into altogether."""

    @property
    def room(self) -> int:
        """How many tokens the context leaves for the answer."""

    def prefill(self) -> Iterator[int]:
        """Compute the prompt slice by slice: the tokens in the cache after each."""

    def step(self) -> bytes | None:
        """Generate one token: the bytes it adds (they may end inside a character), None at EOS."""

    def close(self) -> None:
        """Release what the job holds."""


class Runtime(Protocol):
    """A loaded model that takes one job at a time."""

    @property
    def facts(self) -> EngineFacts:
        """What Ready says."""

    def open(self, job: Job) -> Stream:
        """Encode the job's prompt; raises Refused where it cannot be taken."""

    def close(self) -> None:
        """Release the model."""


def generate(
    job: Job,
    runtime: Runtime,
    *,
    received_s: float,
    cancelled: Callable[[], bool],
    clock: Callable[[], float] = time.monotonic,
    loop_tokens: int = 0,
) -> Generator[RunEvent]:
    """Run the job: its events, the last of them Finished or Failed.

    `cancelled` and the deadline (the job's budget from `received_s` on) are looked at after each
    event. The joined text of the Tokens events is the text of Finished, always: what was held back
    for a stop string that did not come is sent with the last token, or by itself (`count` 0) where
    no more token was generated. Bytes at the end that make no whole character are dropped; inside
    the text they become U+FFFD. An answer whose last `loop_tokens` (0: never) only repeat
    themselves ends there.
    """
    if cancelled():
        yield Failed(job.id, Code.CANCELLED, "cancelled before it started")
        return
    deadline_s = math.inf if job.budget_s is None else received_s + job.budget_s
    if clock() >= deadline_s:
        yield Failed(job.id, Code.EXPIRED, "its deadline passed before it started")
        return
    run = _Run(job, received_s, deadline_s, cancelled, clock, loop_tokens)
    try:
        stream, history = _open(job, runtime)
        with closing(stream):
            yield from run.events(stream, history)
    except Refused as refused:
        failure = refused.failure
        yield Failed(job.id, failure.code, failure.message, failure.field, run.text)
    except Exception as error:  # noqa: BLE001 - whatever a native runtime raises, the engine lives on
        code, message = describe(error, quote=run.quotable)
        yield Failed(job.id, code, message, text=run.text)


def _open(job: Job, runtime: Runtime) -> tuple[Stream, int]:
    """Open the job with its history: the stream, and how many turns of that are in the prompt.

    A history that leaves no room for the answer, or that the runtime does not take, is halved until
    it fits: the turns that follow find the rest in the cache. Raises Refused where the job alone is
    refused.
    """
    history = job.history or ()
    # Else a job that asks for the whole context would have no history at all.
    room = min(job.sampling.max_tokens, runtime.facts.context // _ANSWERS_SHARE)
    while True:
        turns = _conversation(history, job.turns)
        try:
            # With a history the runtime may take only a shorter prompt.
            given = None if job.history is None else history
            stream = runtime.open(replace(job, turns=turns, history=given))
        except Refused:
            if not history:
                raise
        else:
            if not history or stream.room >= room:
                return stream, len(history)
            stream.close()
        history = _later_half(history)


def _conversation(history: tuple[Turn, ...], turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    first = int(turns[0].role == "system")
    return *turns[:first], *history, *turns[first:]


def _later_half(history: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The newest half of the turns or less; it begins with a user's."""
    for at in range((len(history) + 1) // 2, len(history)):
        if history[at].role == "user":
            return history[at:]
    return ()


def coalesce(
    events: Iterable[RunEvent],
    interval_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[RunEvent]:
    """Pass the events on, with Tokens joined so that they come at least `interval_s` apart.

    The first is not held, and any other event releases what is held. A message for each token would
    take the CPU from the threads that compute the next one.
    """
    held: list[Tokens] = []
    told_s = -math.inf
    for event in events:
        if isinstance(event, Tokens):
            held.append(event)
            if clock() - told_s < interval_s:
                continue
            told_s = clock()
        if held:
            text = "".join(tokens.text for tokens in held)
            yield Tokens(held[0].job_id, text, sum(tokens.count for tokens in held))
            held.clear()
        if not isinstance(event, Tokens):
            yield event


def describe(error: Exception, *, quote: bool) -> tuple[Code, str]:
    """Put a runtime's exception into a code and one line, in its own words if `quote`."""
    words = str(error).strip().partition("\n")[0][:300]
    # Where an allocation of ONNX Runtime's own fails, only the words tell.
    if isinstance(error, MemoryError) or _NO_MEMORY.search(words):
        return Code.NO_MEMORY, "there is not enough memory for it"
    name = type(error).__name__
    return Code.INTERNAL, f"{name}: {words}" if quote and words else name


class _Run:
    """One job under way: its clock, its text so far."""

    def __init__(
        self,
        job: Job,
        received_s: float,
        deadline_s: float,
        cancelled: Callable[[], bool],
        clock: Callable[[], float],
        loop_tokens: int,
    ) -> None:
        self._job = job
        self._received_s = received_s
        self._deadline_s = deadline_s
        self._cancelled = cancelled
        self._clock = clock
        self._loop_tokens = loop_tokens
        self._pieces: list[bytes] = []
        self._shown: list[str] = []
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = StopFilter(job.sampling.stop)
        # Until the prompt is encoded an exception may quote it.
        self.quotable = False

    @property
    def text(self) -> str:
        return "".join(self._shown)

    def events(self, stream: Stream, history: int) -> Iterator[RunEvent]:
        self.quotable = True
        began_s = self._clock()
        yield Started(
            self._job.id,
            stream.prompt_tokens,
            stream.image_tokens,
            stream.cached_tokens,
            history,
        )
        finish = yield from self._prefill(stream)
        prefilled_s = first_s = self._clock()
        limit = min(self._job.sampling.max_tokens, stream.room)
        count = 0
        ended = looped = False
        while finish is None and count < limit and (finish := self._interrupted()) is None:
            piece = stream.step()
            if not count:
                first_s = self._clock()
            if piece is None:
                ended, finish = True, Finish.STOP
                break
            count += 1
            text, matched = self._stops.feed(self._characters.decode(piece))
            if matched:
                finish = Finish.STOP
            elif count == limit:
                text += self._stops.flush()
                finish = Finish.LENGTH
            elif self._loops(piece):
                looped, finish = True, Finish.LENGTH
            yield self._show(text, 1)
        if held := self._stops.flush():
            yield self._show(held, 0)
        if ended and self._job.sampling.schema and not _is_json(self.text):
            raise _no_json(self.text)
        yield Finished(
            self._job.id,
            finish or Finish.LENGTH,
            self.text,
            Usage(
                prompt_tokens=stream.prompt_tokens,
                image_tokens=stream.image_tokens,
                cached_tokens=stream.cached_tokens,
                output_tokens=count,
                crops=stream.crops,
            ),
            prefill_ms=(prefilled_s - began_s) * 1e3,
            ttft_ms=(first_s - self._received_s) * 1e3 if count else 0.0,
            decode_ms=(self._clock() - prefilled_s) * 1e3,
            looped=looped,
        )

    def _prefill(self, stream: Stream) -> Generator[RunEvent, None, Finish | None]:
        if (finish := self._interrupted()) is not None:
            return finish
        for tokens in stream.prefill():
            # The first token tells of the last slice, for it is at hand: a service just woken for
            # this event would wait longest for a processor when the token comes.
            if tokens < stream.prompt_tokens:
                yield Prefilled(self._job.id, tokens)
            if (finish := self._interrupted()) is not None:
                return finish
        return None

    def _loops(self, piece: bytes) -> bool:
        if not self._loop_tokens:
            return False
        self._pieces.append(piece)
        return not len(self._pieces) % loops.LOOK_EVERY and (
            loops.period(self._pieces, self._loop_tokens) > 0
        )

    def _show(self, text: str, count: int) -> Tokens:
        self._shown.append(text)
        return Tokens(self._job.id, text, count)

    def _interrupted(self) -> Finish | None:
        if self._cancelled():
            return Finish.CANCELLED
        if self._clock() >= self._deadline_s:
            return Finish.DEADLINE
        return None


def _no_json(text: str) -> Refused:
    if not text:
        says = "response_format: the schema cannot be held to: a $ref leads to itself"
        return Refused(Code.BAD_REQUEST, says, field="response_format")
    # A build of the runtime without constrained decoding only logs that it has none.
    return Refused(Code.INTERNAL, "the runtime did not hold the answer to its schema")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    except RecursionError:
        pass  # too deep for us, and sound so far
    return True
