"""Identity: who asked what, and what came of it."""

from __future__ import annotations

import time

import pytest

from phid.errors import Code, Failure, Refused
from phid.jobs import Job, Turn
from phid.ledger import Ledger, ReplyAddress, Ticket
from phid.messages import Outcome, error_message
from phid.requests import Request

OUTCOME: Outcome = error_message("i", Failure(Code.INTERNAL, "said"))


def ticket(
    request_id: str = "i",
    *,
    client: str = "c",
    digest: str = "d",
    id_given: bool = True,
    deadline: float = 10.0,
) -> Ticket:
    return Ticket(
        client=client,
        id=request_id,
        digest=digest,
        request=Request(prompt="a secret", system="another", tags={"k": 1}),
        address=ReplyAddress("first"),
        arrived=0.0,
        deadline=deadline,
        job=Job("1", (Turn("user", "a secret"),)),
        size_bytes=0,
        topic="topic",
        id_given=id_given,
    )


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(keep_s=100, keep_entries=3)


@pytest.mark.parametrize("ended", [False, True])
def test_the_same_request_is_found_and_another_under_its_id_refused(
    ledger: Ledger, ended: bool
) -> None:
    known = ticket()
    ledger.open(known)
    if ended:
        ledger.close(known, OUTCOME, 1.0)
    assert ledger.find(("c", "i"), "d", 0.0) is known
    assert ledger.find(("other", "i"), "d", 0.0) is None
    with pytest.raises(Refused) as refused:
        ledger.find(("c", "i"), "other", 0.0)
    assert refused.value.failure.code is Code.ID_CONFLICT
    assert refused.value.failure.field == "id"


def test_an_outcome_is_kept_for_the_window_and_not_longer(ledger: Ledger) -> None:
    known = ticket()
    ledger.open(known)
    ledger.close(known, OUTCOME, now=5.0)
    ledger.prune(104.9)
    assert ledger.find(("c", "i"), "d", 0.0) is known
    ledger.prune(105.0)
    assert ledger.find(("c", "i"), "d", 0.0) is None
    assert len(ledger) == 0


def test_an_outcome_is_kept_at_least_as_long_as_its_deadline(ledger: Ledger) -> None:
    known = ticket(deadline=500.0)
    ledger.open(known)
    ledger.close(known, OUTCOME, now=5.0)
    ledger.prune(504.9)
    assert ledger.find(("c", "i"), "d", 0.0) is known
    ledger.prune(505.0)
    assert ledger.find(("c", "i"), "d", 0.0) is None


def test_each_is_forgotten_in_its_own_time_whatever_the_order(ledger: Ledger) -> None:
    for name, deadline in (("long", 500.0), ("short", 10.0), ("longer", 900.0)):
        known = ticket(name, deadline=deadline)
        ledger.open(known)
        ledger.close(known, OUTCOME, now=0.0)
    recalled = ticket("of an earlier run")
    recalled.state, recalled.forget_at = "ended", 50.0
    ledger.recall(recalled)
    left = [len(ledger)]
    for now in (49.9, 50.0, 99.9, 100.0, 500.0, 899.9, 900.0):
        ledger.prune(now)
        left.append(len(ledger))
    assert left == [4, 4, 3, 3, 2, 1, 1, 0]


def test_that_nothing_is_to_be_forgotten_yet_costs_nothing_however_much_is_kept() -> None:
    ledger = Ledger(keep_s=100, keep_entries=50_000)
    for n in range(50_000):
        known = ticket(str(n))
        known.state, known.forget_at = "ended", 100.0 + n
        ledger.recall(known)
    began = time.thread_time()
    for _ in range(1000):
        ledger.prune(99.0)
    assert time.thread_time() - began < 0.1


@pytest.mark.parametrize("id_given", [True, False])
def test_an_outcome_is_no_answer_after_its_window_even_where_nothing_else_ends(
    id_given: bool,
) -> None:
    forgotten: list[Ticket] = []
    ledger = Ledger(keep_s=100, keep_entries=3, on_forget=forgotten.append)
    known = ticket(id_given=id_given)
    ledger.open(known)
    ledger.close(known, OUTCOME, now=5.0)

    def find(digest: str, now: float) -> Ticket | None:
        if id_given:
            return ledger.find(("c", "i"), digest, now)
        return ledger.find_redelivered("topic", digest, now)

    assert find("d", 104.9) is known
    assert find("d", 105.0) is None
    assert find("other", 105.0) is None, "nor is it in the way of another request"
    assert (forgotten, len(ledger)) == ([known], 0)


def test_the_oldest_outcome_makes_room(ledger: Ledger) -> None:
    for n in range(5):
        known = ticket(f"i{n}", id_given=False, digest=f"d{n}")
        ledger.open(known)
        ledger.close(known, OUTCOME, float(n))
    assert len(ledger) == 3
    assert ledger.find(("c", "i1"), "d1", 0.0) is None
    assert ledger.find(("c", "i2"), "d2", 0.0) is not None
    assert ledger.find_redelivered("topic", "d1", 0.0) is None
    assert ledger.find_redelivered("topic", "d2", 0.0) is not None


def test_the_memory_of_an_outcome_does_not_hold_its_prompt(ledger: Ledger) -> None:
    known = ticket()
    ledger.open(known)
    ledger.close(known, OUTCOME, 1.0)
    assert "secret" not in repr(known)
    assert "another" not in repr(known)
    assert known.request.tags == {"k": 1}


def test_without_an_id_the_latest_of_its_kind_is_found_and_forgetting_an_older_keeps_it(
    ledger: Ledger,
) -> None:
    older, newer = ticket("a", id_given=False), ticket("b", id_given=False)
    ledger.open(older)
    ledger.open(newer)
    ledger.close(older, OUTCOME, 0.0)
    ledger.prune(200.0)
    assert ledger.find_redelivered("topic", "d", 0.0) is newer
    assert ledger.find_redelivered("topic", "other", 0.0) is None
    assert ledger.find_redelivered("elsewhere", "d", 0.0) is None


def test_one_with_an_id_is_no_answer_to_one_without(ledger: Ledger) -> None:
    ledger.open(ticket())
    assert ledger.find_redelivered("topic", "d", 0.0) is None


def test_those_who_ask_again_are_answered_once_each_and_only_so_many() -> None:
    known = ticket()
    known.also_answer(ReplyAddress("first"))
    assert known.late_addresses == []
    for n in range(8):
        known.also_answer(ReplyAddress("late", str(n).encode()))
        known.also_answer(ReplyAddress("late", str(n).encode()))
    assert len(known.late_addresses) == 8
    with pytest.raises(Refused) as refused:
        known.also_answer(ReplyAddress("late", b"ninth"))
    assert refused.value.failure.code is Code.BUSY


def test_a_ticket_that_was_never_opened_ends_beside_the_one_that_has_its_name(
    ledger: Ledger,
) -> None:
    known, misnamed = ticket(), ticket(digest="another")
    ledger.open(known)
    ledger.close(misnamed, OUTCOME, 1.0)
    assert ledger.find(known.key, "d", 2.0) is known
    ledger.close(known, OUTCOME, 3.0)
    assert ledger.find(known.key, "d", 4.0) is known
    assert (len(ledger), misnamed.state) == (1, "forgotten")


def test_of_two_outcomes_under_one_name_the_first_is_forgotten() -> None:
    forgotten: list[Ticket] = []
    ledger = Ledger(keep_s=100, keep_entries=3, on_forget=forgotten.append)
    first, second = ticket(), ticket(digest="another")
    for one in (first, second):
        one.state, one.outcome, one.forget_at = "ended", OUTCOME, 100.0
        ledger.recall(one)
    assert ledger.get(first.key) is second
    assert forgotten == [first]
