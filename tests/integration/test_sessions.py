"""Conversations kept on the device: gone on with, one client's own, bounded, and not lost."""

from __future__ import annotations

import contextlib
import json
import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.test_laws import DEMO, script, wait_for_deltas
from integration.test_survival import accepted, journal, lasting, reborn, rows
from rig import Daemon, DaemonFactory, serving, until
from wire import BASE, Requester

__all__ = ["lasting"]  # a fixture
pytestmark = pytest.mark.mosquitto

RECALL = script(recall=True)
KEPT = "SELECT client, session, system, turns FROM conversations"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("sessions")
    with serving(folder, sessions__most=6, sessions__per_client=3) as daemon:
        yield daemon


@pytest.fixture
def asker(daemon: Daemon) -> Iterator[Requester]:
    with Requester(daemon.port) as client:
        yield client


def recalled(asker: Requester, session: str, **fields: Any) -> list[str]:
    """What the model is shown before the question, which goes into the session, too."""
    return shown(asker.ask(RECALL, session=session, **fields), session)


def shown(answer: dict[str, Any], session: str) -> list[str]:
    assert answer["type"] == "result", answer
    turns = json.loads(answer["text"])
    history = [turn for turn in turns if turn[0] != "system"]
    assert (answer["session"], answer["session_turns"]) == (session, len(history))
    return [f"{role}: {content}" for role, content in turns]


def forget(asker: Requester, session: str) -> None:
    asker.publish(f"{BASE}/{asker.device}/in/cancel/{asker.name}", {"session": session})


def test_a_session_goes_on_with_what_was_said(asker: Requester) -> None:
    first = asker.ask("one", session="talk")
    assert (first["session"], first["session_turns"]) == ("talk", 0)
    assert asker.ask("two", session="talk")["session_turns"] == 2
    said = ["user: one", "assistant: one", "user: two", "assistant: two"]
    assert recalled(asker, "talk") == said
    assert "session_turns" not in asker.ask("and without one")


def test_the_system_turn_stays_until_another_is_said(asker: Requester) -> None:
    asker.ask("one", session="rules", system="Be brief.")
    assert recalled(asker, "rules")[0] == "system: Be brief."
    assert recalled(asker, "rules", system="Be kind.")[0] == "system: Be kind."
    assert recalled(asker, "rules")[:2] == ["system: Be kind.", "user: one"]


def test_messages_of_several_turns_are_gone_on_with(asker: Requester) -> None:
    turns = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")]
    told = [{"role": role, "content": content} for role, content in turns]
    asker.request({"messages": told, "id": "m1", "session": "several"})
    asker.outcome("m1")
    said = ["system: Be brief.", "user: a", "assistant: b", "user: c", "assistant: c"]
    assert recalled(asker, "several") == said


def test_sessions_are_their_clients_own(daemon: Daemon, asker: Requester) -> None:
    asker.ask("mine", session="home")
    with Requester(daemon.port) as other:
        assert recalled(other, "home") == []
        forget(other, "home")
        accepted(other)
    assert recalled(asker, "home") == ["user: mine", "assistant: mine"]


def test_requests_of_a_session_that_wait_are_shown_what_went_before(
    daemon: Daemon, asker: Requester
) -> None:
    with daemon.engine_held():
        for n in range(3):
            asker.request({"prompt": f"q{n}", "id": f"s{n}", "session": "queue"})
    for n in range(3):
        assert asker.outcome(f"s{n}")["session_turns"] == 2 * n


def test_who_asks_the_same_again_adds_nothing(asker: Requester) -> None:
    asker.ask("once", session="retry", id="again")
    asker.request({"prompt": "once", "session": "retry", "id": "again"})
    asker.wait(lambda h: h.type == "result" and h.json.get("duplicate"))
    assert recalled(asker, "retry") == ["user: once", "assistant: once"]
    asker.request({"prompt": "once", "session": "other", "id": "again"})
    asker.wait(lambda h: h.type == "error" and h.json["code"] == "id_conflict")


def test_an_answer_that_is_cut_short_is_kept_as_far_as_it_came(asker: Requester) -> None:
    prompt = script(tokens=500, token_ms=20)
    asker.request(
        {"prompt": prompt, "id": "cut", "stream": "delta", "session": "cut", "max_tokens": 500}
    )
    wait_for_deltas(asker, "cut", 2)
    asker.cancel("cut")
    text = asker.outcome("cut")["text"]
    assert recalled(asker, "cut")[-1] == f"assistant: {text}"


@pytest.mark.parametrize("ends", [{"fail_at": 2}, {"prompt_tokens": 5000}, {"tokens": []}])
def test_what_has_no_answer_is_not_kept(asker: Requester, ends: dict[str, Any]) -> None:
    session = next(iter(ends))
    asker.ask("sound", session=session)
    asker.ask(script(**ends), session=session)
    assert recalled(asker, session) == ["user: sound", "assistant: sound"]


def test_a_history_that_is_too_long_loses_its_oldest_turns(asker: Requester) -> None:
    essay = " ".join(f"w{n}" for n in range(700))
    told = [
        asker.ask(f"{n} {essay}", session="long", max_tokens=700)["session_turns"] for n in range(4)
    ]
    # Four turns of 700 tokens before a fifth leave no room for a sixth: the newer half stays, and
    # what is lost is lost.
    assert told == [0, 2, 2, 2]
    # Whoever wants the whole context for the answer is given a quarter of it at least, not all.
    assert asker.ask("short", session="long", max_tokens=4096)["session_turns"] == 4
    before = [line[:7] for line in recalled(asker, "long")]
    assert before == ["user: 2", "assista", "user: 3", "assista", "user: s", "assista"]


def test_a_client_forgets_its_session(asker: Requester, daemon: Daemon) -> None:
    asker.ask("secret", session="gone")
    with daemon.engine_held():
        asker.request({"prompt": "waits", "id": "waits", "session": "gone"})
        asker.request({"prompt": "other", "id": "other"})
        accepted(asker)
        forget(asker, "gone")
        accepted(asker)
    gone = f"{KEPT} WHERE session = 'gone'"
    until(lambda: not rows(daemon.config.parent, gone), what="its end on the disk")
    assert asker.outcome("waits")["code"] == "cancelled"
    assert asker.outcome("other")["text"] == "other"
    assert recalled(asker, "gone") == []


@pytest.mark.parametrize(
    ("payload", "says"), [({}, "id"), ({"id": "a", "session": "b"}, "id"), ({"session": "a b"}, "")]
)
def test_a_cancel_names_a_request_or_a_session(
    asker: Requester, payload: dict[str, str], says: str
) -> None:
    topic = f"{BASE}/dut/in/cancel/{asker.name}"
    asker.publish(topic, payload, reply_to=asker.rx, correlation=b"c")
    error = asker.wait(lambda h: h.correlation == b"c").json
    assert (error["code"], error.get("field")) == ("bad_request", says or "session")


def test_too_many_sessions_cost_the_one_longest_unused(daemon: Daemon, asker: Requester) -> None:
    for name in ("a", "b", "c"):
        asker.ask(f"in {name}", session=name)
    asker.ask("again", session="a")
    asker.ask("one more", session="d")
    assert recalled(asker, "b") == []  # and now c is gone
    assert len(recalled(asker, "a")) == 4
    with Requester(daemon.port) as one, Requester(daemon.port) as two:
        for other in (one, two):
            for name in ("a", "b", "c"):
                other.ask("x", session=name)
        asker.listen(f"{BASE}/dut/out/health")
        asker.ctl("discover")
        health = asker.wait(lambda h: h.topic.endswith("/health")).json
    assert health["sessions"] == 6
    assert health["sessions_dropped_total"] >= 4
    assert recalled(asker, "a") == []


def test_who_has_no_name_has_no_session(asker: Requester) -> None:
    request = {"prompt": "x", "session": "s", "id": "anon"}
    asker.listen(f"{BASE}/dut/out/res/anon/#")
    asker.publish(f"{BASE}/dut/in/text", request)
    error = asker.wait(lambda h: h.topic.endswith("/anon/anon")).json
    assert (error["code"], error["field"]) == ("unauthorized", "session")


def test_pictures_are_in_no_session(asker: Requester) -> None:
    request = {"prompt": "x", "session": "s", "id": "f", "images": [{"part": 0}]}
    asker.publish(f"{BASE}/dut/in/frame/{asker.name}", request, reply_to=asker.rx)
    error = asker.outcome("f")
    assert (error["code"], error["field"]) == ("unsupported", "session")


def test_a_device_may_keep_none(start_daemon: DaemonFactory, requester: Requester) -> None:
    start_daemon(sessions__most=0)
    requester.listen(f"{BASE}/dut/out/info")
    info = requester.wait(lambda h: h.topic.endswith("/info")).json
    assert info["capabilities"] == ["text"]
    error = requester.ask("x", session="s")
    assert (error["code"], error["field"]) == ("unsupported", "session")
    assert "sessions.most" in error["message"]


def test_a_session_that_waits_or_is_answered_is_in_use(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    daemon = start_daemon(sessions__keep_s=1)
    requester.ask("first", session="s", system="Be brief.")
    slow = script(tokens=30, token_ms=50)
    with daemon.engine_held():
        requester.request({"prompt": slow, "id": "slow", "session": "s", "max_tokens": 30})
        accepted(requester)
        time.sleep(1.5)
    assert requester.outcome("slow")["session_turns"] == 2
    assert len(recalled(requester, "s")) == 5


def test_a_stream_with_a_long_history_is_marked_late(
    start_daemon: DaemonFactory, lasting: Requester
) -> None:
    daemon = start_daemon()
    lasting.ask("word " * 600, session="s")
    prompt = script(tokens=3, prompt_tokens=700, prefill_ms=6000)
    lasting.request({"prompt": prompt, "id": "slow", "session": "s", "stream": "delta"})
    accepted(lasting)
    reborn(daemon)
    assert lasting.outcome("slow", 60)["text"] == "t1 t2 t3 "


def test_a_session_nobody_goes_on_with_is_forgotten_on_the_disk_too(
    start_daemon: DaemonFactory, requester: Requester, tmp_path: Path
) -> None:
    start_daemon(sessions__keep_s=2)
    requester.ask("soon gone", session="brief")
    assert requester.ask("x", session="brief")["session_turns"] == 2
    until(lambda: rows(tmp_path, KEPT), what="a conversation on the disk")
    until(lambda: not rows(tmp_path, KEPT), what="its end")
    assert recalled(requester, "brief") == []


def test_a_reload_takes_over_how_many_are_kept(
    start_daemon: DaemonFactory, requester: Requester, tmp_path: Path
) -> None:
    daemon = start_daemon()
    requester.ask("x", session="s")
    daemon.config.write_text("[sessions]\nmost = 0\n")
    assert requester.ctl("reload")["data"]["changed"] == ["sessions.most"]
    assert requester.ask("x", session="s")["code"] == "unsupported"
    until(lambda: not rows(tmp_path, KEPT), what="its end on the disk")


def test_a_session_survives_kill_9_with_what_waited(
    start_daemon: DaemonFactory, lasting: Requester
) -> None:
    daemon = start_daemon()
    lasting.ask("first", session="s", system="Be brief.")
    with daemon.engine_held():
        lasting.request({"prompt": "second", "id": "second", "session": "s"})
        lasting.request({"prompt": RECALL, "id": "third", "session": "s"})
        accepted(lasting)
        reborn(daemon)
    assert lasting.outcome("second")["session_turns"] == 2
    said = ["system: Be brief.", *(f"{who}: first" for who in ("user", "assistant"))]
    said += [f"{who}: second" for who in ("user", "assistant")]
    assert shown(lasting.outcome("third"), "s") == said
    reborn(daemon)
    assert len(recalled(lasting, "s")) == 7
    assert daemon.stop() == 0
    daemon.start()
    assert len(recalled(lasting, "s")) == 9


def test_what_was_answered_before_a_kill_is_in_its_session_once(
    start_daemon: DaemonFactory, lasting: Requester
) -> None:
    daemon = start_daemon()
    for n in range(8):
        lasting.request({"prompt": f"q{n}", "id": f"k{n}", "session": "s"})
        if n % 3 == 2:
            lasting.outcome(f"k{n}")
            reborn(daemon)
    answers = [lasting.outcome(f"k{n}") for n in range(8)]
    assert [a["session_turns"] for a in answers] == [2 * n for n in range(8)]
    told = [f"{who}: q{n}" for n in range(8) for who in ("user", "assistant")]
    assert recalled(lasting, "s") == told


def test_a_journal_of_before_there_were_sessions_is_gone_on_with(
    start_daemon: DaemonFactory, lasting: Requester, tmp_path: Path
) -> None:
    daemon = start_daemon()
    lasting.ask("x", id="known")
    daemon.stop()
    with contextlib.closing(sqlite3.connect(journal(tmp_path))) as database:
        database.execute("DROP TABLE conversations")
    daemon.start()
    lasting.request({"prompt": "x", "id": "known"})
    lasting.wait(lambda h: h.type == "result" and h.json.get("duplicate"))
    lasting.ask("first", session="s")
    reborn(daemon)
    assert recalled(lasting, "s") == ["user: first", "assistant: first"]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("turns", value) for value in ("no JSON", '[["user"]]', "[[1, 2]]", "7", b"\xff", "[]")),
        ("turns", '[["system", "x"], ["user", "x"]]'),
        *(("system", b"7"), ("ts", "soon"), ("session", b"\xff")),
    ],
)
def test_a_damaged_conversation_is_forgotten_and_nothing_else(
    start_daemon: DaemonFactory, lasting: Requester, tmp_path: Path, column: str, value: object
) -> None:
    daemon = start_daemon()
    lasting.ask("lost", session="s")
    lasting.ask("sound", session="t", id="known")
    daemon.stop()
    with contextlib.closing(sqlite3.connect(journal(tmp_path), isolation_level=None)) as database:
        query = f"UPDATE conversations SET {column} = ? WHERE session = 's'"
        database.execute(query, (value,))
    daemon.start()
    assert recalled(lasting, "s") == []
    assert recalled(lasting, "t") == ["user: sound", "assistant: sound"]
    assert daemon.logged("conversations_unreadable", count=1)
    left = rows(tmp_path, KEPT)
    assert sorted(row[1] for row in left) in (["s", "t"], ["t"])  # the one of now
    assert not daemon.logged("journal_set_aside")


def test_a_disk_that_takes_nothing_costs_no_session(
    start_daemon: DaemonFactory, lasting: Requester, tmp_path: Path
) -> None:
    daemon = start_daemon()
    lasting.ask("first", session="s")
    assert daemon.process is not None
    limits = resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (1024, limits[1]))
    until(lambda: lasting.ask("x").get("code") == "busy", what="a write that fails")
    topic = f"{BASE}/dut/in/text/{lasting.name}"
    # At QoS 0 it is taken all the same.
    request = {"prompt": "second", "id": "unwritten", "session": "s"}
    lasting.publish(topic, request, qos=0, reply_to=lasting.rx)
    assert lasting.outcome("unwritten")["session_turns"] == 2
    resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, limits)
    until(lambda: any("second" in row[3] for row in rows(tmp_path, KEPT)), what="its being kept")
    reborn(daemon)
    assert len(recalled(lasting, "s")) == 4


def test_nothing_of_it_is_in_a_log(start_daemon: DaemonFactory, requester: Requester) -> None:
    daemon = start_daemon(log__level="debug")
    requester.ask("a-secret-word", session="s")
    recalled(requester, "s")
    forget(requester, "s")
    accepted(requester)
    daemon.stop()
    assert "a-secret-word" not in daemon.log


def test_the_terminal_goes_on_with_a_session(daemon: Daemon) -> None:
    def ask(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "phid", "ask", "--port", str(daemon.port)]
        command += ["--device", "dut", *options, RECALL]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert ask("--session", "s", "--client", "me").stderr.rstrip().endswith("; after 0 turns")
    ask("--session", "s", "--client", "me", "--json")
    again = ask("--session", "s", "--client", "me", "--json")
    assert json.loads(again.stdout)["session"] == "s"
    nameless = ask("--session", "s")
    assert (nameless.returncode, "--client" in nameless.stderr) == (2, True)


@pytest.mark.model
def test_a_real_model_knows_what_was_said_and_reads_only_what_is_new(
    tmp_path: Path, models_dir: Path
) -> None:
    with (
        serving(tmp_path, models_dir=models_dir, **DEMO) as daemon,
        Requester(daemon.port) as asker,
    ):
        rules = "You keep a farm. " + "It has a lamp and a gate. " * 16
        told = asker.ask("My dog is called Rex.", 60, session="s", system=rules, max_tokens=32)
        for turns, question in ((2, "What is my dog called?"), (4, "Is Rex a dog?")):
            before = told["usage"]
            told = asker.ask(question, 60, session="s", max_tokens=32)
            assert told["session_turns"] == turns
            assert "Rex" in told["text"]
            assert 0 <= before["prompt_tokens"] - told["usage"]["cached_tokens"] < 64
