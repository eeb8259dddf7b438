"""What was accepted survives the service's own death: kill -9 at every stage, and a bad disk."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.test_frames_wire import SOUND, digits, png
from integration.test_laws import deltas, script, wait_for_deltas, words
from rig import Daemon, DaemonFactory, Mosquitto, bound, locked, until
from wire import BASE, Requester

pytestmark = pytest.mark.mosquitto

SEE = {"prompt": '@script {"see": true}'}
HOUR_LONG = script(tokens=3000, token_ms=1000)


@pytest.fixture
def lasting(mosquitto: Mosquitto) -> Iterator[Requester]:
    with Requester(mosquitto.port, session_expiry_s=600) as client:
        yield client


def reborn(daemon: Daemon) -> None:
    """Killed as by the kernel, and started again."""
    with contextlib.suppress(Exception):
        daemon.stop(signal.SIGKILL)
    daemon.start()


def accepted(asker: Requester) -> None:
    """Whatever was sent before this has been decided and written: the broker's word is in order."""
    probe = f"probe-{uuid.uuid4().hex[:8]}"
    asker.request({"prompt": "x", "id": probe, "max_tokens": 0})
    asker.outcome(probe)


def runs(daemon: Daemon, request_id: str) -> int:
    return len(daemon.logged("job_ended", id=request_id))


def journal(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal.db"


def rows(tmp_path: Path, query: str) -> list[Any]:
    """What a copy of the file says: the daemon keeps its own locked.

    Its parts are not copied at one moment: if it was written meanwhile, they may not fit.
    """
    copy = tmp_path / "copy"
    for last in (False,) * 9 + (True,):
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        for file in journal(tmp_path).parent.glob("journal.db*"):
            shutil.copy(file, copy)
        try:
            with contextlib.closing(sqlite3.connect(copy / "journal.db")) as database:
                return list(database.execute(query))
        except sqlite3.DatabaseError:
            if last:
                raise
    raise AssertionError


def test_what_waits_and_runs_unseen_is_answered_by_the_next_start_in_order(
    start_daemon: DaemonFactory, lasting: Requester
) -> None:
    daemon = start_daemon()
    with daemon.engine_held():
        lasting.request({"prompt": script(tokens=30), "id": "runs"})
        for n in range(5):
            lasting.request({"prompt": f"answer {n}", "id": f"q{n}"})
        lasting.request({"prompt": "first of all", "id": "urgent", "priority": 9})
        accepted(lasting)
        reborn(daemon)
    assert lasting.outcome("runs")["text"] == words(30)
    for n in range(5):
        assert lasting.outcome(f"q{n}")["text"] == f"answer {n}"
    told = [h.json["id"] for h in lasting.heard if h.type == "result"]
    assert told == ["urgent", "runs", *(f"q{n}" for n in range(5))]
    assert lasting.ask("afterwards")["text"] == "afterwards"
    assert all(len(lasting.outcomes(i)) == 1 for i in told)


# The daemon with a mistake in it: its journal's thread meets what nothing had foreseen.
MISTAKEN = """\
import sys
from phid import cli, tables
def apply(database, entry, told=tables.apply):
    if getattr(entry, "id", None) == "fatal":
        raise ZeroDivisionError("a prompt, maybe")
    told(database, entry)
tables.apply = apply
sys.exit(cli.main(["run"]))
"""


def test_a_thread_that_dies_takes_the_service_with_it_and_the_next_start_goes_on(
    start_daemon: DaemonFactory, lasting: Requester
) -> None:
    daemon = start_daemon()
    daemon.stop()
    daemon.start((sys.executable, "-c", MISTAKEN))
    lasting.listen(f"{BASE}/dut/out/status")
    lasting.online()
    with daemon.engine_held():
        lasting.request({"prompt": "before", "id": "before"})
        accepted(lasting)
        lasting.request({"prompt": "with it", "id": "fatal"})
        until(lambda: daemon.has_ended, what="the end")
    assert daemon.process is not None
    assert daemon.process.returncode == 1
    assert daemon.logged("thread_died", thread="journal")
    assert "a prompt, maybe" not in daemon.log
    lasting.wait(lambda h: h.json.get("state") == "offline" and h.json.get("reason") == "lwt")
    daemon.start()
    for name in ("before", "fatal"):
        assert lasting.outcome(name)["type"] == "result"


def test_a_stream_that_had_begun_is_not_played_again(
    start_daemon: DaemonFactory, lasting: Requester
) -> None:
    daemon = start_daemon()
    prompt = script(tokens=1000, token_ms=20)
    lasting.request({"prompt": prompt, "id": "stream", "stream": "delta", "max_tokens": 1000})
    wait_for_deltas(lasting, "stream", 3)
    reborn(daemon)
    error = lasting.outcome("stream")
    assert (error["type"], error["code"]) == ("error", "engine_lost")
    assert "text" not in error
    seen = len(deltas(lasting, "stream"))
    assert lasting.ask("afterwards")["text"] == "afterwards"
    assert len(deltas(lasting, "stream")) == seen
    assert len(lasting.outcomes("stream")) == 1


def test_an_outcome_that_the_broker_may_not_have_is_sent_again_and_marked(
    start_daemon: DaemonFactory, mosquitto: Mosquitto, lasting: Requester, tmp_path: Path
) -> None:
    daemon = start_daemon()
    with daemon.engine_held():
        lasting.request({"prompt": script(tokens=20), "id": "r"})
        accepted(lasting)
        mosquitto.signal(signal.SIGSTOP)
    until(lambda: runs(daemon, "r") == 1, what="the job's end")
    until(lambda: rows(tmp_path, "SELECT 1 FROM requests WHERE outcome IS NOT NULL"))
    daemon.stop(signal.SIGKILL)
    mosquitto.signal(signal.SIGCONT)
    daemon.start()
    lasting.wait(lambda h: h.type == "result" and h.json.get("duplicate"))
    assert {o["text"] for o in lasting.outcomes("r")} == {words(20)}
    assert lasting.ask("afterwards")["text"] == "afterwards"
    assert runs(daemon, "r") == 1


def test_what_the_broker_has_is_not_told_again_after_a_while(
    start_daemon: DaemonFactory, lasting: Requester, tmp_path: Path
) -> None:
    daemon = start_daemon()
    assert lasting.ask("hello", id="told")["text"] == "hello"
    until(lambda: rows(tmp_path, "SELECT 1 FROM requests WHERE told"), 15)
    reborn(daemon)
    assert lasting.ask("afterwards")["text"] == "afterwards"
    assert len(lasting.outcomes("told")) == 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_retry_after_a_restart_is_answered_without_a_second_run(
    start_daemon: DaemonFactory, lasting: Requester, how: signal.Signals
) -> None:
    daemon = start_daemon()
    first = lasting.ask("what was it?", id="once")
    refused = lasting.ask("x " * 5000, id="long")
    assert refused["code"] == "too_large"
    daemon.stop(how)
    daemon.start()
    again = lasting.wait  # each waits for news of its own
    lasting.request({"prompt": "what was it?", "id": "once"}, correlation=b"again")
    heard = again(lambda h: h.correlation == b"again").json
    assert (heard["text"], heard["duplicate"]) == (first["text"], True)
    lasting.request({"prompt": "x " * 5000, "id": "long"}, correlation=b"long")
    assert again(lambda h: h.correlation == b"long").json["code"] == "too_large"
    lasting.request({"prompt": "another question", "id": "once"}, correlation=b"other")
    assert again(lambda h: h.correlation == b"other").json["code"] == "id_conflict"
    assert runs(daemon, "once") == 1


def test_one_who_asked_again_before_the_restart_is_answered_too(
    start_daemon: DaemonFactory, lasting: Requester
) -> None:
    daemon = start_daemon()
    lasting.listen(f"{BASE}/dut/out/res/{lasting.name}/+")
    request = {"prompt": script(tokens=30), "id": "r"}
    with daemon.engine_held():
        lasting.request(request, correlation=b"1")
        lasting.request(request, correlation=b"2", reply_to=None)
        accepted(lasting)
        reborn(daemon)
    for correlation in (b"1", b"2"):
        heard = lasting.wait(lambda h, c=correlation: h.correlation == c and h.type == "result")
        assert heard.json["text"] == words(30)


def test_a_request_without_an_id_keeps_the_one_it_was_given(
    start_daemon: DaemonFactory, lasting: Requester
) -> None:
    daemon = start_daemon()
    lasting.request({"prompt": script(tokens=20, token_ms=50), "stream": "delta"})
    given = lasting.wait(lambda h: h.type == "accepted").json["id"]
    reborn(daemon)
    outcome = lasting.outcome(given)
    assert outcome["type"] == "result" or outcome["code"] == "engine_lost"


def test_a_deadline_that_passes_while_we_are_gone_is_told(
    start_daemon: DaemonFactory, lasting: Requester
) -> None:
    daemon = start_daemon()
    lasting.request({"prompt": HOUR_LONG, "id": "runs"})
    lasting.request({"prompt": "in time?", "id": "late", "deadline_ms": 1500})
    accepted(lasting)
    daemon.stop(signal.SIGKILL)
    time.sleep(1.6)
    daemon.start()
    assert lasting.outcome("late")["code"] == "expired"
    lasting.cancel("runs")
    assert lasting.outcome("runs")["type"] in ("error", "result")


def test_pictures_sent_apart_and_what_a_camera_showed_survive(
    start_daemon: DaemonFactory, lasting: Requester, tmp_path: Path
) -> None:
    daemon = start_daemon(vision__camera_topics='["cam/+"]')
    lasting.publish("cam/a", SOUND)
    lasting.request({"prompt": HOUR_LONG, "id": "runs"})
    frame, part = f"{BASE}/dut/in/frame/{lasting.name}", f"{BASE}/dut/in/part/{lasting.name}"
    seen = {**SEE, "id": "camera", "images": [{"topic": "cam/a"}]}
    lasting.publish(frame, seen, reply_to=lasting.rx)
    parts = {**SEE, "id": "parts", "images": [{"part": 0}, {"part": 7}]}
    lasting.publish(f"{part}/parts/7", png(7, 7))
    lasting.publish(frame, parts, reply_to=lasting.rx)
    accepted(lasting)
    daemon.stop(signal.SIGKILL)
    daemon.start()
    lasting.publish("cam/a", png(9, 9))
    lasting.publish(f"{part}/parts/0", png(8, 8))
    lasting.cancel("runs")
    assert lasting.outcome("camera")["text"].split() == [digits(SOUND)]
    assert lasting.outcome("parts")["text"].split() == [digits(png(8, 8)), digits(png(7, 7))]
    assert lasting.ask("afterwards")["text"] == "afterwards"
    daemon.stop()
    assert rows(tmp_path, "SELECT * FROM pictures") == []
    assert rows(tmp_path, "SELECT * FROM payloads") == []


def test_what_came_at_qos_0_and_what_was_refused_is_not_written(
    start_daemon: DaemonFactory, requester: Requester, tmp_path: Path
) -> None:
    start_daemon()
    requester.request({"prompt": "hello", "id": "zero"}, qos=0)
    assert requester.outcome("zero")["text"] == "hello"
    assert requester.ask("x", priority=99)["code"] == "bad_request"
    assert requester.ask("one")["text"] == "one"
    assert len(rows(tmp_path, "SELECT * FROM requests")) == 1


def on_disk(tmp_path: Path) -> dict[str, bytes]:
    """Every byte that the journal has written."""
    return {f.name: f.read_bytes() for f in journal(tmp_path).parent.glob("journal.db*")}


def test_a_stream_writes_nothing_between_its_first_delta_and_its_outcome(
    start_daemon: DaemonFactory, requester: Requester, tmp_path: Path
) -> None:
    start_daemon(stream__delta_interval_ms=0)
    prompt = script(tokens=200, token_ms=5)
    requester.request({"prompt": prompt, "id": "r", "stream": "delta", "max_tokens": 200})
    wait_for_deltas(requester, "r", 1)
    before = on_disk(tmp_path)
    wait_for_deltas(requester, "r", 150)
    assert on_disk(tmp_path) == before
    assert requester.outcome("r")["text"] == words(200)
    assert on_disk(tmp_path) != before


def test_a_watchs_frames_are_not_written(
    start_daemon: DaemonFactory, requester: Requester, tmp_path: Path
) -> None:
    watch = {"name": "yard", "topic": "cam/+", "prompt": SEE["prompt"], "min_interval_s": 0}
    start_daemon(engine__model="eye?vision", watches=json.dumps([watch]))
    requester.listen(f"{BASE}/dut/out/watch/#")
    before = on_disk(tmp_path)
    for n in range(5):
        frame = png(64, 48) + b"%d" % n
        requester.publish("cam/a", frame)
        requester.wait(lambda h, f=frame: digits(f) in h.json.get("text", ""), 20, "a result")
    assert on_disk(tmp_path) == before


def test_rows_stay_as_few_as_outcomes_are_kept(
    start_daemon: DaemonFactory, requester: Requester, tmp_path: Path
) -> None:
    daemon = start_daemon(limits__dedupe_entries=10)
    for n in range(50):
        assert requester.ask(f"answer {n}")["text"] == f"answer {n}"
    daemon.stop()
    with contextlib.closing(
        sqlite3.connect(f"file:{journal(tmp_path)}?mode=ro", uri=True)
    ) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master")]
        counts = {
            table: database.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("requests", "payloads", "addresses", "pictures")
        }
    assert set(counts) <= set(tables)
    assert counts == {"requests": 10, "payloads": 0, "addresses": 0, "pictures": 0}


def test_a_stop_answers_what_it_can_and_leaves_the_rest_to_the_next_start(
    start_daemon: DaemonFactory, lasting: Requester
) -> None:
    daemon = start_daemon(limits__drain_s=0.2)
    lasting.request({"prompt": script(tokens=30, token_ms=80), "id": "runs"})
    lasting.request({"prompt": "next", "id": "waits"})
    accepted(lasting)
    assert daemon.stop() == 0
    assert lasting.outcomes("waits") == []
    daemon.start()
    assert lasting.outcome("waits")["text"] == "next"
    assert lasting.outcome("runs")["text"] == words(30)
    assert len(lasting.outcomes("runs")) == 1


# Files that are not what we have written, and disks that do not take what we write.


def garbage(path: Path) -> None:
    path.write_bytes(b"no database at all" * 1000)


def cut(path: Path) -> None:
    """The second half lost, as on a card that lies."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def scribbled(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096:12288] = b"\xa5" * 8192
    path.write_bytes(data)


def foreign(path: Path) -> None:
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE cats (name TEXT)")
        database.commit()


@pytest.mark.parametrize("spoil", [garbage, cut, scribbled, foreign])
def test_a_journal_that_cannot_be_used_is_set_aside_and_said(
    start_daemon: DaemonFactory, requester: Requester, tmp_path: Path, spoil: Any
) -> None:
    daemon = start_daemon()
    assert requester.ask("x" * 9000, max_tokens=1)
    daemon.stop()
    spoil(journal(tmp_path))
    spoilt = journal(tmp_path).read_bytes()
    daemon.start()
    assert requester.ask("still here?")["text"] == "still here?"
    assert len(daemon.logged("journal_set_aside", level="error")) == 1
    (kept,) = (tmp_path / "state").glob("journal.db.*.bad")
    assert kept.read_bytes() == spoilt
    daemon.stop()
    daemon.start()
    assert requester.ask("and again?")["text"] == "and again?"
    assert len(daemon.logged("journal_set_aside")) == 1


def test_requests_whose_times_are_damaged_are_answered_and_not_kept_for_ever(
    start_daemon: DaemonFactory, lasting: Requester, tmp_path: Path
) -> None:
    daemon = start_daemon(limits__dedupe_s=2)
    assert lasting.ask("hello", id="ended")["text"] == "hello"
    lasting.request({"prompt": HOUR_LONG, "id": "runs"})
    times = ["9e307", "-9e999", "'soon'", "0"]
    for n in range(len(times)):
        lasting.request({"prompt": "next", "id": f"q{n}"})
    lasting.request({"prompt": "sound", "id": "sound"})
    accepted(lasting)
    daemon.stop(signal.SIGKILL)
    with contextlib.closing(sqlite3.connect(journal(tmp_path), isolation_level=None)) as database:
        for n, ts in enumerate(times):
            column = ("accepted_ts", "deadline_ts")[n % 2]
            database.execute(f"UPDATE requests SET {column} = {ts} WHERE id = 'q{n}'")
        database.execute("UPDATE requests SET deadline_ts = 9e999, told = 1 WHERE id = 'ended'")
    daemon.start()
    lasting.cancel("runs")
    for n in range(len(times)):
        assert lasting.outcome(f"q{n}")["code"] == "internal"
    assert lasting.outcome("sound")["text"] == "sound"
    assert len(daemon.logged("times_unreadable", level="error")) == len(times) + 1
    until(
        lambda: {i for (i,) in rows(tmp_path, "SELECT id FROM requests")} == {"runs", "sound"},
        what="the end of the others' rows",
    )


def test_requests_whose_number_name_or_way_back_is_damaged_end_and_the_others_do_not(
    start_daemon: DaemonFactory, lasting: Requester, tmp_path: Path
) -> None:
    daemon = start_daemon()
    lasting.listen(f"{BASE}/dut/out/res/#")
    lasting.request({"prompt": HOUR_LONG, "id": "runs"})
    for name in ("way", "name", "sound", "number"):
        lasting.request({"prompt": f"answer {name}", "id": name})
    lasting.request({"prompt": "answer sound", "id": "sound"}, reply_to=f"{lasting.rx}/too")
    accepted(lasting)
    daemon.stop(signal.SIGKILL)
    with contextlib.closing(sqlite3.connect(journal(tmp_path), isolation_level=None)) as database:
        for column, name in (
            ("reply_topic = 'phid/v1/client/+/rx'", "way"),
            ("id = 'sound'", "name"),
            (f"number = {(1 << 63) - 1}", "number"),
        ):
            database.execute(f"UPDATE requests SET {column} WHERE id = '{name}'")
        database.execute("UPDATE addresses SET reply_topic = '#'")
    daemon.start()
    for name in ("way", "name", "number"):
        assert lasting.outcome(name)["code"] == "internal"
    lasting.cancel("runs")
    assert lasting.outcome("sound")["text"] == "answer sound"
    assert lasting.ask("new", id="new")["text"] == "new"
    assert daemon.stop() == 0
    daemon.start()
    assert lasting.ask("afterwards")["text"] == "afterwards"
    for name in ("way", "name", "sound", "number", "new"):
        assert len(lasting.outcomes(name)) == 1
    assert not daemon.logged("journal_set_aside")


def test_a_journal_of_a_later_version_is_refused_clearly(
    start_daemon: DaemonFactory, requester: Requester, tmp_path: Path
) -> None:
    daemon = start_daemon()
    assert requester.ask("x")
    daemon.stop()
    with contextlib.closing(sqlite3.connect(journal(tmp_path))) as database:
        database.execute("PRAGMA user_version=2")
    before = journal(tmp_path).read_bytes()
    daemon.start()
    until(lambda: daemon.has_ended, what="its end")
    assert daemon.process is not None
    assert daemon.process.returncode == 78
    assert "written by a later version of phid" in daemon.log
    assert journal(tmp_path).read_bytes() == before


@contextlib.contextmanager
def held_by_another(path: Path) -> Iterator[None]:
    """Another process has the file locked in this block."""
    program = (
        "import sqlite3, sys; file = sqlite3.connect(sys.argv[1]);"
        "file.execute('PRAGMA locking_mode=EXCLUSIVE'); file.execute('BEGIN EXCLUSIVE');"
        "print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        yield
        other.communicate()


@pytest.mark.parametrize("away", [held_by_another, locked], ids=["locked", "unreadable"])
def test_a_journal_that_can_be_opened_late_is_taken_over_then(
    start_daemon: DaemonFactory, lasting: Requester, tmp_path: Path, away: Any
) -> None:
    without_rights = [*bound(), sys.executable, "-m", "phid", "run"]
    daemon = start_daemon()
    lasting.listen(f"{BASE}/dut/out/status")
    assert lasting.ask("hello", id="told")["text"] == "hello"
    with daemon.engine_held():
        for n in range(3):
            lasting.request({"prompt": f"answer {n}", "id": f"q{n}"})
        accepted(lasting)
        daemon.stop(signal.SIGKILL)
    with away(journal(tmp_path)):
        daemon.start(without_rights)
        lasting.wait(lambda h: h.json.get("state") == "degraded")
        lasting.request({"prompt": "no promise", "id": "zero"}, qos=0)
        assert lasting.outcome("zero")["text"] == "no promise"
        assert lasting.ask("not now")["code"] == "busy"
    for n in range(3):
        assert lasting.outcome(f"q{n}")["text"] == f"answer {n}"
    lasting.online()
    assert lasting.ask("new", id="new")["text"] == "new"
    lasting.request({"prompt": "hello", "id": "told"}, correlation=b"again")
    again = lasting.wait(lambda h: h.correlation == b"again").json
    assert (again["text"], again["duplicate"]) == ("hello", True)
    assert daemon.stop() == 0
    daemon.start()
    assert lasting.ask("afterwards")["text"] == "afterwards"
    for request_id in ("q0", "q1", "q2", "new"):
        assert len(lasting.outcomes(request_id)) == runs(daemon, request_id) == 1
    assert daemon.logged("journal_set_aside") == []


def test_a_disk_that_takes_no_more_refuses_new_requests_and_finishes_the_old(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    daemon = start_daemon(health__interval_s=0.3)
    requester.listen(f"{BASE}/dut/out/status", f"{BASE}/dut/out/health")
    requester.status("online")
    requester.request({"prompt": script(tokens=40, token_ms=50), "id": "runs", "stream": "delta"})
    wait_for_deltas(requester, "runs", 2)
    assert daemon.process is not None
    pid, free = daemon.process.pid, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
    until(lambda: requester.ask("one more?").get("code") == "busy", 10)
    error = requester.ask("and this?")
    assert error["code"] == "busy"
    assert error["retry_after_ms"] > 0
    assert "journal.db" in error["message"]
    assert "cannot be kept" in requester.status("degraded")["reason"]
    assert requester.outcome("runs")["text"] == words(40)
    # At QoS 0 nothing was promised.
    requester.request({"prompt": "no promise", "id": "zero"}, qos=0)
    assert requester.outcome("zero")["text"] == "no promise"
    resource.prlimit(pid, resource.RLIMIT_FSIZE, free)
    until(lambda: requester.ask("room again?").get("text") == "room again?", 10)
    requester.status("online")
    health = requester.wait(lambda h: h.topic.endswith("/health")).json
    assert health["journal_failures_total"] >= 0
    daemon.stop(signal.SIGKILL)
    daemon.start()
    requester.request(
        {"prompt": script(tokens=40, token_ms=50), "id": "runs", "stream": "delta"},
        correlation=b"again",
    )
    again = requester.wait(lambda h: h.correlation == b"again").json
    assert (again["text"], again["duplicate"]) == (words(40), True)


def test_a_journal_that_is_full_refuses_until_there_is_room(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    start_daemon(journal__max_bytes=1 << 20)
    requester.request({"prompt": HOUR_LONG, "id": "runs"})
    big = script(tokens=1) + "y" * 400_000
    for n in range(4):
        requester.request({"prompt": big, "id": f"b{n}", "max_tokens": 1})
    accepted(requester)
    codes = [o["code"] for n in range(4) for o in requester.outcomes(f"b{n}")]
    assert set(codes) == {"busy"}
    assert 1 <= len(codes) <= 2
    requester.cancel("runs")
    until(lambda: requester.ask(big, max_tokens=1)["type"] == "result", 10)


def test_without_a_journal_nothing_is_written(
    start_daemon: DaemonFactory, requester: Requester, tmp_path: Path
) -> None:
    start_daemon(journal__enabled="false")
    assert requester.ask("hello", stream="delta")["text"] == "hello"
    assert not journal(tmp_path).exists()


# Engines that hang: a native call that never returns.


@pytest.fixture
def impatient(start_daemon: DaemonFactory, requester: Requester) -> Daemon:
    daemon = start_daemon(engine__hang_s=1, engine__restart_max_s=0.2)
    # What it took so far is what it may take ten times.
    assert requester.ask("so that it knows how long it takes", stream="delta")
    return daemon


def test_an_engine_that_hangs_in_mid_answer_is_ended_and_its_stream_told(
    impatient: Daemon, requester: Requester
) -> None:
    prompt = script(tokens=30, token_ms=60, hang_at=10)
    requester.request({"prompt": prompt, "id": "hangs", "stream": "delta"})
    error = requester.outcome("hangs", 10)
    assert error["code"] == "engine_lost"
    assert "hung (decode)" in error["message"]
    assert words(9).startswith(error["text"])
    assert error["text"].startswith("t1 t2 t3 ")
    assert requester.ask("afterwards", 10)["text"] == "afterwards"
    assert len(impatient.logged("engine_ended")) == 1


def test_a_job_that_hangs_two_engines_is_not_given_a_third(
    impatient: Daemon, requester: Requester
) -> None:
    error = requester.ask(script(tokens=3, hang_at=0), 20)
    assert error["code"] == "engine_lost"
    assert "hung (prefill)" in error["message"]
    assert requester.ask("afterwards", 10)["text"] == "afterwards"
    assert len(impatient.logged("engine_ended")) == 2


def test_an_engine_that_is_stopped_is_replaced(impatient: Daemon, requester: Requester) -> None:
    requester.request({"prompt": script(tokens=40, token_ms=30), "id": "whole"})
    until(lambda: impatient.logged("job_ended"))
    os.kill(impatient.engine_pid, signal.SIGSTOP)
    result = requester.outcome("whole", 20)
    assert result["text"] == words(40)
    assert len(impatient.logged("engine_ended")) == 1


def test_an_engine_that_hangs_while_it_loads_is_tried_again(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    daemon = start_daemon(
        wait=False, engine__hang_s=0.01, engine__model="x?load_hang", engine__restart_max_s=0.2
    )
    until(lambda: len(daemon.logged("engine_ended")) >= 2, 15)
    assert "hung (loading)" in daemon.logged("engine_ended")[0]["why"]
    requester.ctl("ping")


def test_a_slow_engine_is_not_taken_for_one_that_hangs(
    impatient: Daemon, requester: Requester
) -> None:
    assert requester.ask(script(tokens=8, token_ms=400, prompt_tokens=300, prefill_ms=1000), 20)[
        "text"
    ] == words(8)
    assert impatient.logged("engine_ended") == []


def test_a_service_that_slept_does_not_blame_its_engine(
    impatient: Daemon, requester: Requester
) -> None:
    requester.request({"prompt": script(tokens=60, token_ms=50), "id": "long"})
    until(lambda: impatient.logged("job_ended"))
    impatient.signal(signal.SIGSTOP)
    time.sleep(4)
    impatient.signal(signal.SIGCONT)
    assert requester.outcome("long", 20)["text"] == words(60)
    assert impatient.logged("engine_ended") == []
