"""How much is kept of what was said, and what is forgotten first."""

from __future__ import annotations

import contextlib
import itertools
import queue
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from phid.conversations import Conversations
from phid.entries import (
    Accepted,
    ConversationDropped,
    ConversationKept,
    Ended,
    JournalEvent,
    NotWritten,
    Written,
)
from phid.errors import Code, Refused
from phid.health import Health
from phid.jobs import Job, Turn
from phid.journal import Journal
from phid.ledger import ReplyAddress, Ticket
from phid.records import Records
from phid.requests import Request
from phid.sections import Sessions
from phid.settings import Settings
from phid.traffic import Decision, Inbound
from wire import PATIENCE, SLOWNESS


def ticket(said: str, session: str | None = "s", client: str = "me", system: str = "") -> Ticket:
    turns = (Turn("user", said),)
    if system:
        turns = (Turn("system", system), *turns)
    return Ticket(
        client=client,
        id="x",
        digest="",
        request=Request(prompt=said, session=session),
        job=Job("1", turns),
        size_bytes=0,
        address=ReplyAddress("t"),
        arrived=0.0,
        deadline=9.0,
        topic="t",
        id_given=True,
    )


def conversations(
    records: Records | None = None, max_bytes: int = 1 << 24, **limits: int
) -> Conversations:
    health = Health(Path())
    settings = Settings(sessions=Sessions(**limits), journal={"max_bytes": max_bytes})  # type: ignore[arg-type]
    return Conversations(settings, records or Records(None, health), health)


def said(kept: Conversations, session: str = "s", client: str = "me") -> list[str]:
    return [turn.content for turn in kept.job(ticket("?", session, client)).history or ()]


def answer(
    kept: Conversations,
    asked: Ticket,
    text: str = "x",
    now: float = 0.0,
    shown: int | None = None,
) -> ConversationKept | None:
    """What is to be written of it, answered so after as many turns as there are, or `shown`."""
    job = kept.job(asked)
    return kept.add(asked, job, len(job.history or ()) if shown is None else shown, text, now)


def test_of_too_long_a_conversation_the_newer_half_is_kept() -> None:
    kept = conversations(chars=1000)
    lengths = []
    for n in range(40):
        answer(kept, ticket(f"{n:03d}" + "q" * 47), f"{n:03d}" + "a" * 47)
        lengths.append(len(said(kept)))
        assert said(kept)[-1].startswith(f"{n:03d}a")
        assert said(kept)[0].endswith("q")
    # 100 characters an exchange: it grows to ten, and is five again; not ten for ever.
    assert lengths[:12] == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 10, 12]
    assert sum(b < a for a, b in itertools.pairwise(lengths)) == 5


def test_an_exchange_that_is_longer_than_half_is_kept_by_itself() -> None:
    kept = conversations(chars=300)
    answer(kept, ticket("q" * 100), "a" * 100)
    answer(kept, ticket("r" * 120), "b" * 120)
    assert said(kept) == ["r" * 120, "b" * 120]
    answer(kept, ticket("s" * 100, system="y" * 150), "c")
    assert said(kept) == ["s" * 100, "c"]  # of a system turn nothing is cut off
    assert answer(kept, ticket("t" * 300), "d") is None
    assert said(kept) == []
    assert kept._health.counts["sessions_dropped"] == 1


def test_one_answer_after_very_many_turns_costs_no_time() -> None:
    kept = conversations(chars=1_000_000, max_bytes=1 << 28)
    turns = tuple(Turn("user" if n % 2 else "assistant", "x") for n in range(40_001))
    asked = ticket("last" * 250_000)
    began = time.thread_time()
    kept.add(asked, replace(asked.job, history=turns), len(turns), "x", 0.0)
    assert time.thread_time() - began < 0.1 * SLOWNESS


def test_what_the_model_was_not_shown_is_not_kept_either() -> None:
    kept = conversations()
    for n in range(3):
        answer(kept, ticket(f"q{n}"), f"a{n}")
    answer(kept, ticket("q3"), "a3", shown=2)
    assert said(kept) == ["q2", "a2", "q3", "a3"]
    answer(kept, ticket("q4"), "a4", shown=0)
    assert said(kept) == ["q4", "a4"]


def test_a_system_turn_is_taken_back_by_an_empty_one() -> None:
    kept = conversations()
    answer(kept, ticket("q", system="Be brief."))
    assert kept.job(ticket("q")).turns[0] == Turn("system", "Be brief.")
    empty = ticket("q")
    empty.request = Request(prompt="q", session="s", system="")
    assert kept.job(empty).turns == (Turn("user", "q"),)
    answer(kept, empty)
    assert kept.job(ticket("q")).turns == (Turn("user", "q"),)


def test_what_falls_due_while_it_is_answered_goes_on() -> None:
    kept = conversations(keep_s=10)
    answer(kept, ticket("q0", system="Be brief."), "a0")
    asked = ticket("q1")
    job = kept.job(asked)
    kept.tick(20.0)
    assert said(kept) == []
    kept.add(asked, job, 2, "a1", 21.0)
    assert said(kept) == ["q0", "a0", "q1", "a1"]
    assert kept.job(ticket("?")).turns[0].content == "Be brief."


def test_one_clients_many_do_not_cost_another_its_own() -> None:
    kept = conversations(most=4, per_client=3)
    answer(kept, ticket("x", "s", "other"))
    for n in range(5):
        answer(kept, ticket(f"{n}", f"s{n}"), now=1.0)
    assert said(kept, "s", "other") == ["x", "x"]
    assert [bool(said(kept, f"s{n}")) for n in range(5)] == [False, False, True, True, True]


def test_all_together_leave_the_journal_to_requests() -> None:
    kept = conversations(max_bytes=1 << 20, chars=20_000, per_client=64)
    for n in range(8):
        answer(kept, ticket("x" * 15_000, f"s{n}"))
    # A sixteenth of the journal's bytes in characters, of which each can take four.
    assert [bool(said(kept, f"s{n}")) for n in range(8)] == [False] * 4 + [True] * 4
    kept.forget("me", "s7", Decision())
    answer(kept, ticket("x" * 15_000, "s8"))
    assert [bool(said(kept, f"s{n}")) for n in range(9)] == [*[False] * 4, *[True] * 3, False, True]


def test_use_keeps_a_conversation() -> None:
    kept = conversations(keep_s=10)
    answer(kept, ticket("used", "used"))
    answer(kept, ticket("idle", "idle"), now=1.0)
    kept.check("me", "used", 8.0)
    kept.tick(12.0)
    assert said(kept, "idle") == []
    assert len(said(kept, "used")) == 2
    kept.tick(18.0)
    assert said(kept, "used") == []


def test_a_request_without_a_session_is_left_as_it_is() -> None:
    kept = conversations()
    plain = ticket("x", None)
    answer(kept, plain)
    assert kept.job(plain) is plain.job


@pytest.fixture
def unread(tmp_path: Path) -> Records:
    """The owner's side of a journal that could not be read yet."""
    journal = Journal(tmp_path / "journal.db", lambda _: None, max_bytes=1 << 20)
    journal.unread = True
    return Records(journal, Health(Path()))


def test_nothing_is_gone_on_with_before_what_was_kept_can_be_read(unread: Records) -> None:
    kept = conversations(unread)
    kept.check("me", None, 0.0)
    with pytest.raises(Refused) as refused:
        kept.check("me", "s", 0.0)
    assert (refused.value.failure.code, refused.value.failure.field) == (Code.BUSY, "session")
    assert refused.value.failure.retry_after_ms


def test_what_is_forgotten_before_it_can_be_read_is_forgotten(unread: Records) -> None:
    kept = conversations(unread)
    assert not kept.forget("me", "s", Decision())
    turns = Turn("user", "q"), Turn("assistant", "a")
    left = [ConversationKept("me", name, "", turns, 1e9) for name in ("s", "t")]
    kept.restore(tuple(left), 0.0, 1e9)
    unread.recovered()
    assert (said(kept), said(kept, "t")) == ([], ["q", "a"])


def test_those_left_are_forgotten_in_the_order_of_their_use(unread: Records) -> None:
    kept = conversations(unread, most=2, keep_s=100)
    turns = Turn("user", "q"), Turn("assistant", "a")
    ages = {"old": 90, "new": 10, "older": 95, "over": 101}
    left = [ConversationKept(f"c-{s}", s, "", turns, 1e9 - age) for s, age in ages.items()]
    kept.restore(tuple(left), 500.0, 1e9)
    assert [bool(said(kept, s, f"c-{s}")) for s in ages] == [True, True, False, False]


class Disk:
    """A journal's file with the thread that writes it, and what it has told."""

    def __init__(self, folder: Path, max_bytes: int = 1 << 20) -> None:
        self.heard: queue.SimpleQueue[JournalEvent] = queue.SimpleQueue()
        self.journal = Journal(folder / "journal.db", self.heard.put, max_bytes=max_bytes)
        self.left = self.journal.open()
        self.records = Records(self.journal, Health(Path()))

    def told(self) -> Written | NotWritten:
        self.records.commit()
        event = self.heard.get(timeout=10 * PATIENCE)
        assert isinstance(event, Written | NotWritten)
        return event

    def kinds(self) -> list[type]:
        event = self.told()
        assert isinstance(event, Written)
        return [type(entry) for entry in event.entries]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path)
    yield disk
    disk.journal.stop()


def test_it_is_on_the_disk_as_it_was_said(disk: Disk, tmp_path: Path) -> None:
    kept = conversations(disk.records)
    for n in range(2):
        entry = answer(kept, ticket(f"q{n} \U0001f600", system="Be brief."), f"a{n}")
        assert entry is not None
        disk.records.keep_conversation(entry.client, entry.session, entry.system, entry.turns)
    assert disk.kinds() == [ConversationKept] * 2
    disk.journal.stop()
    again = Disk(tmp_path)
    again.journal.stop()
    assert again.left is not None
    (one,) = again.left.conversations
    turns = [(role, f"{letter}{n}{end}") for n in range(2) for role, letter, end in ROLES]
    assert (one.client, one.session, one.system) == ("me", "s", "Be brief.")
    assert [(turn.role, turn.content) for turn in one.turns] == turns


def test_what_is_forgotten_is_acknowledged_when_the_disk_has_forgotten_it(disk: Disk) -> None:
    kept = conversations(disk.records)
    decided = Decision()
    assert not kept.forget("me", "s", decided)  # there is none
    answer(kept, ticket("x"))
    assert kept.forget("me", "s", decided)
    assert not decided.is_set()
    assert disk.kinds() == [ConversationDropped]
    assert decided.is_set()


def test_what_waited_for_the_disk_takes_nothing_back(disk: Disk, tmp_path: Path) -> None:
    turns = Turn("user", "q"), Turn("assistant", "a")
    new = ConversationKept("me", "s", "new", turns, 2e9)
    disk.journal.write(new, Ended(7, "{}", 2e9, replace(new, system="old", ts=1e9)))
    assert isinstance(disk.told(), Written)
    disk.journal.stop()
    left = Disk(tmp_path)
    left.journal.stop()
    assert left.left is not None
    assert [one.system for one in left.left.conversations] == ["new"]


def test_a_full_disk_has_an_outcome_with_its_conversation_or_neither(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    long = Turn("user", "q" * 3000), Turn("assistant", "a")
    seen = set()
    for n in range(400):
        entry = ConversationKept("me", f"s{n}", "", long, 1e9)
        inbound = Inbound("t", b"x" * 300, qos=1, retain=False, dup=False)
        address = ReplyAddress("t")
        accepted = Accepted(n, "me", f"{n}", True, "d", inbound, address, 1e9, 2e9)
        disk.journal.write(accepted)
        first = disk.told()
        disk.journal.write(Ended(n, "{}" * (n % 7 * 300), 1e9, entry))
        seen |= {type(first), type(disk.told())}
    disk.journal.stop()
    assert seen == {Written, NotWritten}
    with contextlib.closing(sqlite3.connect(tmp_path / "journal.db")) as database:
        ended = {i for (i,) in database.execute("SELECT id FROM requests WHERE outcome NOT NULL")}
        kept = {s[1:] for (s,) in database.execute("SELECT session FROM conversations")}
    assert ended == kept


def test_what_the_disk_does_not_take_waits_once_for_each_session(disk: Disk) -> None:
    kept = conversations(disk.records)
    disk.journal.failing = "no room"
    for n in range(50):
        answer(kept, ticket(f"{n}"))
        kept.not_written("me", "s")
        kept.tick(0.0)
    answer(kept, ticket("x", "gone"))
    kept.forget("me", "gone", Decision())
    kept.not_written("me", "gone")
    disk.records._entries.clear()
    disk.journal.failing = None
    kept.tick(0.0)
    assert sorted(map(str, disk.kinds())) == sorted(
        map(str, [ConversationKept, ConversationDropped])
    )


def test_a_full_journal_of_an_earlier_version_is_opened(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    inbound = Inbound("t", b"x" * 3000, qos=1, retain=False, dup=False)
    for n in range(60):
        address = ReplyAddress("t")
        disk.journal.write(Accepted(n, "me", f"{n}", True, "d", inbound, address, 1e9, 2e9))
        disk.told()
    disk.journal.stop()
    with contextlib.closing(sqlite3.connect(tmp_path / "journal.db")) as database:
        database.execute("DROP TABLE conversations")
        database.execute("VACUUM")
    again = Disk(tmp_path, max_bytes=1 << 16)
    again.journal.stop()
    assert again.left is not None
    assert len(again.left.rows) == 60


ROLES = (("user", "q", " \U0001f600"), ("assistant", "a", ""))
