from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phid.loops import LOOK_EVERY, period

LEAST = 256


def pieces(text: str) -> list[bytes]:
    """Words, marks and single digits: about what a tokenizer makes of it."""
    return [piece.encode() for piece in re.findall(r"\s?[^\W\d]+|\d|\s|[^\w\s]", text)]


def fires_at(answer: list[bytes], least: int = LEAST) -> int | None:
    """After how many tokens it is seen, looked at as the engine does."""
    for count in range(LOOK_EVERY, len(answer) + 1, LOOK_EVERY):
        if period(answer[:count], least):
            return count
    return None


ROWS = range(300)
LEGITIMATE = {
    "laughter": "ha " * 100,
    "a rule": "-" * 200,
    "a table's head": "|" + "---|" * 40,
    "empty cells": "| | | | | |\n" * 16,
    "a matrix of zeros": "[" + ", ".join(["[" + ", ".join("0" * 10) + "]"] * 10) + "]",
    "numbered rows": "".join(f"| {n} | yes | no | 0.0 |\n" for n in ROWS),
    "JSON list": "".join(f'{{"id": {n}, "name": "lamp", "on": false}},\n' for n in ROWS),
    "counting": " ".join(str(n) for n in range(2000)),
    "squares": "".join(f"The square of {n} is {n * n}.\n" for n in ROWS),
    "a chorus": (" ".join(f"word{c}" for c in "abcdefghijklmnop") * 4 + "\n") * 7,
    "dates": "".join(f"2026-11-{n % 30 + 1:02} 12:00 ok\n" for n in ROWS),
    "a loop left": "and on " * 20 + "then it ended. " + "and on " * 20,
}


@pytest.mark.parametrize("text", LEGITIMATE.values(), ids=LEGITIMATE.keys())
def test_what_somebody_may_have_asked_for_goes_on(text: str) -> None:
    assert fires_at(pieces(text)) is None


LOOPS = {
    "one token": [b"the "],
    "two": [b"is ", b"it? "],
    "a sentence": pieces("I am sorry, but I cannot help you with that.\n"),
    "a token of no text": [b""],
    "a paragraph": [f"w{n} ".encode() for n in range(100)],
    "with twice the same inside": pieces("a b a c b c a a b"),
}


@pytest.mark.parametrize("cycle", LOOPS.values(), ids=LOOPS.keys())
def test_what_goes_on_for_ever_is_seen_soon(cycle: list[bytes]) -> None:
    start = pieces("Once upon a time there was a whale.")
    answer = start + cycle * (3000 // len(cycle))
    seen = fires_at(answer)
    assert seen is not None
    assert len(start) + LEAST <= seen <= len(start) + max(LEAST, 16 * len(cycle)) + LOOK_EVERY
    assert period(answer[:seen], LEAST) == len(cycle)


@given(
    start=st.lists(st.binary(max_size=2), max_size=40),
    cycle=st.lists(st.binary(max_size=2), min_size=1, max_size=24),
    least=st.integers(1, 200),
)
def test_every_loop_is_seen_and_the_cycle_is_the_shortest(
    start: list[bytes], cycle: list[bytes], least: int
) -> None:
    rounds = max(16, -(-least // len(cycle)))
    found = period(start + cycle * rounds, least)
    assert 0 < found <= len(cycle)
    tail = (cycle * rounds)[-max(least, 16 * found) :]
    assert tail[found:] == tail[:-found]


@given(answer=st.lists(st.sampled_from([b"a", b"b"]), max_size=300), least=st.integers(1, 64))
def test_a_single_exception_is_no_loop(answer: list[bytes], least: int) -> None:
    found = period(answer, least)
    if found:
        span = max(least, 16 * found)
        spoilt = [*answer[:-span], b"x", *answer[len(answer) - span + 1 :]]
        assert period(spoilt, span) == 0
