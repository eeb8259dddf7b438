"""Pictures sent apart: how much of them is kept, and whose go."""

from __future__ import annotations

import pytest

from phid.attachments import PartRef
from phid.errors import Code, Failure
from phid.gathering import Gathering
from phid.jobs import Job
from phid.ledger import ReplyAddress, Ticket
from phid.parts import Parts
from phid.requests import Request

BROKEN = Failure(Code.UNSUPPORTED, "this is no image")


def test_who_floods_drops_his_own_and_nobody_elses() -> None:
    dropped: list[tuple[str, str]] = []
    parts = Parts(limit_bytes=1000, keep_s=60, on_drop=dropped.append)
    parts.add(("honest", "r"), 0, bytes(300), 0.0, kept=True)
    for n in range(100):
        parts.add(("greedy", f"g{n}"), 0, bytes(200), 1.0, kept=True)
    assert len(parts.take(("honest", "r"), for_good=False)) == 1
    assert dropped == [("greedy", f"g{n}") for n in range(97)]
    assert parts.dropped == 97


def test_neither_small_ones_nor_broken_ones_grow_without_bound() -> None:
    parts = Parts(limit_bytes=1 << 20, keep_s=60)
    for n in range(2000):
        parts.add(("greedy", f"g{n}"), 0, b"", 0.0, kept=True)
    assert len(parts._kept) <= 256
    for n in range(5000):
        parts.add(("worse", f"w{n // 1000}"), n % 1000, BROKEN, 0.0, kept=True)
    assert sum(len(kept.parts) for key, kept in parts._kept.items() if key[0] == "worse") <= 1024


def test_what_is_taken_or_comes_again_is_counted_off() -> None:
    parts = Parts(limit_bytes=1000, keep_s=60)
    for size in (900, 10, 500, 900):
        parts.add(("c", "r"), 0, bytes(size), 0.0, kept=True)
    assert len(parts.take(("c", "r"))[0]) == 900
    parts.add(("c", "s"), 0, bytes(900), 0.0, kept=True)
    assert parts.missing(("c", "s"), frozenset({0, 1})) == (1,)
    parts.prune(59.0)
    assert parts.dropped == 0
    parts.prune(60.0)
    assert (parts.dropped, parts._bytes) == (1, 0)


def test_parts_whose_request_has_come_wait_as_long_as_that() -> None:
    parts = Parts(limit_bytes=1000, keep_s=30)
    parts.add(("c", "r"), 0, b"x", 0.0, kept=True)
    parts.wait_on(("c", "r"))
    parts.add(("c", "r"), 1, b"y", 32.0, kept=True)
    parts.add(("c", "stray"), 0, b"z", 32.0, kept=True)
    parts.prune(1000.0)
    assert parts.missing(("c", "r"), frozenset({0, 1})) == ()
    assert parts.dropped == 1
    assert len(parts.take(("c", "r"))) == 2
    parts.add(("c", "r"), 0, b"of another one of its name", 1000.0, kept=True)
    parts.prune(1030.0)
    assert parts.dropped == 2


def test_parts_that_no_request_waits_for_go_first() -> None:
    parts = Parts(limit_bytes=1000, keep_s=30)
    parts.add(("c", "r"), 0, bytes(400), 0.0, kept=True)
    parts.wait_on(("c", "r"))
    for n in range(3):
        parts.add(("c", f"stray{n}"), 0, bytes(400), 1.0, kept=True)
    assert list(parts._kept) == [("c", "r"), ("c", "stray2")]
    parts.add(("c", "r"), 1, bytes(700), 2.0, kept=True)
    assert parts._kept == {}, "of what does not fit at all nothing stays"
    parts.add(("c", "r"), 0, b"again", 3.0, kept=True)
    parts.prune(1000.0)
    assert parts.missing(("c", "r"), frozenset({0, 1})) == (1,)


def request(number: int | None = None) -> Ticket:
    return Ticket(
        *("c", "r", "", Request(prompt="x"), Job("1", ()), 1, ReplyAddress("out")),
        *(0.0, 9.0, "topic", True),
        number=number,
    )


@pytest.mark.parametrize("first", ["its request", "its part"])
def test_a_request_whose_part_had_no_room_is_told_so_at_once(first: str) -> None:
    gathering, ticket = Gathering(limit_bytes=1000, keep_s=30), request()
    if first == "its request":
        gathering.hold(ticket, (PartRef(0), PartRef(1)), 0.0)
        gathering.parts.wait_on(("c", "another"))  # else that one's part would be the first to go
    gathering.add(ticket.key, 0, bytes(600), 0.0, kept=True)
    assert gathering.expired(0.0) == []
    gathering.add(("c", "another"), 0, bytes(600), 1.0, kept=True)
    if first == "its part":
        gathering.hold(ticket, (PartRef(0), PartRef(1)), 1.0)
    assert not gathering.complete(ticket)
    ((ended, failure),) = gathering.expired(1.0)
    assert ended is ticket
    assert (failure.code, failure.retry_after_ms) == (Code.BUSY, 30_000)
    assert failure.message == "there was no room to keep these parts: 0"
    gathering.drop(ticket)
    gathering.hold(request(), (PartRef(0),), 2.0)
    assert gathering.expired(3.0) == [], "of another one of its name nothing was dropped"
    ((_, failure),) = gathering.expired(32.0)
    assert (failure.code, failure.message) == (Code.INCOMPLETE, "these parts did not come: 0")


def test_a_request_whose_parts_have_no_room_even_alone_is_not_told_to_come_again() -> None:
    gathering, ticket = Gathering(limit_bytes=1000, keep_s=30), request()
    gathering.hold(ticket, (PartRef(0), PartRef(1)), 0.0)
    gathering.add(ticket.key, 0, bytes(600), 0.0, kept=True)
    gathering.add(ticket.key, 1, bytes(600), 1.0, kept=True)
    ((_, failure),) = gathering.expired(1.0)
    assert (failure.code, failure.retry_after_ms) == (Code.TOO_LARGE, None)
    assert failure.message == "its parts have more than 1000 bytes together"


def test_a_part_that_had_no_room_may_come_again_in_time() -> None:
    gathering, ticket = Gathering(limit_bytes=1000, keep_s=30), request()
    for part in range(2):
        gathering.add(ticket.key, 0, bytes(600), 0.0, kept=True)
        if part == 0:
            gathering.add(("c", "another"), 0, bytes(600), 1.0, kept=True)
    gathering.hold(ticket, (PartRef(0),), 2.0)
    assert gathering.expired(2.0) == []
    assert gathering.complete(ticket)


def test_what_had_no_room_is_not_remembered_without_bound_nor_for_ever() -> None:
    parts = Parts(limit_bytes=1000, keep_s=30)
    for n in range(1000):
        parts.add(("greedy", f"g{n}"), 0, bytes(900), 0.0, kept=True)
    assert len(parts._roomless) <= 256
    assert parts.lost(("greedy", "g998"), frozenset({0})) is not None
    parts.wait_on(("greedy", "g998"))
    parts.prune(30.0)
    assert list(parts._roomless) == [("greedy", "g998")]


def test_of_parts_that_were_accepted_with_their_request_none_is_dropped_for_room() -> None:
    parts = Parts(limit_bytes=1000, keep_s=30)
    for n in range(4):
        parts.put_back(("c", "r"), n, bytes(900), 0.0)
    assert [len(part) for part in parts.take(("c", "r")).values()] == [900] * 4  # type: ignore[arg-type]


def test_the_disk_is_told_of_what_it_keeps_and_of_nothing_else() -> None:
    dropped: list[tuple[str, str]] = []
    parts = Parts(limit_bytes=1000, keep_s=30, on_drop=dropped.append)
    for name, kept in (("on disk", True), ("in memory", False)):
        for verb in ("drop", "take", "hand over"):
            parts.add((name, verb), 0, b"x", 0.0, kept=kept)
    for name in ("on disk", "in memory"):
        parts.take((name, "take"))
        parts.take((name, "hand over"), for_good=False)
    assert dropped == [("on disk", "take")]
    parts.prune(30.0)
    assert dropped == [("on disk", "take"), ("on disk", "drop")]


@pytest.mark.parametrize(("number", "told"), [(None, [("c", "r")]), (7, [])])
def test_parts_of_a_request_that_the_disk_does_not_keep_need_no_room_there(
    number: int | None, told: list[tuple[str, str]]
) -> None:
    dropped: list[tuple[str, str]] = []
    gathering = Gathering(limit_bytes=1000, keep_s=30)
    gathering.parts.on_drop = dropped.append
    for ends in (gathering.complete, gathering.drop):
        ticket = request(number)
        gathering.parts.add(ticket.key, 0, b"x", 0.0, kept=True)
        gathering.hold(ticket, (PartRef(0),), 0.0)
        ends(ticket)
        assert dropped == told
        dropped.clear()
