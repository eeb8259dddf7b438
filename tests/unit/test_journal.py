"""The journal on real files: what is told as written is there after a kill at any byte."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import shutil
import sqlite3
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from phid import programs
from phid.entries import (
    Accepted,
    AskedAgain,
    Ended,
    Entry,
    Forgotten,
    JournalEvent,
    Left,
    Marked,
    NotWritten,
    PartKept,
    PartsDropped,
    Stepped,
    Told,
    Tried,
    Written,
)
from phid.journal import Journal, JournalTooNewError
from phid.ledger import ReplyAddress
from phid.tables import SCHEMA
from phid.traffic import Decision, Inbound
from wire import PATIENCE

MIB = 1 << 20


def accepted(number: int, payload: bytes = b"{}", **fields: object) -> Accepted:
    inbound = Inbound("in/text/c", payload, qos=1, retain=False, dup=False, user=(("a", "é"),))
    known = {
        "number": number,
        "client": "c",
        "id": f"r{number}",
        "id_given": True,
        "digest": "d",
        "inbound": inbound,
        "address": ReplyAddress("out", b"\0\xff"),
        "accepted_ts": 1000.0 + number,
        "deadline_ts": 2000.0,
    }
    return Accepted(**(known | fields))  # type: ignore[arg-type]


class Book:
    """A journal and what it has said; `left` is what it had when it was read."""

    def __init__(self, path: Path, max_bytes: int = 64 * MIB) -> None:
        self.said: queue.SimpleQueue[JournalEvent] = queue.SimpleQueue()
        self.journal = Journal(path, self.said.put, max_bytes=max_bytes)
        self.left = self.journal.open()

    def write(self, *entries: Entry) -> list[JournalEvent]:
        """What came of each of them."""
        for entry in entries:
            self.journal.write(entry)
        said: list[JournalEvent] = []
        while _count(said) < len(entries):
            event = self.said.get(timeout=60)
            if isinstance(event, Left):
                assert self.left is None, "it is read once"
                self.left = event
            else:
                said.append(event)
        return said


def _count(said: list[JournalEvent]) -> int:
    return sum(len(event.entries) if isinstance(event, Written) else 1 for event in said)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal.db"


def again(path: Path) -> Left:
    book = Book(path)
    book.journal.stop()
    assert book.left is not None
    return book.left


def test_a_request_comes_back_as_it_was(path: Path) -> None:
    book = Book(path)
    entry = accepted(7, b"\xff\xd8 raw", pictures=((-1, b"seen"), (-3, b"also")))
    other = ReplyAddress("elsewhere", None)
    assert book.write(entry, AskedAgain(7, other), PartKept("c", "r7", 0, b"part", 5.0))
    book.journal.stop()
    left = again(path)
    (row,) = left.rows
    # Where its answer goes is decided, whatever its payload says beside.
    assert row.accepted.inbound == replace(entry.inbound, response_topic=entry.address.topic)
    assert not row.damaged
    assert set(row.accepted.pictures) == set(entry.pictures)
    assert row.accepted.address == entry.address
    assert row.addresses == (other,)
    assert (row.marked, row.outcome, row.told) == (False, None, False)
    assert left.parts == (PartKept("c", "r7", 0, b"part", 5.0),)


def test_properties_that_cannot_be_read_any_more_damage_their_request_alone(path: Path) -> None:
    book = Book(path)
    assert book.write(accepted(1), accepted(2))
    book.journal.stop()
    with sqlite3.connect(path) as database:
        database.execute("UPDATE payloads SET properties = '{\"us' WHERE number = 1")
    database.close()
    assert [row.damaged for row in again(path).rows] == [True, False]


def damage(path: Path, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute(statement)


def test_an_outcome_with_a_flipped_bit_damages_its_request_alone(path: Path) -> None:
    book = Book(path)
    book.write(accepted(1), accepted(2), Ended(1, '{"text": "x"}', 1.0), Ended(2, "{}", 1.0))
    book.journal.stop()
    damage(path, "UPDATE requests SET outcome = CAST(x'7bff7d' AS TEXT) WHERE number = 1")
    rows = again(path).rows
    assert [(row.damaged, row.outcome) for row in rows] == [(True, ""), (False, "{}")]


@pytest.mark.parametrize(
    "what", ["client = CAST(x'63ff' AS TEXT)", "digest = x'ff'", "correlation = 'text'"]
)
def test_a_request_that_cannot_be_named_any_more_sets_the_file_aside(path: Path, what: str) -> None:
    book = Book(path)
    book.write(accepted(1))
    book.journal.stop()
    damage(path, f"UPDATE requests SET {what}")
    book = Book(path)
    assert book.left == Left()
    assert isinstance(book.write(accepted(1))[0], Written), "a new one is begun"
    book.journal.stop()
    assert len(list(path.parent.glob("*.bad"))) == 1


def test_a_time_that_is_none_any_more_stays_with_its_request(path: Path) -> None:
    book = Book(path)
    was = 1234567.890625
    book.write(accepted(1, accepted_ts=was), accepted(2), accepted(3), accepted(4))
    book.write(Ended(3, "{}", 1.0), PartKept("c", "r2", 0, b"x", 1.0))
    book.journal.stop()
    damage(path, "UPDATE requests SET deadline_ts = 'soon' WHERE number = 2")
    damage(path, "UPDATE requests SET ended_ts = 'then' WHERE number = 3")
    damage(path, "UPDATE pictures SET ts = 'now'")
    flipped = path.read_bytes().replace(struct.pack(">d", was), struct.pack(">d", math.nan))
    path.write_bytes(flipped)
    book = Book(path)
    assert isinstance(book.write(Stepped(10.0))[0], Written), "the clock may still be set"
    book.journal.stop()
    times = [(r.accepted.accepted_ts, r.accepted.deadline_ts, r.ended_ts) for r in book.left.rows]
    told = [tuple(None if math.isnan(ts) else ts for ts in row) for row in times]
    assert told == [
        (None, 2000.0, 0.0),
        (1002.0, None, 0.0),
        (1003.0, 2000.0, None),
        (1004.0, 2000.0, 0.0),
    ]
    assert [part.data for part in book.left.parts] == [b"x"]
    assert again(path).rows[3].accepted.accepted_ts == 1014.0


def test_what_belonged_to_a_number_that_is_another_now_is_nobody_elses(path: Path) -> None:
    book = Book(path)
    book.write(accepted(1), accepted(2), AskedAgain(2, ReplyAddress("elsewhere", None)))
    book.journal.stop()
    damage(path, f"UPDATE requests SET number = {(1 << 63) - 1} WHERE number = 2")
    book = Book(path)
    assert [row.damaged for row in book.left.rows] == [False, True]
    assert isinstance(book.write(accepted(2))[0], Written)
    book.journal.stop()
    rows = again(path).rows
    assert [(row.accepted.number, row.addresses) for row in rows[:2]] == [(1, ()), (2, ())]


def test_a_request_that_ends_takes_no_picture_from_another_of_its_name(path: Path) -> None:
    book = Book(path)
    book.write(accepted(1), accepted(2), PartKept("c", "r2", 0, b"x", 1.0))
    book.journal.stop()
    damage(path, "UPDATE requests SET id = 'r2'")
    book = Book(path)
    book.write(Ended(1, "{}", 1.0))
    book.journal.stop()
    assert [part.data for part in again(path).parts] == [b"x"]


def test_an_outcome_takes_the_place_of_what_was_asked(path: Path) -> None:
    book = Book(path)
    book.write(
        accepted(1, b"x" * MIB, pictures=((-1, b"y" * MIB),)), PartKept("c", "r1", 0, b"z", 1.0)
    )
    large = book.journal.used_bytes
    book.write(Marked(1), Ended(1, '{"text": "ü"}', 1500.0))
    assert book.journal.used_bytes < large - 2 * MIB + 100_000
    book.journal.write_later(Told(1))
    book.journal.stop()
    left = again(path)
    (row,) = left.rows
    assert (row.marked, row.outcome, row.ended_ts, row.told) == (
        True,
        '{"text": "ü"}',
        1500.0,
        True,
    )
    assert row.accepted.inbound.payload == b""
    assert left.parts == ()


def test_an_outcome_that_was_told_is_owed_to_who_asks_again(path: Path) -> None:
    other = ReplyAddress("elsewhere", None)
    book = Book(path)
    book.write(accepted(1), Ended(1, "{}", 1500.0), Told(1), AskedAgain(1, other))
    book.journal.stop()
    (row,) = again(path).rows
    assert (row.told, row.addresses) == (False, (other,))


def test_a_step_of_the_clock_moves_what_was_written_before_it(path: Path) -> None:
    book = Book(path)
    book.write(
        accepted(1), accepted(2), Ended(2, "{}", 1500.0), PartKept("c", "p", 0, b"x", 1600.0)
    )
    book.write(Stepped(250.5), accepted(3))
    book.journal.stop()
    left = again(path)
    times = [(r.accepted.accepted_ts, r.accepted.deadline_ts, r.ended_ts) for r in left.rows]
    assert times == [(1251.5, 2250.5, 0.0), (1252.5, 2250.5, 1750.5), (1003.0, 2000.0, 0.0)]
    assert [part.ts for part in left.parts] == [1850.5]


def test_what_is_forgotten_is_gone(path: Path) -> None:
    book = Book(path)
    book.write(accepted(1), accepted(2), Ended(1, "{}", 1.0), Forgotten(1))
    book.journal.stop()
    assert [row.accepted.number for row in again(path).rows] == [2]


def test_parts_that_nobody_asks_for_go_in_time(path: Path) -> None:
    book = Book(path)
    book.write(
        accepted(1), PartKept("c", "r1", 0, b"wanted", 10.0), PartKept("c", "x", 0, b"", 10.0)
    )
    book.write(PartKept("c", "y", 0, b"new", 10_000.0))
    book.journal.stop()
    assert sorted(part.id for part in again(path).parts) == ["r1", "y"]


def test_parts_that_were_dropped_go_at_once_but_not_those_of_an_open_request(path: Path) -> None:
    book = Book(path)
    of_camera = ((-1, b"seen"),)
    book.write(accepted(1, pictures=of_camera), PartKept("c", "r1", 0, b"wanted", 10.0))
    book.write(PartKept("c", "x", 0, b"y" * MIB, 10.0), PartKept("d", "x", 0, b"other", 10.0))
    large = book.journal.used_bytes
    book.write(PartsDropped("c", "x"), PartsDropped("c", "r1"))
    assert book.journal.used_bytes < large - MIB + 100_000
    book.journal.stop()
    left = again(path)
    assert sorted((part.client, part.id) for part in left.parts) == [("c", "r1"), ("d", "x")]
    assert left.rows[0].accepted.pictures == of_camera


def test_what_comes_while_the_disk_is_busy_goes_into_one_commit(path: Path) -> None:
    book = Book(path)
    said = book.write(*(accepted(n) for n in range(200)))
    assert len(said) < 100
    assert sum(1 for _ in book.journal.commit_ms) < 100


def test_who_waits_is_released_when_it_is_on_the_disk(path: Path) -> None:
    book = Book(path)
    decided = Decision()
    book.write(accepted(1, decided=decided))
    assert decided.is_set()
    # As the kernel would leave it: the file as it is now, without a word of goodbye.
    copy = path.parent / "killed"
    shutil.copytree(path.parent, copy)
    assert [row.accepted.number for row in again(copy / path.name).rows] == [1]


def test_what_does_not_fit_is_told_and_an_outcome_beside_it_fits(path: Path) -> None:
    book = Book(path, max_bytes=MIB)
    book.write(accepted(1))
    decided = Decision()
    large = accepted(2, b"x" * 2 * MIB, decided=decided)
    said = book.write(large, Ended(1, '{"it": "fits"}', 1.0))
    (failed,) = [event for event in said if isinstance(event, NotWritten)]
    assert failed.entry is large
    assert "full" in failed.reason
    assert not decided.is_set()
    assert book.journal.failing is None, "what was written last was written"
    book.journal.stop()
    assert [row.outcome for row in again(path).rows] == ['{"it": "fits"}']


def test_a_second_daemon_does_not_write_the_same_file(path: Path) -> None:
    book, second = Book(path), Book(path)
    book.write(accepted(1))
    (said,) = second.write(accepted(9))
    assert isinstance(said, NotWritten)
    assert "locked" in said.reason
    assert second.journal.failing
    book.journal.stop()
    assert isinstance(second.write(Tried())[0], Written)
    assert second.journal.failing is None
    assert second.left is not None, "what the other has left there"
    assert [row.accepted.number for row in second.left.rows] == [1]
    second.write(accepted(2))
    second.journal.stop()
    assert [row.accepted.number for row in again(path).rows] == [1, 2]


def test_a_file_that_is_locked_is_waited_for_once_for_all_that_is_to_be_written(
    path: Path,
) -> None:
    book = Book(path)
    second = Book(path)
    began = time.monotonic()
    said = second.write(*(Tried() for _ in range(20)))
    assert all(isinstance(event, NotWritten) for event in said)
    assert time.monotonic() - began < 10
    book.journal.stop()


def test_a_file_of_a_later_version_that_comes_late_is_left_alone_and_not_written(
    path: Path,
) -> None:
    Book(path).journal.stop()
    damage(path, f"PRAGMA user_version={SCHEMA + 1}")
    before = path.read_bytes()
    path.rename(path.with_name("away"))
    path.mkdir()
    book = Book(path)
    path.rmdir()
    path.with_name("away").rename(path)
    (said,) = book.write(Tried())
    assert isinstance(said, NotWritten)
    assert "later version" in said.reason
    assert path.read_bytes() == before
    path.unlink()
    assert isinstance(book.write(Tried())[0], Written), "it is looked for again"
    book.journal.stop()


def test_a_folder_that_comes_later_is_found(path: Path) -> None:
    path.parent.parent.mkdir(exist_ok=True)
    path.parent.write_text("a file where a folder should be")
    book = Book(path)
    assert book.left is None
    assert isinstance(book.write(accepted(1))[0], NotWritten)
    path.parent.unlink()
    assert isinstance(book.write(accepted(1))[0], Written)
    assert book.left == Left()


CRAMPED = """\
import queue, sys
from pathlib import Path
from phid import log
from phid.entries import PartKept, Tried
from phid.journal import Journal
log.configure("error")
said = queue.SimpleQueue()
journal = Journal(Path(sys.argv[1]), said.put, max_bytes=64 << 20)
journal.open()
journal._database.execute("PRAGMA hard_heap_limit=4000000")
for entry in (Tried(), PartKept("c", "r", 0, bytes(8_000_000), 0.0), Tried()):
    journal.write(entry)
    print(said.get(timeout=60).__class__.__name__, journal.failing)
"""


def test_what_there_is_no_memory_for_is_told_and_the_next_is_written(path: Path) -> None:
    """SQLite has a limit of its own: it cannot be raised again, and is of the whole process."""
    command = [sys.executable, "-c", CRAMPED, str(path)]
    said = subprocess.check_output(
        command, env=programs.environment(), text=True, timeout=60 * PATIENCE
    )
    assert said.splitlines() == [
        "Written None",
        f"NotWritten {path}: out of memory",
        "Written None",
    ]


@pytest.mark.parametrize(
    "content", [b"", b"SQLite format 3\0", b"x" * 5000, os.urandom(20_000)], ids=len
)
def test_a_file_that_is_no_journal_is_set_aside(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    book = Book(path)
    assert book.left == Left()
    assert isinstance(book.write(accepted(1))[0], Written)
    kept = [file.read_bytes() for file in path.parent.glob("*.bad")]
    assert kept == ([content] if content else [])


def test_a_file_of_a_later_version_is_left_alone(path: Path) -> None:
    Book(path).journal.stop()
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA user_version={SCHEMA + 1}")
    before = path.read_bytes()
    with pytest.raises(JournalTooNewError, match="later version"):
        Book(path)
    assert path.read_bytes() == before


class Crashes(RuleBasedStateMachine):
    """Kills at any byte of any write: what was told as written is there, in whole, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(mkdtemp(prefix="phid-journal-"))
        self.path = self.folder / "journal.db"
        self.model: dict[int, list[object]] = {}
        self.next = 1
        self.book = Book(self.path)

    def write(self, entry: Entry) -> None:
        (said,) = self.book.write(entry)
        assert isinstance(said, Written)

    @rule(size=st.integers(0, 20_000))
    def accept(self, size: int) -> None:
        self.write(accepted(self.next, b"p" * size))
        self.model[self.next] = [b"p" * size, False, None]
        self.next += 1

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def mark(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.model)))
        self.write(Marked(number))
        self.model[number][1] = True

    @precondition(lambda self: self.model)
    @rule(data=st.data(), text=st.text(max_size=200).filter(lambda t: t.isprintable()))
    def end(self, data: st.DataObject, text: str) -> None:
        number = data.draw(st.sampled_from(sorted(self.model)))
        self.write(Ended(number, text, 1.0))
        self.model[number][0], self.model[number][2] = b"", text

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.model)))
        self.write(Forgotten(number))
        del self.model[number]

    @rule(data=st.data(), torn=st.integers(0, 40_000), garbage=st.binary(max_size=64))
    def crash(self, data: st.DataObject, torn: int, garbage: bytes) -> None:
        """The power goes while the next commit is being written: part of it, or rubbish."""
        copy = self.folder / "after"
        shutil.copytree(self.folder, copy)
        log, written = copy / "journal.db-wal", self.folder / "journal.db-wal"
        whole = log.stat().st_size if log.exists() else 0
        before = {number: list(known) for number, known in self.model.items()}
        rules = [self.mark, self.end, self.forget] if self.model else []
        match data.draw(st.sampled_from([self.accept, *rules]), label="what is torn"):
            case self.accept:
                self.accept(data.draw(st.integers(0, 20_000)))
            case self.end:
                self.end(data, "what came of it")
            case other:
                other(data)
        fresh = written.read_bytes()[whole:]
        assert fresh or self.model == before, "its commit is nowhere"
        with log.open("ab") as file:
            file.write(fresh[:torn] + garbage)
        # A commit is there when the last of its bytes is; of one that is not, nothing is.
        self.check(again(copy / "journal.db"), self.model if torn >= len(fresh) else before)
        shutil.rmtree(copy)

    @rule()
    def restart(self) -> None:
        self.book.journal.stop()
        self.book = Book(self.path)
        self.check(self.book.left, self.model)

    def check(self, left: Left, model: dict[int, list[object]]) -> None:
        assert [row.accepted.number for row in left.rows] == sorted(model)
        for row in left.rows:
            payload, marked, outcome = model[row.accepted.number]
            assert (row.accepted.inbound.payload, row.marked, row.outcome) == (
                payload,
                marked,
                outcome,
            )

    @invariant()
    def never_fails(self) -> None:
        assert self.book.journal.failing is None

    def teardown(self) -> None:
        self.book.journal.stop()
        shutil.rmtree(self.folder)


Crashes.TestCase.settings = hypothesis_settings(
    max_examples=25, stateful_step_count=25, deadline=None
)
TestCrashes = Crashes.TestCase
