"""The queue: bounded, by priority and then by age."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from phid.backlog import Backlog
from phid.errors import Code, Failure, Refused
from phid.jobs import Job
from phid.ledger import ReplyAddress, Ticket
from phid.requests import Request

_numbers = itertools.count()


def ticket(client: str = "c", priority: int = 5, deadline: float = 100.0) -> Ticket:
    name = f"r{next(_numbers)}"
    return Ticket(
        client=client,
        id=name,
        digest="",
        request=Request(prompt="x", priority=priority),
        address=ReplyAddress("t"),
        arrived=float(next(_numbers)),
        deadline=deadline,
        size_bytes=0,
        job=Job(name, ()),
        topic="t",
        id_given=True,
    )


class Model(RuleBasedStateMachine):
    """A backlog beside a plain list that is sorted when it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.backlog = Backlog(limit=6, per_client=3)
        self.waiting: list[tuple[int, int, Ticket]] = []
        self.turn = 0

    def has_room(self, client: str) -> bool:
        share = sum(t.client == client for *_, t in self.waiting)
        return len(self.waiting) < 6 and share < 3

    def ordered(self) -> list[Ticket]:
        return [t for *_, t in sorted(self.waiting, key=lambda entry: entry[:2])]

    @rule(client=st.sampled_from("abc"), priority=st.integers(0, 9), deadline=st.integers(0, 9))
    def offer(self, client: str, priority: int, deadline: int) -> None:
        if not self.has_room(client):
            with pytest.raises(Refused) as refused:
                self.backlog.check_room(client, 0, 7)
            assert refused.value.failure.code is Code.BUSY
            assert refused.value.failure.retry_after_ms == 7
            return
        self.backlog.check_room(client, 0, 7)
        self.turn += 1
        new = ticket(client, priority, deadline)
        self.waiting.append((-priority, self.turn, new))
        assert self.backlog.push(new) == self.ordered().index(new)

    @rule(client=st.sampled_from("abc"))
    def put_back(self, client: str) -> None:
        """What had its turn goes first, and is not refused for lack of room."""
        self.turn += 1
        again = ticket(client, 0)
        self.waiting.append((-100, -self.turn, again))
        assert self.backlog.push(again, first=True) == 0

    @rule()
    def take(self) -> None:
        expected = self.ordered()
        assert list(self.backlog) == expected
        if expected:
            assert self.backlog.remove(expected[0])
            self.forget(expected[0])

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sampled_from([t for *_, t in self.waiting]))
        assert self.backlog.remove(chosen)
        assert not self.backlog.remove(chosen)
        self.forget(chosen)

    @rule(now=st.integers(0, 10))
    def expire(self, now: int) -> None:
        gone = self.backlog.expired(now)
        assert set(gone) == {t for *_, t in self.waiting if t.deadline <= now}
        for one in gone:
            self.backlog.remove(one)
            self.forget(one)

    def forget(self, gone: Ticket) -> None:
        self.waiting = [entry for entry in self.waiting if entry[2] is not gone]

    @invariant()
    def agrees(self) -> None:
        assert len(self.backlog) == len(self.waiting)
        tickets = [t for *_, t in self.waiting]
        assert self.backlog.next_deadline == min((t.deadline for t in tickets), default=None)
        assert self.backlog.oldest_arrival == min((t.arrived for t in tickets), default=None)


TestModel = Model.TestCase


def test_a_lower_limit_after_a_reload_keeps_what_waits() -> None:
    backlog = Backlog(limit=4, per_client=4)
    for _ in range(4):
        backlog.push(ticket())
    backlog.limit = backlog.per_client = 1
    with pytest.raises(Refused):
        backlog.check_room("c", 0, 1)
    assert [backlog.remove(one) for one in backlog] == [True] * 4
    backlog.check_room("c", 0, 1)


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"limit": 2}, "the queue is full: 3 requests are waiting"),
        ({"limit_bytes": 31}, "no room: waiting requests take 30 of at most 31 bytes"),
        ({"per_client": 2}, "at most 2 requests of one client may wait"),
    ],
)
def test_who_is_refused_is_told_for_want_of_what(limits: dict[str, int], says: str) -> None:
    backlog = Backlog(**({"limit": 9, "per_client": 9} | limits))
    for _ in range(3):
        one = ticket()
        one.size_bytes = 10
        backlog.push(one)
    with pytest.raises(Refused) as refused:
        backlog.check_room("c", 10, 7)
    assert refused.value.failure == Failure(Code.BUSY, says, retry_after_ms=7)


def test_the_share_of_clients_that_left_is_forgotten() -> None:
    backlog = Backlog(limit=9, per_client=9)
    for n in range(100):
        one = ticket(f"c{n}")
        backlog.push(one)
        backlog.remove(one)
    assert not backlog._share


def test_what_waits_takes_no_more_memory_than_allowed() -> None:
    backlog = Backlog(limit=9, per_client=9, limit_bytes=100)
    backlog.check_room("c", 1000, 1)  # the only one may be larger: it would never be taken else
    large = ticket()
    large.size_bytes = 60
    backlog.push(large)
    backlog.check_room("c", 40, 1)
    with pytest.raises(Refused) as refused:
        backlog.check_room("c", 41, 7)
    assert refused.value.failure.code is Code.BUSY
    backlog.remove(large)
    backlog.check_room("c", 100, 1)
