from __future__ import annotations

import pytest

from phid.errors import Code
from phid.jobs import (
    EngineFacts,
    Event,
    Failed,
    Finish,
    Finished,
    LoadFailed,
    Loading,
    Prefilled,
    Ready,
    Started,
    Tokens,
    Unchanged,
    Usage,
)
from phid.patience import Patience

FACTS = EngineFacts("m", "text", "r", "1", "cpu", 1, 1, 1, 1)
FINISHED = Finished("j", Finish.STOP, "", Usage(), 0, 0, 0)


def answered(patience: Patience, now: float, prefill_s: float, gap_s: float) -> float:
    """One job of 100 tokens in two slices, and six tokens: when it ended."""
    patience.handed(now)
    patience.heard(Started("j", 100), now)
    patience.heard(Prefilled("j", 50), now := now + prefill_s / 2)
    patience.heard(Tokens("j", "x"), now := now + prefill_s / 2)
    for _ in range(5):
        patience.heard(Tokens("j", "x"), now := now + gap_s)
    patience.heard(FINISHED, now)
    return now


def limit_s(patience: Patience, now: float) -> float:
    """How long it may be silent from now on."""
    due = patience._since + patience._limit_s
    assert patience.silence_s(due - 0.001) is None
    assert patience.silence_s(due + 0.001) is not None
    return due - now


def test_nobody_waits_for_an_idle_engine() -> None:
    patience = Patience(10)
    assert patience.silence_s(1e9) is None
    ends: list[Event] = [
        *(Ready(FACTS), LoadFailed(Code.INTERNAL, ""), FINISHED),
        *(Failed("j", Code.INTERNAL, ""), Unchanged("j", 0.0)),
    ]
    for end in ends:
        patience.loading(0.0)
        patience.heard(end, 1.0)
        assert patience.silence_s(1e9) is None
    patience.loading(0.0)
    patience.ended()
    assert patience.silence_s(1e9) is None


def test_loading_counts_from_the_last_progress() -> None:
    patience = Patience(10)
    patience.loading(100.0)
    assert limit_s(patience, 100.0) == 600
    patience.heard(Loading("half", 0.5), 650.0)
    assert limit_s(patience, 650.0) == 600


def test_before_there_is_anything_to_go_by_it_waits_long() -> None:
    patience = Patience(10)
    patience.handed(0.0)
    assert limit_s(patience, 0.0) == 60
    patience.heard(Started("j", 100), 1.0)
    assert limit_s(patience, 1.0) == 600
    patience.heard(Tokens("j", "x"), 2.0)
    assert limit_s(patience, 2.0) == 30


def test_a_prefill_may_take_ten_times_what_it_took() -> None:
    patience = Patience(10)
    now = answered(patience, 0.0, prefill_s=20.0, gap_s=1.0)
    patience.handed(now)
    patience.heard(Started("j", 1000), now)
    assert limit_s(patience, now) == pytest.approx(10 * 200)
    patience.heard(Prefilled("j", 990), now + 100)
    assert limit_s(patience, now + 100) == 30, "no less than the floor"


def test_a_token_may_take_twenty_times_the_median() -> None:
    patience = Patience(10)
    patience.heard(Started("j", 1), 0.0)
    patience.heard(Tokens("j", "x"), 0.0)
    for n in range(1, 6):
        patience.heard(Tokens("j", "x"), n * 2.0)
    assert limit_s(patience, 10.0) == 40
    for n in range(40):
        patience.heard(Tokens("j", "x"), 10 + n * 0.01)
    assert limit_s(patience, 10.39) == pytest.approx(10)


def test_one_that_is_to_gather_its_tokens_for_long_may_be_silent_for_so_long() -> None:
    patience = Patience(3)
    now = answered(patience, 0.0, prefill_s=1.0, gap_s=0.1)
    patience.handed(now, gather_s=10.0)
    patience.heard(Started("j", 1), now)
    patience.heard(Tokens("j", "x"), now)
    assert limit_s(patience, now) == 3 * 2 * 10
    patience.heard(Tokens("j", "x"), now + 10)
    assert limit_s(patience, now + 10) == 2 * 10
    patience.heard(FINISHED, now + 10)
    patience.handed(now, gather_s=0.1)
    patience.heard(Started("j", 1), now)
    patience.heard(Tokens("j", "x"), now)
    assert limit_s(patience, now) == 9, "it is of that job alone"


def test_who_did_not_listen_cannot_say_who_was_silent() -> None:
    patience = Patience(10)
    patience.handed(0.0)
    patience.forgive(1000.0)
    assert limit_s(patience, 1000.0) == 60
