from __future__ import annotations

import json
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phid.errors import Code
from phid.generation import Runtime, coalesce, describe, generate
from phid.jobs import (
    Failed,
    Finish,
    Finished,
    Job,
    Load,
    Prefilled,
    RunEvent,
    Sampling,
    Started,
    Tokens,
    Turn,
)
from phid.scripted import ScriptedRuntime, ScriptedStream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RUNTIME = ScriptedRuntime(Load("scripted", "m", "", prefill_slice=4), load_ms=0)


def job(budget_s: float | None = None, sampling: Sampling | None = None, **script: object) -> Job:
    turn = Turn("user", "@script " + json.dumps(script))
    return Job("j", (turn,), sampling or Sampling(), budget_s)


def run(
    asked: Job,
    runtime: Runtime = RUNTIME,
    *,
    cancel_after: int | None = None,
    clock: Callable[[], float] = lambda: 0.0,
    loop_tokens: int = 0,
) -> list[RunEvent]:
    """All events; the cancel comes while that many have been seen."""
    events: list[RunEvent] = []
    for event in generate(
        asked,
        runtime,
        received_s=0.0,
        cancelled=lambda: len(events) == cancel_after,
        clock=clock,
        loop_tokens=loop_tokens,
    ):
        events.append(event)  # noqa: PERF402 - the cancel looks at it meanwhile
    return events


def finished(events: list[RunEvent]) -> Finished:
    end = events[-1]
    assert isinstance(end, Finished), end
    assert end.text == "".join(texts(events))
    return end


def texts(events: list[RunEvent]) -> list[str]:
    return [event.text for event in events if isinstance(event, Tokens)]


def test_the_events_of_a_job() -> None:
    assert [type(e) for e in run(job(tokens=["He", "llo"], prompt_tokens=10))] == [
        *(Started, Prefilled, Prefilled),
        *(Tokens, Tokens, Finished),
    ]


def test_an_answer_that_ends_by_itself_is_stop_and_one_cut_is_length() -> None:
    assert finished(run(job(tokens=3))).finish is Finish.STOP
    for limit in (0, 1, 3):
        end = finished(run(job(tokens=3, sampling=Sampling(max_tokens=limit))))
        assert (end.finish, end.usage.output_tokens) == (Finish.LENGTH, limit)


def test_an_answer_that_only_repeats_itself_is_cut_and_said_to_be() -> None:
    tokens = ["It ", "was ", *(["a ", "whale ", "and "] * 200)]
    sampling = Sampling(max_tokens=900)
    end = finished(run(job(tokens=tokens, sampling=sampling), loop_tokens=64))
    assert (end.finish, end.looped, end.usage.output_tokens) == (Finish.LENGTH, True, 96)
    assert end.text == "".join(tokens[:96])
    whole = finished(run(job(tokens=tokens, sampling=sampling)))
    assert (whole.finish, whole.looped, whole.usage.output_tokens) == (Finish.STOP, False, 602)


def test_a_loop_cut_shows_what_was_held_back_for_a_stop_string() -> None:
    sampling = Sampling(max_tokens=900, stop=("round and on",))
    end = finished(run(job(tokens=["round "] * 500, sampling=sampling), loop_tokens=64))
    assert (end.looped, end.text) == (True, "round " * 64)


def test_an_empty_answer_is_an_answer() -> None:
    end = finished(run(job(tokens=[])))
    assert (end.finish, end.text, end.ttft_ms) == (Finish.STOP, "", 0.0)


def test_text_held_back_is_shown_when_the_answer_ends() -> None:
    stop = Sampling(stop=("<end>",))
    assert texts(run(job(tokens=["a", "<e"], sampling=stop))) == ["a", "", "<e"]
    stop = Sampling(stop=("<end>",), max_tokens=2)
    assert texts(run(job(tokens=["a", "<e"], sampling=stop))) == ["a", "<e"]


def test_a_cancel_before_the_start_is_a_failure() -> None:
    (event,) = run(job(tokens=3), cancel_after=0)
    assert isinstance(event, Failed)
    assert event.code is Code.CANCELLED


def test_a_budget_used_up_before_the_start_is_expired() -> None:
    (event,) = run(job(budget_s=1.0, tokens=3), clock=lambda: 1.0)
    assert isinstance(event, Failed)
    assert event.code is Code.EXPIRED


@pytest.mark.parametrize(
    ("after", "kinds"),
    [
        (1, [Started]),
        (2, [Started, Prefilled]),
        (3, [Started, Prefilled, Tokens]),
        (5, [Started, Prefilled, Tokens, Tokens, Tokens]),
    ],
)
def test_a_cancel_is_seen_after_each_event(after: int, kinds: list[type]) -> None:
    events = run(job(tokens=9, prompt_tokens=8), cancel_after=after)
    assert [type(e) for e in events] == [*kinds, Finished]
    assert finished(events).finish is Finish.CANCELLED


def test_the_deadline_counts_from_the_hand_over() -> None:
    ticks = count(0, 0.5)
    end = finished(run(job(budget_s=10.0, tokens=100), clock=lambda: next(ticks)))
    assert end.finish is Finish.DEADLINE
    assert 0 < end.usage.output_tokens < 20
    assert end.text


def test_the_times_are_the_clocks() -> None:
    ticks = count(1.0)
    end = finished(run(job(tokens=1, prompt_tokens=1), clock=lambda: next(ticks)))
    assert end.prefill_ms > 0
    assert end.ttft_ms > end.prefill_ms
    assert end.decode_ms > 0


def test_what_fails_midway_keeps_its_text() -> None:
    events = run(job(tokens=5, fail_at=3))
    end = events[-1]
    assert isinstance(end, Failed)
    assert (end.code, end.text) == (Code.INTERNAL, "t1 t2 ")
    assert end.message == "RuntimeError: the script says that this step fails"


class Loose(ScriptedRuntime):
    """Says what its script says, whatever the schema."""

    def open(self, job: Job) -> ScriptedStream:
        return super().open(replace(job, sampling=replace(job.sampling, schema=None)))


def test_an_answer_that_is_not_held_to_its_schema_is_no_answer() -> None:
    loose = Loose(Load("scripted", "m", ""), load_ms=0)
    held = Sampling(max_tokens=3, schema='{"type":"object"}')
    assert finished(run(job(tokens=['{"a":', " 1}"], sampling=held), loose)).text == '{"a": 1}'
    end = run(job(tokens=["{", "oops"], sampling=held), loose)[-1]
    assert isinstance(end, Failed)
    assert (end.code, end.text) == (Code.INTERNAL, "{oops")
    end = run(job(tokens=0, sampling=held), loose)[-1]
    assert isinstance(end, Failed)
    assert (end.code, end.field) == (Code.BAD_REQUEST, "response_format")
    # Cut, it says so.
    assert finished(run(job(tokens=9, sampling=held), loose)).finish is Finish.LENGTH
    deep = finished(run(job(tokens=["[" * 5000, "]" * 5000], sampling=held), loose))
    assert deep.finish is Finish.STOP


def test_tokens_between_two_messages_are_joined() -> None:
    events = run(job(tokens=9, prompt_tokens=1))
    times = iter([0.0, 0.0, 0.1, 0.2, 0.3, 0.3, 0.4, 0.5, 0.6, 0.6, 0.7, 0.8])
    told = list(coalesce(events, 0.25, lambda: next(times)))
    counts = [event.count for event in told if isinstance(event, Tokens)]
    assert counts == [1, 3, 3, 2]
    assert "".join(texts(told)) == finished(told).text
    others = [event for event in events if not isinstance(event, Tokens)]
    assert [event for event in told if not isinstance(event, Tokens)] == others
    assert isinstance(told[-1], Finished)


def test_without_an_interval_each_token_is_told() -> None:
    events = run(job(tokens=9))
    assert list(coalesce(events, 0.0, lambda: 0.0)) == events


class Bytes:
    """A runtime whose answer is these bytes, one token each."""

    facts = RUNTIME.facts
    prompt_tokens = 1
    image_tokens = cached_tokens = 0
    crops = 0
    room = 100

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = iter(pieces)

    def open(self, _: Job) -> Bytes:
        return self

    def prefill(self) -> Iterator[int]:
        yield 1

    def step(self) -> bytes | None:
        return next(self._pieces, None)

    def close(self) -> None:
        pass


class Quoting(Bytes):
    """A runtime whose exception quotes the prompt."""

    def open(self, job: Job) -> Bytes:
        raise TypeError(f"encode(): incompatible arguments. Invoked with: {job.turns!r}")


def test_bytes_that_are_no_character_are_marked_and_what_follows_is_kept() -> None:
    pieces = (b"a\xf0\x9f", b"z", b"\xe6\x97", b"\xa5", b" ok\xff", b"!")
    assert finished(run(job(), Bytes(*pieces))).text == "a\ufffdz日 ok\ufffd!"


def test_a_character_cut_off_at_the_end_is_dropped() -> None:
    assert finished(run(job(), Bytes(b"a", b"\xf0\x9f\x98"))).text == "a"


def test_no_failure_quotes_the_prompt() -> None:
    (event,) = run(job(tokens=["secret"]), Quoting())
    assert isinstance(event, Failed)
    assert event.message == "TypeError"


@pytest.mark.parametrize(
    "words",
    [
        "[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 9",
        # On a card with little left.
        "Could not allocate the key-value cache buffer of shape: [batch_size (1), ...",
        "CUDA failure 2: out of memory ; GPU=0",
    ],
)
def test_an_allocation_that_failed_is_no_memory(words: str) -> None:
    assert describe(MemoryError(), quote=True)[0] is Code.NO_MEMORY
    assert describe(RuntimeError(words), quote=False)[0] is Code.NO_MEMORY


def test_what_a_runtime_says_is_its_first_line() -> None:
    assert describe(RuntimeError("two\nlines"), quote=True) == (
        Code.INTERNAL,
        "RuntimeError: two",
    )


@given(
    tokens=st.lists(st.text(alphabet="abé😀\n", min_size=1, max_size=4), max_size=12),
    stops=st.lists(st.text(alphabet="abé😀", min_size=1, max_size=3), max_size=2),
    max_tokens=st.integers(0, 15),
    cancel_after=st.none() | st.integers(1, 20),
    bytes_split=st.booleans(),
)
def test_tokens_joined_are_the_text_however_it_ends(
    *,
    tokens: list[str],
    stops: list[str],
    max_tokens: int,
    cancel_after: int | None,
    bytes_split: bool,
) -> None:
    sampling = Sampling(max_tokens=max_tokens, stop=tuple(stops))
    events = run(
        job(tokens=tokens, bytes_split=bytes_split, sampling=sampling), cancel_after=cancel_after
    )
    end = finished(events)
    whole = "".join(tokens)
    assert whole.startswith(end.text)
    assert not [stop for stop in stops if stop in end.text]
    assert end.usage.output_tokens <= max_tokens
    assert sum(isinstance(event, Finished | Failed) for event in events) == 1
    if end.finish is Finish.STOP:
        assert end.text == whole or any(whole.startswith(end.text + stop) for stop in stops)
