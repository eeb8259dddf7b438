"""The laws of the design, against a real broker and with engines that die, hang and take long."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from json_schema import admits
from rig import ROOT, Daemon, DaemonFactory, Mosquitto, serving, unread_bytes, until
from wire import BASE, Heard, Requester, held_to

pytestmark = pytest.mark.mosquitto

QUICK = {"engine__restart_max_s": "0.2"}
"""Restarts so soon that a test with many of them is over in time."""

DEMO = {"engine__runtime": "genai", "engine__model": "smollm2-135m-instruct"}


def script(**directives: Any) -> str:
    return "@script " + json.dumps(directives)


def words(count: int) -> str:
    return "".join(f"t{n} " for n in range(1, count + 1))


def deltas(asker: Requester, request_id: str) -> list[Heard]:
    return [h for h in asker.of(request_id) if h.type == "delta"]


def wait_for_deltas(asker: Requester, request_id: str, count: int) -> None:
    asker.wait(
        lambda h: h.type == "delta" and h.json["id"] == request_id and h.json["seq"] >= count - 1,
        30,
        f"{count} deltas of {request_id}",
    )


def joined(asker: Requester, request_id: str) -> str:
    """The stream as a reader joins it; the rules that hold of any are checked."""
    heard = asker.of(request_id)
    seen = [h.json for h in heard if h.type == "delta"]
    assert [d["seq"] for d in seen] == list(range(len(seen)))
    kinds = [h.type for h in heard]
    ends = [n for n, kind in enumerate(kinds) if kind in ("result", "error")]
    assert "delta" not in kinds[ends[0] :], "nothing follows the outcome"
    return "".join(d["text"] for d in seen)


def spent(daemon: Daemon) -> list[dict[str, Any]]:
    """The jobs that have ended, by the daemon's own log."""
    return daemon.logged("job_ended")


def check_spent(daemon: Daemon, count: int) -> None:
    """That so many have ended: the log's line comes a moment after the answer."""
    until(lambda: len(spent(daemon)) >= count, 10, f"the end of {count} jobs")
    assert len(spent(daemon)) == count


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """For what leaves the daemon as it was."""
    with serving(tmp_path_factory.mktemp("laws")) as daemon:
        yield daemon


@pytest.fixture
def asker(daemon: Daemon) -> Iterator[Requester]:
    with Requester(daemon.port) as client:
        yield client


@pytest.fixture
def lasting(mosquitto: Mosquitto) -> Iterator[Requester]:
    """A requester whose messages the broker keeps while it is away."""
    with Requester(mosquitto.port, session_expiry_s=300) as client:
        yield client


# 1. Every accepted request has exactly one outcome.


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV])
def test_an_idle_engine_that_is_killed_is_replaced(
    start_daemon: DaemonFactory, requester: Requester, number: signal.Signals
) -> None:
    daemon = start_daemon()
    requester.listen(f"{BASE}/dut/out/status")
    killed = daemon.engine_pid
    os.kill(killed, number)
    requester.status("degraded")
    assert requester.ask("still here")["text"] == "still here"
    requester.status("online")
    assert daemon.engine_pid != killed
    (ended,) = daemon.logged("engine_ended")
    assert number.name in ended["why"]


@pytest.mark.parametrize("stream", ["none", "delta"])
def test_a_job_whose_engine_dies_in_the_prefill_is_run_again(
    start_daemon: DaemonFactory, requester: Requester, stream: str
) -> None:
    daemon = start_daemon(**QUICK)
    prompt = script(prompt_tokens=640, prefill_ms=1500, tokens=3)
    requester.request({"prompt": prompt, "id": "first", "stream": stream})
    requester.request({"prompt": "second", "id": "second"})
    requester.request({"prompt": "x", "id": "probe", "max_tokens": 0})
    requester.outcome("probe")  # what came before it has been taken
    os.kill(daemon.engine_pid, signal.SIGKILL)
    assert requester.outcome("first")["text"] == words(3)
    assert requester.outcome("second")["text"] == "second"
    assert len(requester.outcomes("first")) == len(requester.outcomes("second")) == 1
    assert joined(requester, "first") in ("", words(3))
    assert len(daemon.logged("engine_ended")) == 1


def test_an_answer_of_which_nothing_was_published_is_run_again(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    daemon = start_daemon(**QUICK)
    requester.request({"prompt": script(tokens=30, token_ms=50), "id": "whole"})
    requester.request({"prompt": "x", "id": "probe", "max_tokens": 0})
    requester.outcome("probe")
    os.kill(daemon.engine_pid, signal.SIGKILL)
    assert requester.outcome("whole")["text"] == words(30)
    assert len(requester.outcomes("whole")) == 1
    assert len(daemon.logged("engine_ended")) == 1


def test_a_stream_whose_engine_is_killed_ends_with_what_there_was(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    daemon = start_daemon()
    prompt = script(tokens=500, token_ms=10)
    requester.request({"prompt": prompt, "id": "cut", "stream": "delta", "max_tokens": 500})
    requester.request({"prompt": "next", "id": "next"})
    wait_for_deltas(requester, "cut", 3)
    os.kill(daemon.engine_pid, signal.SIGKILL)
    error = requester.outcome("cut")
    assert (error["code"], error["status"]) == ("engine_lost", 502)
    assert error["text"]
    assert words(500).startswith(error["text"])
    assert error["text"] == joined(requester, "cut")
    assert requester.outcome("next")["text"] == "next"
    # Asked again it is not run again: the text would not be the one that was cut.
    requester.request({"prompt": prompt, "id": "cut", "stream": "delta", "max_tokens": 500})
    again = requester.wait(lambda h: h.json.get("duplicate"), 10).json
    assert again == error | {"duplicate": True}


def test_a_job_that_kills_two_engines_is_not_given_a_third(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    daemon = start_daemon(**QUICK)
    poison = {"prompt": script(tokens=9, crash_at=4), "id": "poison"}
    requester.request(poison)
    requester.request({"prompt": "next", "id": "next"})
    error = requester.outcome("poison")
    assert error["code"] == "engine_lost"
    assert words(9).startswith(error["text"])
    assert requester.outcome("next")["text"] == "next"
    requester.request(poison, correlation=b"again")
    requester.wait(lambda h: h.correlation == b"again" and h.json["duplicate"], 10)
    assert len(daemon.logged("engine_ended")) == 2


def test_sixty_requests_with_engines_killed_at_random_have_one_outcome_each(
    start_daemon: DaemonFactory, mosquitto: Mosquitto
) -> None:
    daemon = start_daemon(**QUICK)
    chance = random.Random(7)
    askers = [Requester(mosquitto.port) for _ in range(4)]
    with Requester(mosquitto.port) as watcher:
        watcher.listen(f"{BASE}/dut/out/status")
        for n in range(15):
            for asker in askers:
                stream = chance.choice(["none", "delta"])
                prompt = script(tokens=10, token_ms=chance.choice([5, 20, 40]))
                asker.request({"prompt": prompt, "id": f"r{n}", "stream": stream})
        for _ in range(6):
            watcher.status("online")
            time.sleep(chance.uniform(0, 0.4))  # this is what is random
            os.kill(daemon.engine_pid, signal.SIGKILL)
            watcher.status("degraded")
        os.kill(daemon.engine_pid, signal.SIGKILL)  # one that has hardly begun
    outcomes = [asker.outcome(f"r{n}", 60) for n in range(15) for asker in askers]
    # The last engine may be on its way still.
    until(lambda: askers[0].ask("afterwards").get("text") == "afterwards")
    for asker in askers:
        for n in range(15):
            (outcome,) = asker.outcomes(f"r{n}")
            text = outcome.get("text", "")
            assert text.startswith(joined(asker, f"r{n}"))
            assert text == words(10) if outcome["type"] == "result" else words(10).startswith(text)
        asker.close()
    assert {o.get("code", "result") for o in outcomes} <= {"result", "engine_lost"}
    assert len(daemon.logged("engine_ended")) == 7
    check_spent(daemon, 61)


def test_a_broker_restarted_in_mid_answer_costs_no_outcome(
    start_daemon: DaemonFactory, mosquitto: Mosquitto, lasting: Requester
) -> None:
    daemon = start_daemon()
    prompt = script(tokens=40, token_ms=20)
    lasting.request({"prompt": prompt, "id": "streamed", "stream": "delta"})
    lasting.request({"prompt": prompt, "id": "whole"})
    wait_for_deltas(lasting, "streamed", 2)
    mosquitto.stop()
    until(lambda: daemon.logged("broker_away"))
    mosquitto.start()
    assert lasting.outcome("streamed")["text"] == words(40)
    assert lasting.outcome("whole")["text"] == words(40)
    assert lasting.ask("afterwards")["text"] == "afterwards"
    assert len(lasting.outcomes("streamed")) == len(lasting.outcomes("whole")) == 1
    assert words(40).startswith(joined(lasting, "streamed"))


def nothing_more_comes(port: int) -> bool:
    """Whether a broker that stands still has been sent something, and nothing for half a second."""
    before = unread_bytes(port)
    time.sleep(0.5)
    return before > 0 and unread_bytes(port) == before


def test_outcomes_that_a_killed_broker_did_not_acknowledge_are_sent_again_and_marked(
    start_daemon: DaemonFactory, mosquitto: Mosquitto, lasting: Requester
) -> None:
    daemon = start_daemon()
    with daemon.engine_held():
        for n in range(3):
            lasting.request({"prompt": script(tokens=10), "id": f"r{n}"})
        lasting.request({"prompt": "x", "id": "probe", "max_tokens": 0})
        lasting.outcome("probe")
        mosquitto.save()
        mosquitto.signal(signal.SIGSTOP)
    until(lambda: len(spent(daemon)) == 3, what="the end of three jobs")
    until(lambda: nothing_more_comes(mosquitto.port), what="their outcomes on the way")
    mosquitto.stop(signal.SIGKILL)
    mosquitto.start()
    for n in range(3):
        result = lasting.outcome(f"r{n}")
        assert result["text"] == words(10)
        assert result["duplicate"] is True
    assert lasting.ask("afterwards")["text"] == "afterwards"
    assert [len(lasting.outcomes(f"r{n}")) for n in range(3)] == [1, 1, 1]
    check_spent(daemon, 4)


@pytest.mark.parametrize("reply", ["asked for", "default"])
@pytest.mark.parametrize("named", [True, False], ids=["with id", "without id"])
def test_a_request_that_the_broker_delivers_again_is_run_once(
    start_daemon: DaemonFactory,
    mosquitto: Mosquitto,
    lasting: Requester,
    named: bool,
    reply: str,
) -> None:
    """The daemon sleeps while the request is sent, and wakes when the broker has gone."""
    daemon = start_daemon()
    lasting.listen(f"{BASE}/dut/out/res/{lasting.name}/+")
    # What it still had to acknowledge would be answered by a reset, which takes the request along.
    assert lasting.ask("beforehand")["text"] == "beforehand"
    daemon.signal(signal.SIGSTOP)
    payload = {"prompt": "once only"} | ({"id": "once"} if named else {})
    lasting.request(payload, reply_to=lasting.rx if reply == "asked for" else None)
    mosquitto.stop()
    daemon.signal(signal.SIGCONT)
    until(lambda: len(spent(daemon)) == 2, what="the job's end")
    mosquitto.start()
    outcome = lasting.wait(lambda h: h.json.get("text") == "once only").json
    assert lasting.ask("afterwards")["text"] == "afterwards"
    heard = [h for h in lasting.heard if h.json.get("text") == "once only"]
    assert [h.json.get("duplicate", False) for h in heard[1:]] == [True] * (len(heard) - 1)
    assert {h.json["id"] for h in heard} == {outcome["id"]}
    assert len({h.topic for h in heard}) == 1, "a topic that nobody was told of"
    check_spent(daemon, 3)
    assert daemon.logged("broker_connected", resumed=True), "else nothing was delivered again"


def test_what_waited_at_the_broker_is_answered_or_refused_when_the_daemon_comes_back(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    daemon = start_daemon()
    daemon.stop()
    for n in range(10):
        requester.request({"prompt": f"good {n}", "id": f"good{n}"})
        requester.request({"prompt": "bad", "id": f"bad{n}", "priority": 99})
    daemon.start()
    for n in range(10):
        assert requester.outcome(f"good{n}")["text"] == f"good {n}"
        assert requester.outcome(f"bad{n}")["code"] == "bad_request"


# 2. Deltas count from 0, join to the answer, and end before the outcome.


@pytest.mark.parametrize(
    "directives",
    [
        {"tokens": 1},
        {"tokens": 0},
        {"tokens": 200},
        {"tokens": 60, "token_ms": 10},
        {"tokens": ["zwölf ", "Boxkämpfer ", "🏈🏈 ", "日本語"] * 8, "bytes_split": True},
        {"tokens": ["", " ", "", "\n", ""] * 10},
    ],
    ids=["one", "none", "fast", "steady", "split characters", "blank"],
)
def test_deltas_join_to_the_answer(asker: Requester, directives: dict[str, Any]) -> None:
    asker.request(
        {"prompt": script(**directives), "id": (i := uuid.uuid4().hex), "stream": "delta"}
    )
    result = asker.outcome(i)
    tokens = directives["tokens"]
    assert result["text"] == (words(tokens) if isinstance(tokens, int) else "".join(tokens))
    assert joined(asker, i) == result["text"]
    assert result["deltas"] == len(deltas(asker, i))
    assert asker.of(i)[0].type == "accepted"
    assert {h.qos for h in asker.of(i) if h.type == "delta"} <= {0}
    assert {h.qos for h in asker.of(i) if h.type != "delta"} == {1}


def test_deltas_join_to_the_answer_before_a_stop_string(asker: Requester) -> None:
    prompt = script(tokens=["a", " S", "T", "b", " ST", "OP", " never"])
    asker.request({"prompt": prompt, "id": "stopped", "stream": "delta", "stop": [" STOP"]})
    result = asker.outcome("stopped")
    assert result["text"] == joined(asker, "stopped") == "a STb"


def test_without_a_wish_for_deltas_exactly_one_message_comes(asker: Requester) -> None:
    asker.ask(script(tokens=30, token_ms=5), id="single")
    asker.ask("afterwards")
    assert [h.type for h in asker.of("single")] == ["result"]


def test_deltas_come_at_most_ten_times_a_second(asker: Requester) -> None:
    prompt = script(tokens=100, token_ms=10)
    asker.request({"prompt": prompt, "id": "rate", "stream": "delta"})
    result = asker.outcome("rate")
    seconds = result["timing"]["decode_ms"] / 1000
    # The first at once and the last with the end.
    assert 5 <= result["deltas"] <= 10 * seconds + 2


TOKENS = 2000
MIB = 1 << 20


def test_a_broker_that_stands_still_makes_deltas_larger_not_wrong(
    start_daemon: DaemonFactory, mosquitto: Mosquitto, requester: Requester
) -> None:
    daemon = start_daemon(stream__delta_interval_ms=0)
    assert daemon.process is not None
    service = psutil.Process(daemon.process.pid)
    prompt = script(tokens=TOKENS, token_ms=1)
    long = {"prompt": prompt, "id": "still", "stream": "delta", "max_tokens": TOKENS}
    # With this each delta is so large that those of a second would be seen if they were kept.
    requester.request(long, correlation=b"c" * 8000)
    wait_for_deltas(requester, "still", 5)
    before = service.memory_info().rss
    mosquitto.signal(signal.SIGSTOP)
    until(lambda: spent(daemon), what="the job's end")
    grown = service.memory_info().rss - before
    mosquitto.signal(signal.SIGCONT)
    print(f"grown by {grown / MIB:.1f} MiB")
    assert grown < 4 * MIB
    result = requester.outcome("still")
    assert result["text"] == words(TOKENS)
    assert words(TOKENS).startswith(joined(requester, "still"))
    assert result["deltas"] == len(deltas(requester, "still"))
    assert requester.ask("afterwards")["text"] == "afterwards"


def test_a_stream_of_which_deltas_may_be_lost_says_no_more(
    start_daemon: DaemonFactory, mosquitto: Mosquitto, lasting: Requester
) -> None:
    start_daemon(stream__delta_interval_ms=0)
    long = {"prompt": script(tokens=600, token_ms=10), "id": "lossy", "max_tokens": 600}
    lasting.request(long | {"stream": "delta"})
    wait_for_deltas(lasting, "lossy", 5)
    mosquitto.save()
    mosquitto.signal(signal.SIGSTOP)
    until(lambda: unread_bytes(mosquitto.port), what="deltas that never arrive")
    mosquitto.stop(signal.SIGKILL)
    mosquitto.start()
    result = lasting.outcome("lossy")
    assert result["text"] == words(600)
    assert words(600).startswith(joined(lasting, "lossy"))
    assert result["deltas"] > len(deltas(lasting, "lossy")), "else nothing was lost"


def test_a_reader_that_stands_still_finds_its_stream_in_order(
    daemon: Daemon, asker: Requester
) -> None:
    go_on = threading.Event()
    with Requester(daemon.port) as slow:
        hear = slow._client.on_message
        slow._client.on_message = lambda *args: (go_on.wait(60), hear(*args))
        prompt = script(tokens=300, token_ms=2)
        slow.request({"prompt": prompt, "id": "slow", "stream": "delta", "max_tokens": 300})
        until(lambda: daemon.logged("job_ended", id="slow"))
        assert asker.ask("meanwhile")["text"] == "meanwhile"
        go_on.set()
        assert slow.outcome("slow")["text"] == joined(slow, "slow") == words(300)


# 4. The same request again has the same outcome without another inference.


def test_a_retry_while_it_runs_is_answered_where_it_was_asked_from(
    daemon: Daemon, asker: Requester
) -> None:
    request = {"prompt": script(tokens=10), "id": "retried"}
    inbox = f"{BASE}/client/{asker.name}/second"
    asker.listen(inbox)
    with daemon.engine_held():
        asker.request(request, correlation=b"1")
        asker.request(request, correlation=b"2", reply_to=inbox)
        asker.request(request, correlation=b"1")  # and this one is the first again
        asker.ctl("ping")
    asker.outcome("retried")
    asker.wait(lambda h: h.correlation == b"2", 10)
    asker.ask("afterwards")
    heard = {(h.topic, h.correlation): h.json for h in asker.of("retried")}
    assert len(asker.of("retried")) == len(heard) == 2
    first, second = heard[asker.rx, b"1"], heard[inbox, b"2"]
    assert second.pop("duplicate") is True
    assert first == second
    assert len(daemon.logged("job_ended", id="retried")) == 1


def test_a_retry_after_its_end_is_answered_from_memory(daemon: Daemon, asker: Requester) -> None:
    request = {"prompt": script(tokens=3), "id": "ended", "deadline_ms": 5000}
    asker.request(request)
    first = asker.outcome("ended")
    inbox = f"{BASE}/client/{asker.name}/second"
    asker.listen(inbox)
    # Neither the deadline nor the way back are part of what was asked.
    other = request | {"deadline_ms": 9000, "reply_to": inbox}
    asker.request(other, reply_to=None, correlation=b"late")
    heard = asker.wait(lambda h: h.correlation == b"late", 10)
    assert heard.topic == inbox
    assert heard.json == first | {"duplicate": True}
    assert len(daemon.logged("job_ended", id="ended")) == 1


def test_a_retry_of_what_was_refused_is_a_new_request(asker: Requester) -> None:
    assert asker.ctl("pause")["ok"]
    assert asker.ask("now", id="twice")["code"] == "paused"
    assert asker.ctl("resume")["ok"]
    asker.request({"prompt": "now", "id": "twice"})
    assert asker.wait(lambda h: h.type == "result", 10).json["text"] == "now"


def test_two_requests_without_an_id_are_two(daemon: Daemon, asker: Requester) -> None:
    before = len(spent(daemon))
    for correlation in (b"1", b"2"):
        asker.request({"prompt": "alike"}, correlation=correlation)
    first, second = (asker.wait(lambda h, c=c: h.correlation == c, 10).json for c in (b"1", b"2"))
    assert first["id"] != second["id"]
    assert "duplicate" not in first | second
    until(lambda: len(spent(daemon)) == before + 2)


# 5. Nothing grows without bound.


def rss_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_ended_requests_do_not_keep_their_prompts(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    daemon = start_daemon()
    assert daemon.process is not None
    padding = "x" * 900_000
    for _ in range(5):
        requester.ask(script(tokens=1, prompt_tokens=9) + padding)
    before = rss_mb(daemon.process.pid)
    for _ in range(60):
        requester.ask(script(tokens=1, prompt_tokens=9) + padding)
    assert rss_mb(daemon.process.pid) - before < 20


def test_a_flood_of_bad_requests_is_not_remembered(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    daemon = start_daemon()
    assert daemon.process is not None
    requester.ask("warm")
    before = rss_mb(daemon.process.pid)
    for n in range(4000):
        requester._client.publish(f"{BASE}/dut/in/text/flood", b'{"priority": %d}' % n, 0)
    started = time.monotonic()
    assert requester.ask("through the flood", 60)["text"] == "through the flood"
    assert rss_mb(daemon.process.pid) - before < 20, time.monotonic() - started


# 7. Whatever the engine does, the service answers.


def latencies_s(asker: Requester, count: int) -> list[float]:
    """How long pings took, one after the other."""
    taken = []
    for _ in range(count):
        began = time.monotonic()
        assert asker.ctl("ping")["ok"]
        taken.append(time.monotonic() - began)
    return sorted(taken)


@pytest.mark.measures
@pytest.mark.parametrize(
    "directives",
    [{"prefill_ms": 60_000, "prompt_tokens": 1}, {"hang_at": 0}, {"tokens": 4000}],
    ids=["a long prefill", "a hang", "fast tokens"],
)
def test_pings_are_answered_within_100_ms_whatever_the_engine_does(
    start_daemon: DaemonFactory, requester: Requester, directives: dict[str, Any]
) -> None:
    start_daemon()
    for n in range(3):
        busy = {"prompt": script(**directives), "id": f"busy{n}", "max_tokens": 4000}
        requester.request(busy | {"stream": "delta"})
    requester.wait(lambda h: h.type == "accepted")
    taken = latencies_s(requester, 200)
    assert taken[197] < 0.1, taken[-5:]


@pytest.mark.measures
def test_a_cancel_in_a_long_prefill_is_answered_at_once_and_kills_no_engine(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    daemon = start_daemon()
    engine = daemon.engine_pid
    taken = []
    for n in range(3):
        prompt = script(prefill_ms=600, prompt_tokens=1, tokens=5)
        requester.request({"prompt": prompt, "id": f"c{n}", "stream": "delta"})
        requester.wait(lambda h, n=n: h.type == "accepted" and h.json["id"] == f"c{n}")
        began = time.monotonic()
        requester.cancel(f"c{n}")
        outcome = requester.outcome(f"c{n}")
        taken.append(time.monotonic() - began)
        assert outcome.get("finish", outcome.get("code")) == "cancelled"
    assert statistics.median(taken) < 0.1
    assert requester.ask("next")["text"] == "next"
    assert [len(requester.outcomes(f"c{n}")) for n in range(3)] == [1, 1, 1]
    assert daemon.engine_pid == engine


def test_a_cancel_in_mid_answer_ends_it_with_the_text_so_far(asker: Requester) -> None:
    prompt = script(tokens=1000, token_ms=10)
    asker.request({"prompt": prompt, "id": "c", "stream": "delta", "max_tokens": 1000})
    wait_for_deltas(asker, "c", 2)
    asker.cancel("c")
    result = asker.outcome("c")
    assert result["finish"] == "cancelled"
    assert words(1000).startswith(result["text"])
    assert asker.ask("next")["text"] == "next"
    assert result["text"].startswith(joined(asker, "c"))
    assert len(asker.outcomes("c")) == 1


def test_nobody_cancels_for_another(daemon: Daemon, asker: Requester) -> None:
    asker.request({"prompt": script(tokens=10, token_ms=30), "id": "mine"})
    with Requester(daemon.port) as other:
        other.cancel("mine")
        other.ctl("ping")
    assert asker.outcome("mine")["text"] == words(10)


# 8. Nobody but the requester sees a prompt or an answer.


def test_prompts_and_answers_are_in_no_log_and_no_report(
    mosquitto: Mosquitto, start_daemon: DaemonFactory, requester: Requester, tmp_path: Path
) -> None:
    secret = "zqxSECRETzqx"
    password = tmp_path / "password"
    password.write_text(f"{secret}\n")
    daemon = start_daemon(
        mqtt__username="phid", mqtt__password_file=password, health__interval_s=0.2, **QUICK
    )
    requester.listen(f"{BASE}/dut/out/status", f"{BASE}/dut/out/info", f"{BASE}/dut/out/health")
    requester.listen(f"{BASE}/dut/out/event", "$SYS/broker/log/#", f"{BASE}/dut/out/res/+/+")
    half = len(secret) // 2
    answer = script(tokens=[secret[:half], secret[half:], " end"])
    assert requester.ask(answer, stream="delta")["text"] == f"{secret} end"
    assert requester.ask("hello", system=secret)["text"] == "hello"
    assert requester.ask(f"hello {secret}", stop=[secret])["text"] == "hello "
    turns = [{"role": "user", "content": secret}, {"role": "assistant", "content": secret}]
    requester.request({"messages": [*turns, *turns[:1]], "id": "turns"})
    assert requester.outcome("turns")["text"] == secret
    errors = [
        requester.ask(script(tokens=[secret], fail_at=2)),
        requester.ask(script(tokens=[secret], fail_at=0)),
        requester.ask(script(tokens=[secret, secret], crash_at=2)),
        requester.ask(f'@script {{"no": "{secret}"}}'),
        requester.ask(f"{secret} " * 5000),
        requester.ask(script(tokens=[secret] * 9, token_ms=20), deadline_ms=50),
    ]
    assert all(e["type"] == "error" or e["finish"] == "deadline" for e in errors)
    for n, bad in enumerate(
        [
            secret,
            f'{{"prompt": "{secret}',
            f'["{secret}"]',
            json.dumps({"prompt": [secret]}),
            json.dumps({"prompt": f"{secret}\0"}),
            json.dumps({"prompt": "x", "temperature": secret}),
            json.dumps({"prompt": "x", "stream": secret}),
            json.dumps({"prompt": "x", "model": secret}),
            json.dumps({"prompt": "x", "v": secret}),
            json.dumps({"prompt": "x", "session": f"{secret}/"}),
            json.dumps({"prompt": "x", "reply_to": secret}),
            json.dumps({"prompt": "x", "tags": {"t": [secret]}}),
            json.dumps({"prompt": "x", "response_format": {"type": secret}}),
            json.dumps({"prompt": "x", "response_format": held_to({"type": secret})}),
            json.dumps({"prompt": "x", "response_format": held_to({"$ref": f"#/$defs/{secret}"})}),
            json.dumps({"prompt": "x", "response_format": held_to([secret])}),
            json.dumps({"messages": [secret]}),
            json.dumps({"messages": [{"role": secret, "content": secret}]}),
            json.dumps({"prompt": "x", "id": f"{secret}/"}),
        ]
    ):
        requester.request(bad, correlation=b"%d" % n, reply_to=None)
        heard = requester.wait(lambda h, n=n: h.correlation == b"%d" % n)
        assert heard.type == "error"
        errors.append(heard.json)
    for error in errors:
        error.pop("text", None)  # it is the answer, for whoever asked
        assert secret not in json.dumps(error)
    requester.ctl("discover")
    requester.wait(lambda h: h.topic.endswith("/health") and h.json["jobs_refused_total"] > 10)
    reports = [h for h in requester.heard if h.topic.split("/")[-2] == "out"]
    assert {h.topic.split("/")[-1] for h in reports} == {"status", "info", "health", "event"}
    assert [h for h in reports if secret.encode() in h.payload] == []
    daemon.stop()
    assert "job_ended" in daemon.log
    assert secret not in daemon.log


# The same with a real model.


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("real")
    with serving(folder, models_dir=models_dir, **DEMO) as daemon:
        yield daemon


@pytest.mark.model
def test_a_real_stream_joins_to_the_answer(real: Daemon) -> None:
    with Requester(real.port) as asker:
        prompt = "Count from one to twenty in words."
        asker.request({"prompt": prompt, "id": "s", "stream": "delta", "max_tokens": 60})
        result = asker.outcome("s", 60)
        assert result["text"].strip()
        assert joined(asker, "s") == result["text"]
        assert result["provider"]


@pytest.mark.model
def test_who_asks_with_the_same_instructions_is_told_what_the_cache_saved(
    tmp_path: Path, models_dir: Path
) -> None:
    rules = {"role": "system", "content": "You keep a farm. " + "It has a lamp and a gate. " * 16}
    with (
        serving(tmp_path, models_dir=models_dir, health__interval_s="0.3", **DEMO) as daemon,
        Requester(daemon.port) as asker,
    ):
        asker.listen(f"{BASE}/dut/out/health")
        usages = []
        for number, question in enumerate(("Is it day?", "Why?")):
            turns = [rules, {"role": "user", "content": question}]
            asker.request({"messages": turns, "id": f"k{number}", "max_tokens": 4})
            usages.append(asker.outcome(f"k{number}", 60)["usage"])
        saved = usages[1]["cached_tokens"]
        assert (usages[0]["cached_tokens"], saved) == (0, 128)
        health = asker.wait(lambda h: "health" in h.topic and h.json["jobs_ok_total"] == 2).json
        assert health["tokens_cached_total"] == saved
        assert health["tokens_in_total"] == sum(usage["prompt_tokens"] for usage in usages)


@pytest.mark.model
def test_a_real_answer_is_the_json_that_the_readmes_request_asks_for(real: Daemon) -> None:
    example = (ROOT / "README.md").read_text().partition("<!-- schema example")[2]
    request = json.loads(example.partition("```json\n")[2].partition("```")[0])
    schema = request["response_format"]["json_schema"]["schema"]
    with Requester(real.port) as asker:
        for n, how in enumerate(({}, *({"temperature": 1.5, "seed": seed} for seed in range(3)))):
            asker.request({**request, **how, "id": f"j{n}", "stream": "delta"})
            result = asker.outcome(f"j{n}", 60)
            assert result["finish"] == "stop"
            assert joined(asker, f"j{n}") == result["text"]
            assert admits(schema, json.loads(result["text"]))
        cut = asker.ask(**{**request, "max_tokens": 5})
        assert (cut["type"], cut["finish"]) == ("result", "length")
        error = asker.ask("x", response_format=held_to({"$ref": "#/$defs/none"}))
        assert (error["code"], error["field"]) == ("bad_request", "response_format")


@pytest.mark.measures
@pytest.mark.model
def test_pings_are_answered_within_100_ms_and_cancels_at_once_in_a_real_prefill(
    real: Daemon,
) -> None:
    engine = real.engine_pid
    with Requester(real.port) as asker:
        prompt = "The quick brown fox jumps over the lazy dog. " * 300
        asker.request({"prompt": prompt, "id": "long", "stream": "delta", "max_tokens": 4})
        asker.wait(lambda h: h.type == "accepted")
        taken = latencies_s(asker, 100)
        assert taken[98] < 0.1, taken[-5:]
        assert asker.outcomes("long") == [], "the prefill is over: a longer prompt is needed"
        began = time.monotonic()
        asker.cancel("long")
        assert asker.outcome("long")["finish"] == "cancelled"
        assert time.monotonic() - began < 0.5
        assert asker.ask("Say hello.", 60, max_tokens=4)["type"] == "result"
    assert real.engine_pid == engine


@pytest.mark.model
def test_a_real_engine_killed_in_mid_answer_is_replaced(real: Daemon) -> None:
    with Requester(real.port) as asker:
        long = {"prompt": "Tell me a very long story.", "id": "story", "max_tokens": 1000}
        asker.request(long | {"stream": "delta"})
        wait_for_deltas(asker, "story", 2)
        os.kill(real.engine_pid, signal.SIGKILL)
        error = asker.outcome("story")
        assert error["code"] == "engine_lost"
        assert error["text"].startswith(joined(asker, "story"))
        assert asker.ask("Say hello.", 60, max_tokens=4)["type"] == "result"
