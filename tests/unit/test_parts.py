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
        ticket = Ticket(
            *("c", "r", "", Request(prompt="x"), Job("1", ()), 1, ReplyAddress("out")),
            *(0.0, 9.0, "topic", True),
            number=number,
        )
        gathering.parts.add(ticket.key, 0, b"x", 0.0, kept=True)
        gathering.hold(ticket, (PartRef(0),), 0.0)
        ends(ticket)
        assert dropped == told
        dropped.clear()
