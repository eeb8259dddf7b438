"""Start, stop, reload, and what a device says of itself on the way."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from phid.health import KEYS
from rig import ROOT, Daemon, DaemonFactory, Mosquitto, child_pids, serving, until
from wire import BASE, PATIENCE, Heard, Requester

pytestmark = pytest.mark.mosquitto

STATUS = f"{BASE}/dut/out/status"
INFO = f"{BASE}/dut/out/info"
HEALTH = f"{BASE}/dut/out/health"
EVENT = f"{BASE}/dut/out/event"
TINY = ROOT / "tests" / "models" / "tiny-phi3v"
LONG = '@script {"tokens": 4000, "token_ms": 20}'


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """For what leaves the daemon as it was."""
    with serving(tmp_path_factory.mktemp("lifecycle"), health__discover_spread_s=0.1) as daemon:
        yield daemon


@pytest.fixture
def asker(daemon: Daemon) -> Iterator[Requester]:
    with Requester(daemon.port) as client:
        client.listen(STATUS)
        yield client


@pytest.fixture
def watcher(mosquitto: Mosquitto) -> Iterator[Requester]:
    with Requester(mosquitto.port) as client:
        client.listen(STATUS, INFO)
        yield client


def start_long(asker: Requester, request_id: str = "long", **fields: Any) -> None:
    """Have the engine busy for a minute; returns in mid-answer."""
    request = {"prompt": LONG, "id": request_id, "max_tokens": 4000, "stream": "delta"}
    asker.request(request | fields)
    asker.wait(lambda h: h.type == "delta" and h.json["id"] == request_id, 20, "a first delta")


def heard_on(client: Requester, topic: str) -> list[Heard]:
    return [h for h in client.heard if h.topic == topic]


def gone(pid: int) -> Callable[[], bool]:
    """Whether a process has ended, be it that nobody has taken note of it."""

    def fact() -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    return fact


# Starting.


def test_it_starts_without_a_broker_and_connects_when_one_appears(
    start_daemon: DaemonFactory, mosquitto: Mosquitto
) -> None:
    mosquitto.stop()
    daemon = start_daemon(wait=False)
    assert daemon.process is not None
    until(lambda: daemon.logged("broker_away"))
    assert daemon.process.poll() is None
    mosquitto.start()
    with Requester(mosquitto.port) as asker:
        asker.listen(STATUS)
        asker.status("online")
        assert asker.ask("at last")["text"] == "at last"


def test_it_ends_without_a_broker_too(start_daemon: DaemonFactory, mosquitto: Mosquitto) -> None:
    mosquitto.stop()
    daemon = start_daemon(wait=False)
    until(lambda: daemon.logged("broker_away"))
    assert daemon.stop(timeout=10) == 0


def bring(models_dir: Path, name: str) -> None:
    """`phid models import`, as somebody else's process does it."""
    subprocess.run(
        [sys.executable, "-m", "phid", "models", "import", str(TINY), "--name", name],
        env=os.environ | {"PYTHONPATH": str(ROOT / "daemon"), "PHID_MODELS_DIR": str(models_dir)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )


def copied_slowly(folder: Path) -> Iterator[None]:
    """A model, put there as `cp -r` does it; stops in the middle of its two largest files."""
    folder.mkdir(parents=True)
    for file in sorted(TINY.iterdir(), key=lambda path: path.stat().st_size):
        content = file.read_bytes()
        with (folder / file.name).open("wb", buffering=0) as copy:
            if len(content) > 1_800_000:
                copy.write(content[: len(content) // 2])
                yield
                content = content[len(content) // 2 :]
            copy.write(content)


def started(daemon: Daemon) -> int:
    """How many processes there have been for a model."""
    return len(daemon.logged("engine_started")) + len(daemon.logged("prover_started"))


# So soon an engine that cannot load would be started again, and so often the numbers are told.
EAGER = {"providers": "cpu", "engine__restart_max_s": 0.1, "health__interval_s": 1}


def let_it_look(watcher: Requester) -> None:
    """Until the numbers were told three times: it has looked for what is missing meanwhile."""
    heard = len([h for h in watcher.heard if h.topic == HEALTH])
    until(lambda: len([h for h in watcher.heard if h.topic == HEALTH]) >= heard + 3, what="numbers")


def test_without_a_model_it_is_degraded_and_says_what_to_do(
    start_daemon: DaemonFactory, watcher: Requester
) -> None:
    start_daemon(wait=False, engine__runtime="genai")
    status = watcher.status("degraded")
    assert "phid models pull NAME" in status["reason"]
    error = watcher.ask("anyone?")
    assert (error["code"], error["status"]) == ("not_found", 404)
    assert "phid models pull NAME" in error["message"]
    assert watcher.ctl("ping")["data"]["state"] == "degraded"


@pytest.mark.parametrize("named", ["", "eyes"])
def test_a_model_that_is_not_there_is_not_loading_and_is_run_when_it_comes(
    start_daemon: DaemonFactory, watcher: Requester, tmp_path: Path, named: str
) -> None:
    daemon = start_daemon(wait=False, engine__runtime="genai", engine__model=named, **EAGER)
    watcher.listen(HEALTH)
    status = watcher.status("degraded")
    if named:
        assert "not_found: there is no model eyes in " in status["reason"]
        assert len(daemon.logged("model_not_found", model="eyes")) == 1
    let_it_look(watcher)
    for n in range(2):
        error = watcher.ask("anyone?", id=f"early{n}")
        assert (error["code"], error["status"]) == ("not_found", 404)
        assert "retry_after_ms" not in error
    assert started(daemon) == 0
    assert len(daemon.logged("model_not_found")) == int(bool(named))
    bring(tmp_path / "models", "eyes")
    watcher.status("online", 60)
    assert watcher.ask("Say hello.", 60, max_tokens=4)["model"] == "eyes"
    assert started(daemon) == 1


@pytest.mark.parametrize("named", ["", "eyes"])
def test_a_model_that_is_copied_slowly_is_run_once_and_when_it_is_whole(
    start_daemon: DaemonFactory, watcher: Requester, tmp_path: Path, named: str
) -> None:
    daemon = start_daemon(wait=False, engine__runtime="genai", engine__model=named, **EAGER)
    watcher.listen(HEALTH)
    watcher.status("degraded")
    for _ in copied_slowly(tmp_path / "models" / "eyes"):
        let_it_look(watcher)
        assert watcher.ask("anyone?")["code"] == "not_found"
        assert started(daemon) == 0
    if named:
        reason = f"not_found: eyes is still being copied to {tmp_path / 'models'}"
        watcher.wait(lambda h: h.topic == STATUS and h.json["reason"] == reason)
    watcher.status("online", 60)
    assert watcher.ask("Say hello.", 60, max_tokens=4)["model"] == "eyes"
    assert started(daemon) == 1
    assert not daemon.logged("engine_load_failed")


def test_a_model_that_is_half_copied_when_the_daemon_starts_is_run_when_it_is_whole(
    start_daemon: DaemonFactory, watcher: Requester, tmp_path: Path
) -> None:
    copying = copied_slowly(tmp_path / "models" / "eyes")
    next(copying)
    # So long that an engine which is started again and again is not what helps.
    slow = EAGER | {"engine__restart_max_s": 600}
    daemon = start_daemon(wait=False, engine__runtime="genai", engine__model="eyes", **slow)
    until(lambda: daemon.logged("engine_load_failed"), what="a failure")
    next(copying)
    until(lambda: daemon.logged("model_not_found"), what="another, of other files")
    assert list(copying) == []
    until(lambda: daemon.logged("model_found"), 60, "all of it")
    watcher.status("online", 60)
    assert watcher.ask("Say hello.", 60, max_tokens=4)["model"] == "eyes"


def test_a_model_that_a_power_cut_left_moved_aside_is_found_at_the_start(
    start_daemon: DaemonFactory, watcher: Requester, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    bring(models, "eyes")
    (models / "eyes").rename(models / ".eyes.old")
    start_daemon(engine__runtime="genai", engine__model="eyes", **EAGER)
    assert watcher.ask("Say hello.", 60, max_tokens=4)["model"] == "eyes"


def test_a_model_that_is_not_there_takes_only_its_own_requests_with_it(
    start_daemon: DaemonFactory, watcher: Requester, tmp_path: Path
) -> None:
    bring(tmp_path / "models", "eyes")
    daemon = start_daemon(
        engine__runtime="genai", engine__model="eyes", engine__models='["away"]', **EAGER
    )
    for n in range(2):
        error = watcher.ask("anyone?", id=f"away{n}", model="away")
        assert (error["code"], error["field"]) == ("not_found", "model")
    assert watcher.ctl("ping")["data"]["state"] == "online"
    assert watcher.ask("x", max_tokens=4)["model"] == "eyes"
    bring(tmp_path / "models", "away")
    assert watcher.ask("x", 60, id="there", model="away", max_tokens=4)["model"] == "away"
    assert started(daemon) == 2


def test_a_model_that_is_removed_is_missed_when_its_engine_ends_and_comes_back(
    start_daemon: DaemonFactory, watcher: Requester, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    bring(models, "eyes")
    daemon = start_daemon(engine__runtime="genai", engine__model="eyes", **EAGER)
    watcher.listen(HEALTH)
    (models / "eyes").rename(models / ".gone")
    assert watcher.ask("It is in memory.", max_tokens=4)["type"] == "result"
    os.kill(daemon.engine_pid, signal.SIGKILL)
    until(lambda: daemon.logged("model_not_found"), what="the loss")
    until(lambda: not child_pids(daemon.process.pid), what="the end of its engine")  # type: ignore[union-attr]
    assert watcher.ask("anyone?")["code"] == "not_found"
    tried = started(daemon)
    assert tried == 2
    let_it_look(watcher)
    assert started(daemon) == tried
    (models / ".gone").rename(models / "eyes")
    until(lambda: watcher.ask("again?", 60, max_tokens=4)["type"] == "result", 60, "its return")


def test_an_engine_that_dies_while_it_loads_is_degraded_and_not_waited_for(
    start_daemon: DaemonFactory, watcher: Requester
) -> None:
    daemon = start_daemon(wait=False, engine__model="x?load_crash", engine__restart_max_s=0.1)
    watcher.status("degraded")
    until(lambda: len(daemon.logged("engine_ended")) >= 4)
    error = watcher.ask("anyone?")
    assert error["code"] == "loading"
    assert error["retry_after_ms"] > 0


# Status, will, info, health.


def test_status_and_info_are_retained_and_the_status_expires(daemon: Daemon) -> None:
    with Requester(daemon.port) as late:
        late.listen(STATUS, INFO)
        status = late.wait(lambda h: h.topic == STATUS)
        info = late.wait(lambda h: h.topic == INFO)
    assert status.retain
    assert info.retain
    assert status.expiry_s is not None
    assert 0 < status.expiry_s <= 90
    assert info.expiry_s is None
    assert status.json["v"] == 1
    assert status.json["state"] == "online"
    assert {"session", "since", "ts", "queue", "model", "provider", "version"} <= status.json.keys()
    told = info.json
    assert told["model"]["context"] > 0
    assert told["models"] == ["scripted"]
    assert told["limits"]["backlog"] == 64
    assert told["capabilities"] == ["text", "session"]


def test_the_status_is_refreshed_before_it_expires(
    start_daemon: DaemonFactory, watcher: Requester
) -> None:
    start_daemon(health__heartbeat_s=0.5)
    first = watcher.status("online")
    watcher.wait(lambda h: h.topic == STATUS and h.json["ts"] > first["ts"] + 1, 10)
    assert {h.expiry_s for h in heard_on(watcher, STATUS) if h.expiry_s} <= {1, 2}
    assert {h.json["since"] for h in heard_on(watcher, STATUS)[-2:]} == {first["since"]}


def test_a_killed_daemon_is_offline_by_its_own_session_and_back_by_another(
    start_daemon: DaemonFactory, watcher: Requester
) -> None:
    daemon = start_daemon()
    online = watcher.status("online")
    engine = daemon.engine_pid
    daemon.stop(signal.SIGKILL)
    offline = watcher.status("offline")
    assert offline["session"] == online["session"]
    assert offline["reason"] == "lwt"
    with Requester(daemon.port) as late:
        late.listen(STATUS)
        kept = late.wait(lambda h: h.topic == STATUS)
    assert kept.retain
    assert kept.json["state"] == "offline"
    assert kept.expiry_s is None
    until(gone(engine), 5, "the engine's end")
    daemon.start()
    assert watcher.status("online")["session"] != online["session"]
    assert watcher.ask("again")["text"] == "again"


def test_no_engine_outlives_its_service_even_in_a_native_call(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    daemon = start_daemon()
    engine = daemon.engine_pid
    requester.request({"prompt": '@script {"hang_at": 0}', "id": "hangs", "stream": "delta"})
    requester.wait(lambda h: h.type == "accepted")
    daemon.stop(signal.SIGKILL)
    until(gone(engine), 5, "the engine's end")


def test_health_is_a_flat_object_of_known_numbers(
    start_daemon: DaemonFactory, watcher: Requester
) -> None:
    start_daemon(health__interval_s=0.2)
    watcher.listen(HEALTH)
    watcher.ask("one two three")
    watcher.ask("x", priority=99)
    heard = watcher.wait(
        lambda h: h.topic == HEALTH and h.json["jobs_ok_total"] and h.json["jobs_refused_total"]
    )
    numbers = heard.json
    assert heard.qos == 0
    assert not heard.retain
    known = {key.replace("<provider>", "cpu") for key in KEYS}
    assert numbers.keys() <= known
    assert {type(value) for value in numbers.values()} <= {int, float}
    sensors = {"temp_c", "throttled"}
    assert known - numbers.keys() <= sensors, "only sensors may be absent"
    assert numbers["placement_pct_cpu"] == 100
    assert numbers["up"] == numbers["connected"] == numbers["model_loaded"] == 1
    assert numbers["jobs_ok_total"] == 1
    assert numbers["tokens_out_total"] == 3
    assert numbers["service_rss_mb"] > 10
    assert numbers["engine_rss_mb"] > 5


# Stopping.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_stop_says_offline_and_ends_with_0(
    start_daemon: DaemonFactory, watcher: Requester, number: int
) -> None:
    daemon = start_daemon()
    online = watcher.status("online")
    engine = daemon.engine_pid
    assert daemon.stop(number, timeout=10) == 0
    offline = watcher.status("offline")
    assert (offline["reason"], offline["session"]) == ("stopped", online["session"])
    assert [
        h.json["reason"] for h in heard_on(watcher, STATUS) if h.json["state"] == "offline"
    ] == ["stopped"], "the will says nothing more"
    assert gone(engine)()


def test_a_stop_in_mid_answer_lets_it_and_what_waits_end(
    start_daemon: DaemonFactory, watcher: Requester
) -> None:
    daemon = start_daemon()
    prompt = '@script {"tokens": 40, "token_ms": 25}'
    watcher.request({"prompt": prompt, "id": "running", "stream": "delta"})
    watcher.request({"prompt": "waits", "id": "waiting"})
    watcher.wait(lambda h: h.type == "delta")
    daemon.signal(signal.SIGTERM)
    watcher.status("draining")
    assert watcher.ask("too late")["code"] == "draining"
    assert daemon.stop(0) == 0
    assert watcher.outcome("running")["text"] == "".join(f"t{n} " for n in range(1, 41))
    assert watcher.outcome("waiting")["text"] == "waits"
    watcher.status("offline")
    kinds = [h.topic for h in watcher.heard if h.topic == STATUS or h.type == "result"]
    assert kinds[-1] == STATUS, "offline comes last"


@pytest.mark.parametrize("verbs", [("pause",), ("pause", "drain"), ("drain",)])
def test_a_stop_lets_what_was_held_back_go_on(
    start_daemon: DaemonFactory, watcher: Requester, verbs: tuple[str, ...]
) -> None:
    daemon = start_daemon(journal__enabled="false")
    with daemon.engine_held():
        watcher.request({"prompt": "runs", "id": "runs"})
        watcher.request({"prompt": "held", "id": "held"})
        for verb in verbs:
            assert watcher.ctl(verb)["ok"]
    assert watcher.outcome("runs")["text"] == "runs"
    daemon.signal(signal.SIGTERM)
    assert watcher.outcome("held")["text"] == "held"
    assert daemon.stop(timeout=10) == 0


def test_a_stop_that_takes_too_long_ends_with_the_text_so_far(
    start_daemon: DaemonFactory, watcher: Requester
) -> None:
    daemon = start_daemon(limits__drain_s=0.5, journal__enabled="false")
    start_long(watcher)
    watcher.request({"prompt": "waits", "id": "waiting"})
    assert daemon.stop(timeout=10) == 0
    result = watcher.outcome("long")
    assert result["finish"] == "cancelled"
    assert result["text"].startswith("t1 t2 ")
    assert watcher.outcome("waiting")["code"] == "draining"
    assert watcher.status("offline")["reason"] == "stopped"


def test_a_second_signal_ends_the_drain(start_daemon: DaemonFactory, watcher: Requester) -> None:
    daemon = start_daemon(limits__drain_s=60)
    start_long(watcher)
    daemon.signal(signal.SIGTERM)
    watcher.status("draining")
    assert daemon.stop(signal.SIGTERM, timeout=10) == 0
    assert watcher.outcome("long")["finish"] == "cancelled"
    assert watcher.status("offline")["reason"] == "stopped"


def test_a_stop_does_not_wait_for_an_engine_that_hangs(
    start_daemon: DaemonFactory, watcher: Requester
) -> None:
    daemon = start_daemon(limits__drain_s=0.2)
    engine = daemon.engine_pid
    watcher.request({"prompt": '@script {"hang_at": 1}', "id": "hangs", "stream": "delta"})
    watcher.wait(lambda h: h.type == "accepted")
    assert daemon.stop(timeout=10) == 0
    assert watcher.outcome("hangs")
    assert gone(engine)()


# Reloading.


@pytest.mark.parametrize("way", ["signal", "command"])
def test_a_reload_takes_over_limits_and_log_level_and_keeps_the_old_ones_from_a_bad_file(
    start_daemon: DaemonFactory, watcher: Requester, way: str
) -> None:
    daemon = start_daemon()
    watcher.status("online")

    def reload() -> None:
        if way == "signal":
            daemon.signal(signal.SIGHUP)
        else:
            watcher.ctl("reload")

    daemon.config.write_text("[limits]\nmax_tokens = 7\n[log]\nlevel = 'warning'\n")
    reload()
    watcher.wait(lambda h: h.topic == INFO and h.json["limits"]["max_tokens"] == 7, 10)
    assert watcher.ask("x", max_tokens=8)["field"] == "max_tokens"
    assert watcher.ask("quiet", max_tokens=7, id="quiet")["text"] == "quiet"
    mistakes = ("[limits]\nmax_tokens = 'many'\n", "[limits]\nmax_token = 9\n", "not TOML")
    for count, bad in enumerate(mistakes, 1):
        daemon.config.write_text(bad)
        reload()
        if way == "signal":
            until(lambda n=count: len(daemon.logged("reload_failed")) == n)
        assert watcher.ask("x", max_tokens=8)["field"] == "max_tokens"
    daemon.config.write_text("[limits]\nmax_tokens = 9\n")
    reload()
    watcher.wait(lambda h: h.topic == INFO and h.json["limits"]["max_tokens"] == 9, 10)
    assert watcher.ask("loud", max_tokens=8, id="loud")["text"] == "loud"
    until(lambda: daemon.logged("job_ended", id="loud"))
    assert daemon.logged("job_ended", id="quiet") == []


def test_a_reload_says_what_changed_and_what_needs_a_restart(
    start_daemon: DaemonFactory, watcher: Requester
) -> None:
    daemon = start_daemon()
    daemon.config.write_text("[limits]\nbacklog = 9\n[mqtt]\nkeepalive_s = 11\n")
    data = watcher.ctl("reload")["data"]
    assert set(data["changed"]) == {"limits.backlog", "mqtt.keepalive_s"}
    assert data["restart_needed"] == ["mqtt.keepalive_s"]
    daemon.config.write_text("[limits]\nbacklock = 9\n")
    answer = watcher.ctl("reload")
    assert not answer["ok"]
    assert "limits.backlog" in answer["error"]["message"]


# Commands.


def test_ping_says_state_and_uptime(asker: Requester) -> None:
    answer = asker.ctl("ping")
    assert answer["ok"]
    assert answer["verb"] == "ping"
    assert answer["data"]["state"] == "online"
    assert answer["data"]["uptime_s"] >= 0


def test_pause_holds_what_waits_and_resume_lets_it_go(asker: Requester) -> None:
    start_long(asker)
    asker.request({"prompt": "held", "id": "held"})
    assert asker.ctl("pause")["data"]["state"] == "paused"
    asker.status("paused")
    asker.cancel("long")
    assert asker.outcome("long")["finish"] == "cancelled"  # the running one goes on to its end
    asker.ctl("ping")
    assert asker.outcomes("held") == []
    assert asker.ctl("resume")["data"]["state"] == "online"
    assert asker.outcome("held")["text"] == "held"
    asker.status("online")


def test_drain_finishes_what_it_has_and_resume_opens_again(asker: Requester) -> None:
    start_long(asker, "drained")
    asker.request({"prompt": "waits", "id": "waits"})
    assert asker.ctl("drain")["data"]["state"] == "draining"
    asker.status("draining")
    asker.cancel("drained")
    assert asker.outcome("waits")["text"] == "waits"
    assert asker.ctl("resume")["ok"]
    assert asker.ask("open")["text"] == "open"


@pytest.mark.parametrize("broadcast", [False, True])
def test_a_discover_has_everything_told_again(asker: Requester, broadcast: bool) -> None:
    asker.listen(INFO, HEALTH)
    asker.wait(lambda h: h.topic == INFO)
    before = len(asker.heard)
    if broadcast:
        topic = f"{BASE}/all/in/ctl/discover"
        asker.publish(topic, b"", reply_to=asker.rx, correlation=b"all")
    else:
        assert asker.ctl("discover")["ok"]
    for topic in (STATUS, INFO, HEALTH):
        asker.wait(lambda h, t=topic: h.topic == t and h in asker.heard[before:], 10)
    assert [h for h in asker.heard if h.correlation == b"all"] == [], "nobody answers a broadcast"


def test_the_log_level_changes_for_a_while(daemon: Daemon, asker: Requester) -> None:
    assert asker.ctl("log", level="error", for_s=1)["data"] == {"level": "error"}
    asker.ask("silent", id="silent")

    def logged_again() -> bool:
        request_id = f"n{time.monotonic_ns()}"
        asker.ask("x", id=request_id)
        return bool(daemon.logged("job_ended", id=request_id))

    until(logged_again, 10)
    assert daemon.logged("job_ended", id="silent") == []


def test_an_engine_is_restarted_on_command(start_daemon: DaemonFactory, watcher: Requester) -> None:
    daemon = start_daemon()
    engine = daemon.engine_pid
    assert watcher.ctl("restart", what="engine")["ok"]
    reason = watcher.status("degraded")["reason"]
    assert reason == "engine_lost: the engine was restarted by a command", "no crash is told"
    watcher.status("online")
    assert daemon.engine_pid != engine
    assert watcher.ask("anew")["text"] == "anew"


def test_the_service_is_restarted_on_command_after_what_it_has(
    start_daemon: DaemonFactory, watcher: Requester
) -> None:
    daemon = start_daemon()
    assert daemon.process is not None
    session, engine = watcher.status("online")["session"], daemon.engine_pid
    watcher.request({"prompt": '@script {"tokens": 20, "token_ms": 20}', "id": "before"})
    assert watcher.ctl("restart", what="service")["ok"]
    assert watcher.outcome("before")["finish"] == "stop"
    watcher.wait(lambda h: h.topic == STATUS and h.json["state"] == "offline")
    watcher.wait(
        lambda h: h.topic == STATUS and h.json["state"] == "online" and h.json["session"] != session
    )
    assert daemon.process.poll() is None, "the same process goes on"
    assert gone(engine)()
    assert watcher.ask("anew")["text"] == "anew"
    assert len(child_pids(daemon.process.pid)) == 1


# Order, deadlines, cancels.


def test_a_deadline_that_passes_in_the_queue_is_an_error(asker: Requester) -> None:
    start_long(asker)
    asker.request({"prompt": "x", "id": "queued", "deadline_ms": 150})
    error = asker.outcome("queued")
    assert (error["code"], error["status"]) == ("expired", 504)
    asker.cancel("long")
    assert asker.ask("next")["text"] == "next"
    assert len(asker.outcomes("queued")) == 1


@pytest.mark.parametrize(
    "prompt",
    [LONG, '@script {"prompt_tokens": 2000, "prefill_ms": 4000}'],
    ids=["answer", "prefill"],
)
def test_a_deadline_that_passes_in_the_run_is_a_result_with_the_text_so_far(
    asker: Requester, prompt: str
) -> None:
    asker.request({"prompt": prompt, "id": (i := f"d{len(prompt)}"), "deadline_ms": 400})
    result = asker.outcome(i)
    assert result["type"] == "result", result
    assert result["finish"] == "deadline"
    assert "".join(f"t{n} " for n in range(1, 40)).startswith(result["text"][:20])
    assert asker.ask("next")["text"] == "next"


def test_a_deadline_holds_for_an_engine_that_hangs_too(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    start_daemon()
    hang = '@script {"tokens": 9, "token_ms": 60, "hang_at": 4}'
    requester.request({"prompt": hang, "id": "hangs", "deadline_ms": 1500})
    result = requester.outcome("hangs", 10)
    assert (result["finish"], result["text"]) == ("deadline", "t1 t2 t3 ")


def test_a_cancel_in_the_queue_is_an_error_and_costs_no_run(
    daemon: Daemon, asker: Requester
) -> None:
    start_long(asker)
    asker.request({"prompt": "x", "id": "queued"})
    asker.cancel("queued")
    error = asker.outcome("queued")
    assert (error["code"], error["status"]) == ("cancelled", 499)
    asker.cancel("nobody-has-this")
    asker.cancel("long")
    assert asker.ask("next")["text"] == "next"
    assert len(asker.outcomes("queued")) == 1


def test_what_is_urgent_goes_first_and_then_what_is_old(asker: Requester) -> None:
    start_long(asker)
    for request_id, priority in [("p5a", 5), ("p0", 0), ("p9", 9), ("p5b", 5), ("p7", 7)]:
        asker.request({"prompt": "x", "id": request_id, "priority": priority})
    asker.ctl("ping")
    asker.cancel("long")
    asker.outcome("p0")
    ended = [h.json["id"] for h in asker.heard if h.type == "result"]
    assert ended == ["long", "p9", "p7", "p5a", "p5b", "p0"]


def test_what_is_accepted_is_told_its_place(asker: Requester) -> None:
    start_long(asker)
    for n in range(3):
        asker.request({"prompt": "x", "id": f"place{n}", "stream": "delta"})
    places = [
        asker.wait(lambda h, n=n: h.type == "accepted" and h.json["id"] == f"place{n}").json
        for n in range(3)
    ]
    asker.cancel("long")
    assert [place["queue_pos"] for place in places] == [1, 2, 3]
    asker.outcome("place2")


def test_a_finished_job_is_one_line_on_the_event_topic(asker: Requester) -> None:
    asker.listen(EVENT)
    asker.ask("one two", id="event", tags={"line": 3, "plant": "Ω"})
    event = asker.wait(lambda h: h.topic == EVENT and h.json.get("id") == "event", 10).json
    assert event["outcome"] == "stop"
    assert event["client"] == asker.name
    assert event["output_tokens"] == 2
    assert event["tags"] == {"line": 3, "plant": "Ω"}


# systemd.


@pytest.mark.measures
def test_systemd_is_told_ready_alive_and_stopping(
    start_daemon: DaemonFactory,
    watcher: Requester,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(20 * PATIENCE)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "2000000")
        daemon = start_daemon(wait=False)

        def told(word: str) -> float:
            while word not in notified.recv(4096).decode().splitlines():
                pass
            return time.monotonic()

        told("READY=1")
        assert daemon.process is not None
        watcher.status("online")
        watcher.request({"prompt": '@script {"hang_at": 0}', "id": "hangs"})
        while select.select([notified], [], [], 0)[0]:  # those of before
            notified.recv(4096)
        beats = [told("WATCHDOG=1") for _ in range(3)]
        pauses = [later - sooner for sooner, later in pairwise(beats)]
        assert max(pauses) < 1.9, "a hanging engine must not stop the service's heart"
        assert sum(pauses) > 1.6
        watcher.cancel("hangs")
        daemon.signal(signal.SIGTERM)
        told("STOPPING=1")
    assert daemon.stop(0) == 0


def test_whoever_ends_it_ends_it_whatever_restart_was_asked_for(
    start_daemon: DaemonFactory, watcher: Requester
) -> None:
    """By a signal while it drains for a restart; and by one that a restart comes after."""
    for first in ("restart", "signal"):
        daemon = start_daemon()
        prompt = '@script {"tokens": 40, "token_ms": 25}'
        watcher.request({"prompt": prompt, "id": first, "stream": "delta"})
        until(lambda: any(h.type == "delta" for h in watcher.of(first)), what="a delta")  # noqa: B023
        if first == "restart":
            assert watcher.ctl("restart", what="service")["ok"]
            daemon.signal(signal.SIGTERM)
        else:
            # The daemon before it has left its own words, of this too.
            before = len(daemon.logged("service_stopping"))
            daemon.signal(signal.SIGTERM)
            until(lambda: len(daemon.logged("service_stopping")) > before, what="its end to begin")  # noqa: B023
            refused = watcher.ctl("restart", what="service")
            assert refused["error"]["code"] == "draining"
        assert daemon.process is not None
        assert daemon.process.wait(20) == 0
        assert watcher.outcome(first)["finish"] == "stop"
        daemon.process = None


def test_a_restart_is_no_stop_to_systemd_which_would_end_it(
    start_daemon: DaemonFactory,
    watcher: Requester,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(20 * PATIENCE)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        start_daemon(wait=False)
        assert notified.recv(4096) == b"READY=1"
        watcher.status("online")
        watcher.ctl("restart", what="service")
        words = list(iter(lambda: notified.recv(4096), b"READY=1"))
        assert not any(b"STOPPING=1" in word for word in words)


def test_the_watchdog_of_another_process_is_left_alone(
    start_daemon: DaemonFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(0)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "100000")
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
        daemon = start_daemon()
        daemon.stop()
        words = b""
        try:
            while True:
                words += notified.recv(4096) + b"\n"
        except BlockingIOError:
            pass
    assert b"READY=1" in words
    assert b"STOPPING=1" in words
    assert b"WATCHDOG=1" not in words


def test_a_setting_that_is_none_ends_the_start_with_the_nearest_name(
    start_daemon: DaemonFactory,
) -> None:
    daemon = start_daemon(wait=False, limits__backlock="9")
    assert daemon.process is not None
    assert daemon.process.wait(20 * PATIENCE) == 78
    assert "PHID_LIMITS__BACKLOG" in daemon.log


# Heat.


def may_mount() -> bool:
    """Whether sensors can be put into /sys: that takes root, and a kernel that has such a place."""
    try_it = ("unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/sys/class/thermal")
    try:
        return subprocess.run(try_it, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not may_mount(), reason="sensors cannot be put into /sys here")
def test_a_device_that_is_too_hot_waits_until_it_is_cooler(
    mosquitto: Mosquitto, watcher: Requester, tmp_path: Path
) -> None:
    """In a mount namespace of its own, where /sys has a sensor that we can heat."""
    daemon = Daemon(mosquitto.port, tmp_path, health__pause_above_c=80)
    zone = "/sys/class/thermal/thermal_zone0"
    sensor = f"{zone}/temp"
    command = (
        "if [ -d /sys/class/hwmon ]; then mount -t tmpfs tmpfs /sys/class/hwmon; fi && "
        f"mount -t tmpfs tmpfs /sys/class/thermal && mkdir {zone} && "
        f"echo cpu > {zone}/type && echo 95000 > {sensor} && exec {sys.executable} -m phid run"
    )
    try:
        daemon.start(("unshare", "--mount", "sh", "-c", command))
        assert "too hot" in watcher.status("degraded")["reason"]
        watcher.request({"prompt": "cool enough?", "id": "waits"})
        watcher.ctl("ping")
        assert watcher.outcomes("waits") == []
        assert daemon.process is not None
        Path(f"/proc/{daemon.process.pid}/root{sensor}").write_text("60000\n")
        assert watcher.outcome("waits")["text"] == "cool enough?"
        watcher.status("online")
    finally:
        daemon.close()
