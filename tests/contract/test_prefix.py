"""What is computed already is not computed again, and changes no answer."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from contract.subjects import EngineProcess, genai
from contract.test_engine import finished
from phid.jobs import Cancel, Finished, Job, Prefilled, Ready, Sampling, Started, Turn
from phid.prefix import length

pytestmark = pytest.mark.model

RULES = Turn("system", "You are the keeper of a farm. " + "It has a lamp, a fan, a gate. " * 12)
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Write of the rain.",
    "Is the gate open?",
    "What is 2+2?",
)
Start = Callable[[], EngineProcess]


def ask(*turns: Turn | str, **how: object) -> Job:
    said = tuple(Turn("user", turn) if isinstance(turn, str) else turn for turn in turns)
    return Job("j", said, Sampling(**({"max_tokens": 24} | how)))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def cold(demo_folder: Path) -> Iterator[EngineProcess]:
    yield from engine(demo_folder, prefix_cache=False)


@pytest.fixture
def warm(demo_folder: Path) -> Iterator[EngineProcess]:
    yield from engine(demo_folder, prefix_cache=True)


def engine(folder: Path, *, prefix_cache: bool) -> Iterator[EngineProcess]:
    process = EngineProcess()
    try:
        load = replace(genai(folder).load, prefix_cache=prefix_cache)
        assert isinstance(process.load(load)[-1], Ready)
        yield process
    finally:
        process.close()


def test_the_same_instructions_are_computed_once(warm: EngineProcess) -> None:
    cached, slices = [], []
    for question in QUESTIONS:
        events = warm.ask(ask(RULES, question))
        end = finished(events)
        assert isinstance(events[0], Started)
        assert events[0].cached_tokens == end.usage.cached_tokens
        cached.append(end.usage.cached_tokens)
        slices.append(sum(isinstance(event, Prefilled) for event in events))
        assert end.usage.cached_tokens < end.usage.prompt_tokens
    assert cached == [0, *[128] * 4]  # whole slices
    assert slices[0] > max(slices[1:])


def test_without_it_every_prompt_is_computed(cold: EngineProcess) -> None:
    for question in QUESTIONS[:2]:
        assert finished(cold.ask(ask(RULES, question))).usage.cached_tokens == 0


def test_no_answer_hangs_on_what_was_asked_before(cold: EngineProcess, warm: EngineProcess) -> None:
    random = Random(5)
    told: list[Turn] = [RULES]
    reused = 0
    for number in range(24):
        match random.choice((0, 0, 1, 2, 2, 3, 4)):
            case 0:  # a conversation goes on
                told.append(Turn("user", random.choice(QUESTIONS)))
                job = ask(*told)
            case 1:  # another begins
                told = [RULES] if random.random() < 0.5 else []
                told.append(Turn("user", random.choice(QUESTIONS)))
                job = ask(*told, max_tokens=random.choice((4, 24, 90)))
            case 2:  # the same again
                job = ask(*(told if told[-1].role == "user" else [*told, Turn("user", "Why?")]))
            case 3:  # drawn, so that it can be told from one that is not
                job = ask(RULES, random.choice(QUESTIONS), temperature=1.0, seed=number)
            case _:
                job = ask(f"{number} is a number. " * random.randrange(1, 30))
        expected, end = finished(cold.ask(job)), finished(warm.ask(job))
        assert (end.text, end.finish) == (expected.text, expected.finish), number
        assert end.usage.output_tokens == expected.usage.output_tokens
        assert end.usage.prompt_tokens == expected.usage.prompt_tokens
        reused += end.usage.cached_tokens > 0
        if told and told[-1].role == "user":
            told.append(Turn("assistant", end.text or "Yes."))
    assert reused >= 5


def test_a_conversation_computes_what_is_new(warm: EngineProcess) -> None:
    turns: list[Turn] = [RULES]
    hits = 0
    for question in QUESTIONS * 2:
        turns.append(Turn("user", question))
        end = finished(warm.ask(ask(*turns)))
        turns.append(Turn("assistant", end.text))
        hits += end.usage.cached_tokens > 0
    # The first is new, and the second finds a cache too short; that is made longer then.
    assert hits >= 8


def test_a_prompt_that_was_cut_off_is_gone_on_with(warm: EngineProcess) -> None:
    long = ask(RULES, "The sea was calm that day. " * 60)
    warm.send(long)
    while not isinstance(warm.receive(), Prefilled):
        pass
    warm.send(Cancel("j"))
    cut = warm.until(Finished)[-1]
    assert isinstance(cut, Finished)
    again = finished(warm.ask(long))
    assert again.usage.cached_tokens >= 64
    assert again.usage.cached_tokens % 64 == 0


def test_other_ways_of_choosing_tokens_begin_anew(warm: EngineProcess) -> None:
    warm.ask(ask(RULES, "Why?"))
    drawn = ask(RULES, "Why?", temperature=0.9, seed=3)
    first, second = (finished(warm.ask(drawn)) for _ in range(2))
    assert first.usage.cached_tokens == second.usage.cached_tokens == 0
    assert first.text == second.text  # a seed is a promise
    unseeded = ask(RULES, "Why?", temperature=0.9)
    assert [finished(warm.ask(unseeded)).usage.cached_tokens for _ in range(2)] == [0, 128]


def test_a_schema_begins_anew_each_time(cold: EngineProcess, warm: EngineProcess) -> None:
    city, number = (
        json.dumps({"type": "object", "properties": {name: kind}, "required": [name]})
        for name, kind in (("city", {"type": "string", "maxLength": 12}), ("n", {"enum": [1, 2]}))
    )
    cached = []
    for schema, most in ((city, 40), (city, 3), (city, 40), (number, 40), (number, 40), (None, 9)):
        job = ask(RULES, QUESTIONS[len(cached) % 5], schema=schema, max_tokens=most)
        end = finished(warm.ask(job))
        assert end.text == finished(cold.ask(job)).text
        assert most < 40 or set(json.loads(end.text)) & {"city", "n"}
        cached.append(end.usage.cached_tokens)
    assert cached == [0, 128, 128, 0, 128, 0]


def test_what_is_kept_makes_room_for_what_is_asked(warm: EngineProcess) -> None:
    """One cache at a time: what differs does not find the memory of the last taken."""
    held = []
    for number in range(8):
        finished(warm.ask(ask(f"{number} " * 400, max_tokens=600, stop=("e", "0", " "))))
        status = Path(f"/proc/{warm.child.pid}/status").read_text()
        held.append(int(status.partition("VmRSS:")[2].split()[0]) / 1024)
    assert max(held[3:]) - statistics.median(held[3:]) < 30


@pytest.mark.parametrize(
    ("needed", "most", "grows", "made"),
    [(1, 4096, False, 64), (64, 4096, False, 64), (65, 4096, False, 128), (300, 4096, True, 1344),
     (1500, 4096, True, 3008),     (4090, 4096, False, 4096), (4000, 4096, True, 4096)],
)  # fmt: skip
def test_a_cache_is_made_a_little_longer(needed: int, most: int, grows: bool, made: int) -> None:
    assert length(needed, most, grows=grows) == made
