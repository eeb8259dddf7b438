"""Engines that leak, that die, and that say the same for ever."""

from __future__ import annotations

import os
import signal
import statistics
import time
from pathlib import Path

import pytest

from integration.test_laws import deltas, script, words
from phid import demo
from rig import Daemon, DaemonFactory, until
from wire import BASE, SLOWNESS, Requester

pytestmark = pytest.mark.mosquitto


def health(requester: Requester) -> dict[str, float]:
    now = time.monotonic()
    return dict(requester.wait(lambda h: h.topic.endswith("/health") and h.at > now).json)


def leak(requester: Requester, jobs: int, leak_mb: int = 1) -> None:
    for _ in range(jobs):
        prompt = script(tokens=1, prompt_tokens=9, leak_mb=leak_mb)
        assert requester.ask(prompt, max_tokens=1)["text"] == words(1)


@pytest.fixture
def leaky(start_daemon: DaemonFactory, requester: Requester) -> Daemon:
    daemon = start_daemon(engine__recycle_mb=16, health__interval_s=0.3)
    requester.listen(f"{BASE}/dut/out/#")
    return daemon


def test_an_engine_that_leaks_is_replaced_when_idle_and_no_request_is_lost(
    leaky: Daemon, requester: Requester
) -> None:
    first = leaky.engine_pid
    leak(requester, 50)
    assert leaky.engine_pid == first  # between two requests is not idle
    requester.wait(lambda h: "leaked" in h.json.get("reason", ""), 10, "its replacement")
    for n in range(5):  # there is no engine now
        requester.request({"prompt": f"answer {n}", "id": f"q{n}"})
    for n in range(5):
        assert requester.outcome(f"q{n}")["text"] == f"answer {n}"
        assert len(requester.outcomes(f"q{n}")) == 1
    event = requester.wait(lambda h: h.topic.endswith("/event") and h.json.get("was") == "online")
    assert event.json["state"] == "loading"
    assert "the engine was replaced, for it had leaked" in event.json["reason"]
    assert requester.status("online").get("reason") is None
    assert leaky.engine_pid != first
    (said,) = leaky.logged("engine_recycled", level="warning")
    assert 30 <= said["leaked_mb"] <= 50
    assert leaky.logged("engine_ended") == []
    numbers = health(requester)
    assert (numbers["engine_recycles_total"], numbers["engine_restarts_total"]) == (1, 1)
    assert numbers["jobs_engine_lost_total"] == 0
    assert numbers["model_memory_mb"] >= numbers["engine_rss_mb"] > 0


def test_an_engine_is_not_replaced_while_a_request_waits_or_runs(
    leaky: Daemon, requester: Requester
) -> None:
    first = leaky.engine_pid
    leak(requester, 49)
    prompt = script(tokens=1, prompt_tokens=9, token_ms=3500)
    requester.request({"prompt": prompt, "id": "long", "max_tokens": 1})
    assert requester.outcome("long")["text"] == words(1)
    leak(requester, 3)  # somebody who asks again at once finds it there
    assert leaky.engine_pid == first
    until(lambda: leaky.logged("engine_recycled"), 10)
    assert len(requester.outcomes("long")) == 1


def test_an_engine_that_does_not_leak_is_left_alone(leaky: Daemon, requester: Requester) -> None:
    leak(requester, 60, leak_mb=0)
    time.sleep(3)  # as long as a leak would have had to show
    assert leaky.logged("engine_recycled") == []
    assert health(requester)["engine_recycles_total"] == 0


def test_an_answer_that_repeats_itself_for_ever_is_cut_and_said_to_be(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    start_daemon(health__interval_s=0.3)
    requester.listen(f"{BASE}/dut/out/health")
    tokens = ["Once", *([" upon", " a", " time"] * 500)]
    ever = script(tokens=tokens, token_ms=1, prompt_tokens=1)
    result = requester.ask(ever, max_tokens=1501, stream="delta")
    assert (result["finish"], result["looped"]) == ("length", True)
    assert 256 <= result["usage"]["output_tokens"] <= 300
    assert result["text"].startswith("Once upon a time upon")
    joined = "".join(d.json["text"] for d in deltas(requester, result["id"]))
    assert result["text"].startswith(joined)
    other = requester.ask(script(tokens=600), max_tokens=600)
    assert (other["finish"], "looped" in other) == ("length", False)
    numbers = health(requester)
    assert (numbers["jobs_looped_total"], numbers["jobs_ok_total"]) == (1, 2)


def test_an_answer_may_repeat_itself_where_the_settings_say_so(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    start_daemon(engine__loop_tokens=0)
    result = requester.ask(script(tokens=["ha "] * 1000, prompt_tokens=1), max_tokens=1001)
    assert (result["finish"], result["text"]) == ("stop", "ha " * 1000)


@pytest.fixture
def real(start_daemon: DaemonFactory, models_dir: Path) -> Daemon:
    return start_daemon(
        engine__runtime="genai",
        engine__model=demo.NAME,
        models_dir=models_dir,
        health__interval_s=0.3,
    )


def test_a_model_takes_the_memory_that_its_files_say(real: Daemon, requester: Requester) -> None:
    requester.listen(f"{BASE}/dut/out/info", f"{BASE}/dut/out/health")
    usage = requester.ask("Hello", max_tokens=16)["usage"]
    model = requester.wait(lambda h: "loaded_mb" in (h.json.get("model") or {})).json["model"]
    cache_mb = (usage["prompt_tokens"] + 16) * model["kv_bytes_per_token"] / 2**20
    taken_mb = health(requester)["model_memory_mb"]
    print(f"estimate {model['estimate_mb']} MiB, loaded {model['loaded_mb']} MiB")
    print(f"with a cache of {cache_mb:.0f} MiB at most {taken_mb:.0f} MiB")
    assert taken_mb == pytest.approx(model["estimate_mb"] + cache_mb, rel=0.1)
    assert model["loaded_mb"] <= taken_mb
    assert real.engine_pid


@pytest.mark.measures
@pytest.mark.timeout(300)
def test_after_a_kill_the_next_answer_begins_within_the_loading_time_and_a_second(
    start_daemon: DaemonFactory, requester: Requester, models_dir: object
) -> None:
    daemon = start_daemon(engine__runtime="genai", engine__model=demo.NAME, models_dir=models_dir)
    requester.listen(f"{BASE}/dut/out/info")
    requester.ask("Hello", max_tokens=2)
    over_s, loads_s = [], []
    for n in range(5):
        pid = daemon.engine_pid
        known = len(daemon.logged("model_loaded"))
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        request_id = f"next{n}"
        requester.request({"prompt": "Hello", "id": request_id, "stream": "delta", "max_tokens": 4})
        begun = requester.wait(
            lambda h, i=request_id: h.type == "delta" and h.json["id"] == i, 60, "an answer"
        )
        assert requester.outcome(request_id)["type"] == "result"
        loads_s.append(daemon.logged("model_loaded")[known]["ms"] / 1000)
        over_s.append(begun.at - killed - loads_s[-1])
    print(f"model load {statistics.median(loads_s):.2f} s")
    print(f"kill -9 to first delta, beyond the load: {', '.join(f'{s:.2f}' for s in over_s)} s")
    assert statistics.median(over_s) <= 1.0 * SLOWNESS
