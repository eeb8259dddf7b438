"""What waits for the disk: nothing is told of a request before that is where a power cut spares it.

The owner's part of the daemon and the real journal, whose thread does a commit when the test says.
"""

from __future__ import annotations

import contextlib
import json
import queue
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import pictures
from phid.crew import Crew
from phid.desk import Desk
from phid.entries import (
    Accepted,
    AskedAgain,
    Ended,
    Entry,
    JournalEvent,
    Left,
    Marked,
    PartKept,
    Told,
    Tried,
    Written,
)
from phid.gallery import Gallery, Rules
from phid.health import Health
from phid.intake import Intake, PartArrived, RequestArrived
from phid.jobs import EngineFacts, Finish, Finished, Image, Job, Load, Started, Tokens, Usage
from phid.journal import Journal
from phid.lineup import Lineup, Model
from phid.outbox import Outbox
from phid.records import Records
from phid.settings import Settings
from phid.traffic import Decision, Inbound, Sent
from phid.wallclock import WallClock
from phid.worker import Worker
from unit.test_outbox import Recorder, connected

SETTINGS = Settings(device="dev")
INTAKE = Intake(SETTINGS.topics, payload_bytes=1 << 20, max_tokens=1000, deadline_ms=600_000)
CAMERA = "cam/door"
PICTURE = pictures.jpeg()
FACTS = EngineFacts("m", "text", "idle", "1", "cpu", 1, 4096, 1, 1)
LONG = 10_000
"""Tokens of a prompt whose mark is not due before its first token."""


class SlowDisk(Journal):
    """A journal whose commits wait until they are let; `commits` has what went into each."""

    def __init__(self, path: Path) -> None:
        self.said: queue.SimpleQueue[JournalEvent] = queue.SimpleQueue()
        self.begun: queue.SimpleQueue[list[Entry]] = queue.SimpleQueue()
        self.let = threading.Semaphore(0)
        self.commits: list[list[Entry]] = []
        self.refuses: type[Entry] | None = None
        super().__init__(path, self.said.put, max_bytes=1 << 26)

    def _commit_all(self, entries: list[Entry]) -> None:
        self.begun.put(entries)
        self.let.acquire()
        super()._commit_all(entries)
        self.commits.append(entries)

    def _commit(self, entries: Iterable[Entry]) -> str | None:
        if any(isinstance(entry, self.refuses or ()) for entry in entries):
            return "no room"
        return super()._commit(entries)


class Idle(Worker):
    """An engine that is always there and says nothing by itself."""

    job: Job

    def submit(self, job: Job) -> None:
        self.running, self.job = job.id, job


class Owner:
    """The owner's loop, turn by turn."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.disk = SlowDisk(folder / "journal.db")
        self._begun: list[Entry] | None = None
        left = self.disk.open()
        self.link = Recorder()
        self.now, self.acknowledges = 0.0, True
        self.records = Records(self.disk, Health(folder))
        self.outbox = Outbox()
        self.outbox.connect(connected(self.link, packet_bytes=1 << 20, window=100))
        load = Load("scripted", "m", "")
        crew = Crew(Lineup((Model(load),), "m", "m"), partial(Idle, post=print, restart_max_s=1))
        (self.engine,) = crew.workers
        self.engine.state, self.engine.facts = "ready", FACTS
        gallery = Gallery(Rules((CAMERA,)))
        gallery.offer(CAMERA, PICTURE, 0.0, time.time())
        self.desk = Desk(
            *(SETTINGS, crew, self.outbox, Health(folder), lambda _: None),
            *(gallery.picture, self.records),
        )
        if left is not None:
            self.desk.recover(left, INTAKE, self.now, time.time())

    def take(
        self,
        prompt: str,
        qos: int = 1,
        tail: str = "rx",
        *,
        written: bool | None = None,
        **fields: object,
    ) -> Decision:
        """A request arrives, and goes to the engine at once; at QoS 1 it is to be written."""
        payload = json.dumps({"prompt": prompt, "id": "r", **fields}).encode()
        topics, reply_to = SETTINGS.topics, f"phid/v1/client/c/{tail}"
        topic = topics.frame("c") if "images" in fields else topics.text("c")
        arrived = INTAKE.read(
            Inbound(topic, payload, qos, retain=False, dup=False, response_topic=reply_to)
        )
        decided = Decision()
        assert isinstance(arrived, RequestArrived)
        written = bool(qos) if written is None else written
        assert self.desk.take(arrived, self.now, decided) == written
        self.end_turn()
        return decided

    def take_part(self, n: int = 0, of: str = "r") -> None:
        """A picture of it arrives apart, at QoS 1."""
        topic = SETTINGS.topics.part("c", of, n)
        arrived = INTAKE.read(Inbound(topic, PICTURE, qos=1, retain=False, dup=False))
        assert isinstance(arrived, PartArrived)
        assert self.desk.take_part(arrived, self.now, Decision())
        self.end_turn()

    def say(self, event: Started | Tokens | Finished) -> None:
        """The engine says this; a second goes by, so that a delta is due whenever there is one."""
        self.now += 1.0
        self.desk.engine_said(event, self.now)
        self.end_turn()

    def stream(self, count: int) -> None:
        """So many tokens, each told by itself."""
        for n in range(count):
            self.say(Tokens(self.job_id, f"t{n} "))

    def finish(self, text: str, tokens: int) -> None:
        usage = Usage(prompt_tokens=LONG, output_tokens=tokens)
        self.say(Finished(self.job_id, Finish.STOP, text, usage, 1.0, 1.0, 1.0))
        self.engine.running = None

    def begin(self) -> None:
        """Wait until the disk has taken what it was given: what follows is another commit's."""
        self._begun = self.disk.begun.get(timeout=60)

    def commit(self) -> list[type[Entry]]:
        """Let the disk do what it has begun: of what kind that was, once the owner knows."""
        if self._begun is None:
            self.begin()
        entries, self._begun = self._begun or [], None
        self.disk.let.release()
        said = self.disk.said.get(timeout=60)
        assert not isinstance(said, Left)
        self.desk.written(said)
        self.end_turn()
        return [type(entry) for entry in entries]

    def read_late(self) -> None:
        """The file can be opened at last: what it has is taken over."""
        left = self.hear_late()
        self.desk.recover(left, INTAKE, self.now, time.time())
        self.end_turn()

    def hear_late(self) -> Left:
        """The file can be opened at last: what the owner is to take over."""
        self.begin()
        self._begun = None
        self.disk.let.release()
        left = self.disk.said.get(timeout=60)
        assert isinstance(left, Left)
        written = self.disk.said.get(timeout=60)
        assert isinstance(written, Written)
        self.desk.written(written)
        return left

    def commit_until(self, last: type[Entry]) -> list[type[Entry]]:
        """What was written up to one of this kind, but for what tells nobody anything."""
        kinds: list[type[Entry]] = []
        while last not in kinds:
            kinds += [kind for kind in self.commit() if kind not in (Tried, Told)]
        return kinds

    @property
    def job_id(self) -> str:
        assert isinstance(self.engine, Idle)
        return self.engine.job.id

    def restarted(self) -> Owner:
        """The next one, after a crash: what was let is on the disk."""
        self.stop()
        return Owner(self.folder)

    def stop(self) -> None:
        self.disk.let.release(100)
        self.disk.stop()

    @property
    def parts_on_disk(self) -> int:
        """How many pictures it keeps, once it is at rest."""
        self.stop()
        with contextlib.closing(sqlite3.connect(self.folder / "journal.db")) as database:
            (count,) = database.execute("SELECT count(*) FROM pictures").fetchone()
        return int(count)

    @property
    def told(self) -> list[str]:
        """What was published of the request, in order."""
        return [str(p["payload"]["type"]) for p in self.link.published]

    def end_turn(self) -> None:
        for mid in range(1, len(self.link.published) + 1) if self.acknowledges else ():
            self.outbox.sent(Sent(self.link.session, mid))
        self.desk.tick(self.now)
        self.records.commit()


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    owner = Owner(tmp_path)
    yield owner
    owner.stop()


def test_the_first_delta_waits_for_its_mark_on_the_disk(owner: Owner) -> None:
    decided = owner.take("x" * LONG, stream="delta")
    owner.say(Started(owner.job_id, prompt_tokens=LONG))
    assert not decided.is_set()
    assert owner.commit() == [Accepted]
    assert decided.is_set()
    owner.stream(5)
    assert "delta" not in owner.told, "its mark is being written"
    assert owner.commit() == [Marked]
    owner.stream(1)
    assert owner.told == ["accepted", "delta", "delta"], "what waited goes out as one"
    first = next(p for p in owner.link.published if p["payload"]["type"] == "delta")
    assert first["payload"]["text"] == "t0 t1 t2 t3 t4 "


def test_the_mark_of_a_short_prompt_goes_with_its_request_and_no_delta_goes_before_both(
    owner: Owner,
) -> None:
    owner.take("short", stream="delta")
    owner.say(Started(owner.job_id, prompt_tokens=1))
    owner.stream(5)
    assert owner.told == ["accepted"]
    assert owner.commit() == [Accepted, Marked]
    assert owner.told == ["accepted", "delta"]


@pytest.mark.parametrize("stream", ["none", "delta"])
def test_an_outcome_waits_until_it_is_on_the_disk(owner: Owner, stream: str) -> None:
    owner.take("short", stream=stream)
    owner.say(Started(owner.job_id, prompt_tokens=1))
    owner.commit()
    owner.stream(2)
    owner.finish("t0 t1 ", 2)
    assert "result" not in owner.told
    assert not owner.desk.idle
    assert owner.commit() == [Ended]
    assert owner.told[-1] == "result"
    assert owner.told.count("result") == 1
    assert owner.desk.idle


def test_an_answer_that_is_whole_before_its_mark_is_written_is_told_in_order(owner: Owner) -> None:
    owner.take("x" * LONG, stream="delta")
    owner.say(Started(owner.job_id, prompt_tokens=LONG))
    owner.commit()
    owner.stream(2)
    owner.begin()
    owner.finish("t0 t1 ", 2)
    assert owner.told == ["accepted"]
    assert owner.commit() == [Marked]
    assert owner.told == ["accepted"]
    assert owner.commit() == [Ended]
    assert owner.told == ["accepted", "delta", "result"]


def test_a_last_delta_that_waited_for_the_disk_and_finds_no_link_is_counted(owner: Owner) -> None:
    owner.take("x" * LONG, stream="delta")
    owner.say(Started(owner.job_id, prompt_tokens=LONG))
    owner.commit()
    owner.stream(2)
    owner.begin()
    owner.finish("t0 t1 ", 2)
    owner.commit()
    owner.outbox.disconnect()
    assert owner.commit() == [Ended]
    assert owner.told == ["accepted"]
    assert owner.desk._health.counts["deltas_dropped"] == 1


def test_a_stream_of_two_hundred_tokens_costs_a_write_a_mark_and_an_outcome(owner: Owner) -> None:
    owner.take("x" * LONG, stream="delta")
    owner.say(Started(owner.job_id, prompt_tokens=LONG))
    assert owner.commit() == [Accepted]
    owner.stream(1)
    assert owner.commit() == [Marked]
    owner.stream(199)
    owner.finish("".join(f"t{n} " for n in range(200)), 200)
    assert owner.commit() == [Ended]
    assert owner.told == ["accepted", *["delta"] * 200, "result"]
    owner.stop()
    assert [[type(e) for e in entries] for entries in owner.disk.commits] == [
        [Accepted],
        [Marked],
        [Ended],
        [Told],  # which could wait
    ]


def test_who_asks_again_at_qos_1_what_came_at_qos_0_has_it_kept(owner: Owner) -> None:
    owner.take("x", qos=0, stream="delta")
    owner.say(Started(owner.job_id, LONG))
    owner.stream(2)
    decided = owner.take("x", tail="other", stream="delta")
    assert not decided.is_set()
    assert owner.commit() == [Accepted, AskedAgain, Marked]
    assert decided.is_set()
    owner.finish("t0 t1 ", 2)
    assert owner.commit() == [Ended]
    assert owner.told.count("result") == 2


def test_an_outcome_is_told_when_everybody_who_asked_has_it(owner: Owner) -> None:
    owner.take("x")
    owner.commit()
    owner.take("x", tail="other")
    owner.commit()
    sent = len(owner.link.published)
    owner.acknowledges = False
    owner.finish("y", 1)
    owner.commit()
    first, second = range(sent + 1, len(owner.link.published) + 1)
    owner.outbox.sent(Sent(owner.link.session, first))
    assert not owner.disk.waiting, "the other would be lost with a crash"
    owner.outbox.sent(Sent(owner.link.session, second))
    assert owner.disk.waiting


def test_parts_of_a_request_at_qos_0_leave_the_disk_with_the_turn_that_completes_it(
    owner: Owner,
) -> None:
    owner.take("x", qos=0, images=[{"part": 0}])
    owner.take_part()
    assert owner.job_id, "it is complete, and on the engine"
    assert owner.parts_on_disk == 0


def test_a_request_that_cannot_be_kept_leaves_no_parts_on_the_disk(owner: Owner) -> None:
    owner.take_part()
    owner.commit()
    owner.disk.refuses = Accepted
    owner.take("x", images=[{"part": 0}])
    owner.commit()
    assert owner.told == ["error"]
    assert owner.parts_on_disk == 0


def test_the_parts_of_a_request_stay_when_an_older_one_of_its_id_is_forgotten(
    owner: Owner,
) -> None:
    owner.take("x")
    owner.commit()
    owner.finish("y", 1)
    owner.commit()
    owner.now += SETTINGS.limits.dedupe_s - 1
    owner.take_part()
    owner.commit()
    owner.now += 2
    owner.take("x", images=[{"part": 0}])
    owner.commit()
    assert owner.restarted().engine.job.images == (Image(PICTURE),)


@pytest.mark.parametrize("image", [{"part": 0}, {"topic": CAMERA}], ids=["part", "camera"])
def test_what_is_kept_late_is_kept_with_the_pictures_that_it_has(
    owner: Owner, image: dict[str, object]
) -> None:
    owner.take("x", qos=0, images=[image])
    if "part" in image:
        owner.take_part()
        owner.commit()
    owner.take("x", images=[image])
    owner.commit()
    assert owner.restarted().engine.job.images == (Image(PICTURE),)


def test_what_is_kept_late_has_no_more_time_than_it_asked_for(owner: Owner) -> None:
    owner.take("x", qos=0, deadline_ms=60_000)
    owner.now += 40
    owner.take("x", deadline_ms=60_000)
    owner.commit()
    (ticket,) = owner.restarted().desk.ledger.open_tickets
    assert (ticket.arrived, ticket.deadline) == pytest.approx((-40, 20), abs=2)


def test_a_reload_takes_no_part_from_a_request_that_waits_for_the_rest(owner: Owner) -> None:
    owner.take_part(0)
    owner.take("x", images=[{"part": 0}, {"part": 1}, {"part": 2}])
    vision = SETTINGS.vision.model_copy(update={"parts_s": 1.0})
    owner.desk.configure(SETTINGS.model_copy(update={"vision": vision}))
    for n in (1, 2):
        owner.now += 10
        owner.take_part(n)
    assert owner.engine.job.images == (Image(PICTURE),) * 3


def test_a_request_whose_pictures_have_no_room_ends_at_once_and_leaves_none(owner: Owner) -> None:
    owner.desk.gathering.parts.limit_bytes = len(PICTURE)
    owner.take("x", images=[{"part": 0}, {"part": 1}])
    owner.take_part(0)
    owner.take_part(1)
    assert owner.commit_until(Ended)[-1] is Ended
    assert [p["payload"]["code"] for p in owner.link.published] == ["too_large"]
    assert owner.parts_on_disk == 0


def test_everybody_who_asked_hears_that_it_cannot_be_kept(owner: Owner) -> None:
    owner.take("x", qos=0)
    owner.disk.refuses = Accepted
    owner.take("x", tail="other")
    owner.commit()
    assert owner.told == ["error", "error"]
    assert {p["topic"].rpartition("/")[2] for p in owner.link.published} == {"rx", "other"}


def test_who_asks_again_while_the_disk_takes_nothing_is_told_to_try_later(owner: Owner) -> None:
    owner.take("x")
    owner.commit()
    owner.disk.failing = "no room"
    owner.take("x", written=False)
    assert owner.told == [], "its way back is kept already"
    owner.take("x", tail="other", written=False)
    assert owner.told == ["error"]
    owner.take("x", tail="third", qos=0, written=False)
    owner.finish("y", 1)
    assert owner.commit_until(Ended) == [Ended]
    told = [(p["topic"].rpartition("/")[2], p["payload"]["type"]) for p in owner.link.published]
    assert told == [("other", "error"), ("rx", "result"), ("third", "result")]


def test_who_asks_again_and_cannot_be_kept_is_refused_and_nobody_else_is(owner: Owner) -> None:
    owner.take("x")
    owner.commit()
    owner.disk.refuses = AskedAgain
    decided = owner.take("x", tail="other")
    assert not decided.is_set()
    owner.commit()
    assert decided.is_set()
    (refusal,) = owner.link.published
    assert refusal["topic"].rpartition("/")[2] == "other"
    assert refusal["payload"]["code"] == "busy"
    assert refusal["payload"]["retry_after_ms"]
    owner.disk.refuses = None
    owner.finish("y", 1)
    owner.commit()
    assert owner.told == ["error", "result"], "it has its outcome"


def test_who_asks_again_and_has_the_answer_before_the_disk_refuses_is_told_once(
    owner: Owner,
) -> None:
    owner.take("x")
    owner.commit()
    owner.disk.refuses = AskedAgain
    owner.finish("y", 1)
    owner.begin()
    owner.take("x", tail="other")
    assert owner.commit() == [Ended]
    assert owner.told == ["result", "result"]
    assert owner.commit() == [AskedAgain]
    assert owner.told == ["result", "result"]


def test_a_way_back_at_qos_0_is_not_kept(owner: Owner) -> None:
    owner.take("x")
    owner.commit()
    owner.take("x", tail="other", qos=0)
    owner.finish("y", 1)
    assert owner.commit() == [Ended]
    assert owner.told == ["result", "result"]


def test_a_retry_that_cannot_be_kept_ends_nothing_that_runs(owner: Owner) -> None:
    owner.take("x", qos=0)
    owner.disk.failing = "no room"
    owner.take("x", tail="other", written=False)
    assert owner.told == ["error"]
    owner.finish("y", 1)
    assert owner.told == ["error", "result"]


def test_the_ways_back_of_those_who_asked_again_are_kept_until_it_is_on_its_way(
    owner: Owner,
) -> None:
    owner.take("x")
    owner.commit()
    owner.take("x", tail="other")
    owner.commit()
    (ticket,) = owner.desk.ledger.open_tickets
    owner.finish("y", 1)
    owner.commit()
    assert owner.told == ["result", "result"]
    assert ticket.late_addresses == []


# A file that was damaged while nobody looked.


def damage(folder: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(folder / "journal.db", isolation_level=None)) as file:
        for statement in statements:
            file.execute(statement)


def told_of(owner: Owner) -> list[tuple[str, str]]:
    """Of which request what was told, in order: a code or a text."""
    every = [p["payload"] for p in owner.link.published if p["payload"]["type"] != "accepted"]
    return [(told["id"], told.get("code") or told["text"]) for told in every]


def test_behind_a_number_that_has_no_next_one_the_count_goes_on(owner: Owner) -> None:
    for name in ("a", "b"):
        owner.take(name, id=name)
    owner.stop()
    damage(owner.folder, f"UPDATE requests SET number = {(1 << 63) - 1} WHERE id = 'b'")
    after = owner.restarted()
    after.take("c", id="c")
    assert after.commit_until(Accepted) == [Ended, Accepted]
    after.stop()
    assert told_of(after) == [("b", "internal")]
    assert numbers(after.folder) == [(1, "a", 0), (2, "c", 0), ((1 << 63) - 1, "b", 1)]


@pytest.mark.parametrize(("damaged", "sound"), [("a", "b"), ("b", "a")])
def test_a_request_under_the_name_of_another_ends_and_the_other_runs(
    owner: Owner, damaged: str, sound: str
) -> None:
    for name in ("a", "b"):
        owner.take(name, id=name, images=[{"topic": CAMERA}])
    owner.stop()
    damage(owner.folder, f"UPDATE requests SET id = '{sound}' WHERE id = '{damaged}'")
    after = owner.restarted()
    assert [ticket.key for ticket in after.desk.ledger.open_tickets] == [("c", sound)]
    after.end_turn()
    assert after.commit() == [Ended]
    assert told_of(after) == [(damaged, "internal")]
    once_more = after.restarted()  # the sound one has kept its picture
    assert once_more.engine.job.images == (Image(PICTURE),)
    once_more.finish("y", 1)
    once_more.commit_until(Ended)
    once_more.take(sound, id=sound, images=[{"topic": CAMERA}], written=False)
    assert [told for told in told_of(once_more) if told[0] == sound] == [(sound, "y")] * 2
    once_more.stop()


# A file that cannot be opened at the start, and can be later.


@contextlib.contextmanager
def away(folder: Path) -> Iterator[None]:
    """The file is not to be had in this block."""
    path, elsewhere = folder / "journal.db", folder / "elsewhere"
    path.rename(elsewhere)
    path.mkdir()
    try:
        yield
    finally:
        path.rmdir()
        elsewhere.rename(path)


def waiting(owner: Owner) -> list[str]:
    return [ticket.id for ticket in owner.desk.backlog]


def numbers(folder: Path) -> list[tuple[int, str, bool]]:
    """The requests on the disk, and whether they have ended."""
    with contextlib.closing(sqlite3.connect(folder / "journal.db")) as database:
        return list(
            database.execute("SELECT number, id, outcome IS NOT NULL FROM requests ORDER BY number")
        )


STREAM: dict[str, Any] = {"prompt": "y" * LONG, "id": "s", "stream": "delta"}


@pytest.fixture
def late(owner: Owner) -> Iterator[Owner]:
    """One that starts without its file, which has t, that has ended, s, r and a part each of r, p.

    The engine has m meanwhile.
    """
    owner.acknowledges = False
    owner.take("z", id="t")
    owner.finish("of t", 1)
    owner.take_part()
    owner.take_part(of="p")
    owner.take("x", images=[{"part": 0}, {"part": 1}])
    owner.take(**STREAM)
    owner.stop()
    with away(owner.folder):
        late = Owner(owner.folder)
        late.take("first of all", qos=0, id="m")
    yield late
    late.stop()


def texts(owner: Owner) -> list[tuple[str, str, bool]]:
    """The results so far: to which address, what, and whether it says that it is a duplicate."""
    return [
        (p["topic"].rpartition("/")[2], p["payload"]["text"], p["payload"].get("duplicate", False))
        for p in owner.link.published
        if p["payload"]["type"] == "result"
    ]


def test_a_file_that_is_read_late_is_taken_over_behind_what_was_taken_meanwhile(
    late: Owner,
) -> None:
    late.take("second", qos=0, id="n")
    late.take("refused", id="busy", written=False)
    assert late.told == ["error"]
    assert "journal.db" in late.link.published[0]["payload"]["message"]
    late.read_late()
    assert waiting(late) == ["n", "s"]
    assert texts(late) == [("rx", "of t", True)]
    late.take_part(1)
    assert waiting(late) == ["n", "s", "r"]
    late.take("new", id="new")
    assert late.commit_until(Accepted) == [PartKept, Accepted]
    late.stop()
    assert numbers(late.folder) == [(1, "t", 1), (2, "r", 0), (3, "s", 0), (4, "new", 0)]


def test_nothing_is_accepted_between_the_late_reading_and_its_taking_over(late: Owner) -> None:
    left = late.hear_late()
    assert late.disk.failing is None
    late.take("too early", id="early", written=False)
    assert late.told == ["error"]
    late.desk.recover(left, INTAKE, late.now, time.time())
    late.take("in time", id="early")
    assert late.commit_until(Accepted) == [Accepted]


def test_one_that_is_asked_again_meanwhile_is_answered_once_for_both(late: Owner) -> None:
    late.take(**STREAM, qos=0, tail="other")
    assert waiting(late) == ["s"]
    late.read_late()
    assert waiting(late) == ["s"]
    assert late.commit_until(AskedAgain) == [AskedAgain]
    late.finish("of m", 1)
    late.desk.dispatch(late.now)
    late.finish("of s", 1)
    assert late.commit_until(Ended) == [Ended]
    assert texts(late)[2:] == [("other", "of s", False), ("rx", "of s", True)]
    late.stop()
    assert numbers(late.folder)[2] == (3, "s", 1)


def test_one_that_is_answered_meanwhile_is_not_run_again(late: Owner) -> None:
    late.finish("of m", 1)
    late.take(**STREAM, qos=0, tail="other")
    late.finish("of s", 1)
    assert texts(late)[-1] == ("other", "of s", False)
    late.read_late()
    assert waiting(late) == []
    assert not late.desk.idle
    assert late.commit_until(Ended) == [AskedAgain, Ended]
    assert texts(late)[3:] == [("other", "of s", True), ("rx", "of s", True)]
    late.stop()
    assert numbers(late.folder)[2] == (3, "s", 1)


def test_one_that_streams_meanwhile_is_not_run_again_after_a_crash(late: Owner) -> None:
    late.finish("of m", 1)
    late.take(**STREAM, qos=0)
    late.say(Started(late.job_id, LONG))
    late.stream(2)
    assert late.told[-1] == "delta"
    late.read_late()
    assert late.commit_until(Marked) == [Marked]
    late.stop()
    left = SlowDisk(late.folder / "journal.db").open()
    assert left is not None
    assert [row.marked for row in left.rows] == [False, False, True]


def test_who_took_the_id_of_another_meanwhile_is_told_so(late: Owner) -> None:
    late.take("another question", qos=0, id="s")
    late.read_late()
    assert [p["payload"]["code"] for p in late.link.published if "code" in p["payload"]] == [
        "id_conflict"
    ]
    assert [ticket.request.prompt for ticket in late.desk.backlog] == ["y" * LONG]


def test_an_id_that_had_ended_and_is_another_requests_now_is_remembered_as_that(
    late: Owner,
) -> None:
    late.finish("of m", 1)
    late.take("another question", qos=0, id="t")
    late.read_late()
    late.finish("of another", 1)
    late.take("another question", id="t", written=False)
    assert texts(late)[-1] == ("rx", "of another", True)
    late.stop()
    assert [request_id for _, request_id, _ in numbers(late.folder)] == ["r", "s"]


def test_a_part_that_was_kept_is_one_of_what_is_asked_again_meanwhile(late: Owner) -> None:
    late.take("x", qos=0, images=[{"part": 0}, {"part": 1}])
    late.take("w", qos=0, id="p", images=[{"part": 0}])
    late.read_late()
    assert waiting(late) == ["s", "p"]
    late.take_part(1)
    assert waiting(late) == ["s", "p", "r"]


def test_a_request_that_was_under_the_name_of_another_ends_none_that_has_its_own_now(
    late: Owner,
) -> None:
    late.take("x", qos=0, images=[{"part": 0}, {"part": 1}])
    damage(late.folder, "UPDATE requests SET id = 's' WHERE id = 'r'")
    late.read_late()
    assert late.commit_until(Ended) == [Ended]
    assert told_of(late)[-1] == ("r", "internal")
    assert waiting(late) == ["s"]
    late.take_part(1)
    assert waiting(late) == ["s", "r"]
    late.desk.cancel("c", "r", late.now)
    assert waiting(late) == ["s"]


def test_the_clock_may_be_set_before_the_file_is_read(late: Owner) -> None:
    off_s = [5000.0]
    late.records._clock = WallClock(lambda: time.time() + off_s[0])
    off_s[0] = 3000.0
    late.end_turn()
    off_s[0] = 0.0
    late.read_late()
    assert late.desk.ledger.open_tickets[-1].arrived == pytest.approx(late.now, abs=5)
    late.take("new", id="new")
    late.stop()
    left = SlowDisk(late.folder / "journal.db").open()
    assert left is not None
    ages = [time.time() - row.accepted.accepted_ts for row in left.rows]
    assert ages == pytest.approx([0] * 4, abs=5)
