"""Several models on one device, as its requesters and operators see them."""

from __future__ import annotations

import base64
import signal
import time
from pathlib import Path

import pytest

from rig import ROOT, DaemonFactory, Mosquitto, until
from wire import BASE, Requester

pytestmark = pytest.mark.mosquitto

SCENE = ROOT / "tests" / "models" / "scene.jpg"
TINY = ROOT / "tests" / "models" / "tiny-phi3v"
# Holds one of the two small models, and not both.
ONE_AT_A_TIME_MB = 500


@pytest.fixture
def watcher(requester: Requester) -> Requester:
    requester.listen(f"{BASE}/dut/out/status", f"{BASE}/dut/out/event", f"{BASE}/dut/out/info")
    return requester


def models_told(watcher: Requester) -> list[tuple[str, str]]:
    """What out/event has said of models."""
    return [(h.json["model"], h.json["state"]) for h in watcher.heard if h.type == "model"]


def test_a_request_names_another_model_which_is_loaded_for_it(
    start_daemon: DaemonFactory, watcher: Requester
) -> None:
    start_daemon(engine__model="a", engine__models='["b?load_ms=300"]')
    assert watcher.ask("to the default")["model"] == "a"
    assert watcher.ask("to the other", model="b")["model"] == "b"
    assert ("b", "ready") in models_told(watcher)
    # The default is where it was.
    assert watcher.ask("to the default")["model"] == "a"
    error = watcher.ask("to none", model="c")
    assert (error["code"], error["field"]) == ("not_found", "model")


def test_while_a_model_is_loaded_those_for_a_loaded_one_are_answered(
    start_daemon: DaemonFactory, watcher: Requester
) -> None:
    start_daemon(engine__model="a", engine__models='["b?load_ms=1500"]')
    watcher.request({"id": "slow", "prompt": "x", "model": "b"})
    for n in range(3):
        assert watcher.ask("x", id=f"quick{n}")["model"] == "a"
    assert not watcher.outcomes("slow")
    assert watcher.outcome("slow")["model"] == "b"


def test_a_model_that_cannot_be_loaded_takes_only_its_own_requests_with_it(
    start_daemon: DaemonFactory, watcher: Requester
) -> None:
    start_daemon(engine__model="a", engine__models='["b?load_fail"]')
    error = watcher.ask("x", model="b")
    assert (error["code"], error["status"]) == ("loading", 503)
    assert watcher.ask("x")["model"] == "a"
    assert watcher.ctl("ping")["data"]["state"] == "online"


@pytest.mark.model
def test_text_and_frames_have_each_a_model_of_their_own_in_turn_where_memory_holds_one(
    start_daemon: DaemonFactory, watcher: Requester, models_dir: Path
) -> None:
    start_daemon(
        engine__runtime="genai",
        engine__model=str(models_dir / "smollm2-135m-instruct"),
        engine__frame_model=str(TINY),
        engine__budget_mb=ONE_AT_A_TIME_MB,
    )
    picture = base64.b64encode(SCENE.read_bytes()).decode()
    frame = f"{BASE}/dut/in/frame/{watcher.name}"
    for n in range(2):
        text = watcher.ask("Name a colour.", 60, id=f"t{n}", max_tokens=4)
        assert text["model"] == "smollm2-135m-instruct"
        question = {"id": f"f{n}", "prompt": "Describe the scene.", "images": [{"b64": picture}]}
        watcher.publish(frame, question, reply_to=watcher.rx)
        seen = watcher.outcome(f"f{n}", 60)
        assert seen["model"] == "tiny-phi3v"
        assert "triangle" in seen["text"]
    assert models_told(watcher).count(("smollm2-135m-instruct", "unloaded")) == 2
    info = [h.json for h in watcher.heard if h.topic.endswith("out/info")][-1]
    assert info["loaded"] == ["tiny-phi3v"]
    assert info["capabilities"] == ["text", "frame", "session"]


@pytest.mark.model
def test_text_and_frames_are_side_by_side_where_memory_holds_both(
    start_daemon: DaemonFactory, watcher: Requester, models_dir: Path
) -> None:
    start_daemon(
        engine__runtime="genai",
        engine__model=str(models_dir / "smollm2-135m-instruct"),
        engine__frame_model=str(TINY),
    )
    watcher.wait(lambda h: h.type == "model" and h.json["state"] == "ready", 60)
    until(lambda: ("tiny-phi3v", "ready") in models_told(watcher), 60)
    assert watcher.ask("Name a colour.", 60, max_tokens=4)["model"] == "smollm2-135m-instruct"
    assert ("smollm2-135m-instruct", "unloaded") not in models_told(watcher)


def test_no_request_is_lost_in_a_switch(start_daemon: DaemonFactory, watcher: Requester) -> None:
    start_daemon(engine__model="a", engine__models='["b?load_ms=500"]', limits__per_client="64")
    script = '@script {"tokens": 5, "token_ms": 10}'
    ids: list[str] = []

    def ask() -> None:
        ids.append(f"r{len(ids)}")
        watcher.request({"id": ids[-1], "prompt": script, "stream": "delta"})
        time.sleep(0.03)  # the requests come over the time of the switch

    for _ in range(10):
        ask()
    answer = watcher.ctl("model", action="switch", name="b")
    assert answer["ok"], answer
    while ("b", "ready") not in models_told(watcher):
        ask()
    for _ in range(10):
        ask()
    outcomes = [watcher.outcome(one) for one in ids]
    assert {o["type"] for o in outcomes} == {"result"}
    assert {o["text"] for o in outcomes} == {"t1 t2 t3 t4 t5 "}
    answered_by = [o["model"] for o in outcomes]
    assert (answered_by[0], answered_by[-1]) == ("a", "b")
    assert answered_by == sorted(answered_by)
    assert all(len(watcher.outcomes(one)) == 1 for one in ids)
    until(lambda: ("a", "unloaded") in models_told(watcher), what="the old one's end")


def test_what_waits_for_a_model_survives_the_service(
    start_daemon: DaemonFactory, watcher: Requester
) -> None:
    settings = {"engine__model": "a", "engine__models": '["b?load_ms=60000"]'}
    daemon = start_daemon(**settings)
    watcher.request({"id": "r", "prompt": "x", "model": "b"})
    until(lambda: daemon.logged("engine_started", model="b"), what="the loading of b")
    daemon.signal(signal.SIGKILL)
    until(lambda: daemon.has_ended)
    start_daemon(**settings | {"engine__models": '["b"]'})
    assert watcher.outcome("r")["model"] == "b"


def test_one_whose_model_is_gone_after_a_restart_is_told(
    start_daemon: DaemonFactory, watcher: Requester
) -> None:
    daemon = start_daemon(engine__model="a", engine__models='["b?load_ms=60000"]')
    watcher.request({"id": "r", "prompt": "x", "model": "b"})
    until(lambda: daemon.logged("engine_started", model="b"), what="the loading of b")
    daemon.signal(signal.SIGKILL)
    until(lambda: daemon.has_ended)
    start_daemon(engine__model="a")
    assert watcher.outcome("r")["code"] == "not_found"


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        ({"action": "load", "name": "../../etc"}, "not_found", "phid models"),
        ({"action": "load", "name": "/etc"}, "not_found", "phid models"),
        ({"action": "lode", "name": "a"}, "bad_request", "switch"),
        ({"action": "load"}, "bad_request", "name"),
        ({"name": "a"}, "bad_request", "action"),
        ({"action": "load", "name": "a", "url": "http://x/"}, "bad_request", "unknown field"),
    ],
)
def test_a_command_that_makes_no_sense_is_told_why(
    mosquitto: Mosquitto,
    start_daemon: DaemonFactory,
    watcher: Requester,
    command: dict[str, str],
    code: str,
    says: str,
) -> None:
    start_daemon(engine__model="a")
    answer = watcher.ctl("model", **command)
    assert not answer["ok"]
    assert answer["error"]["code"] == code
    assert says in answer["error"]["message"]
    assert watcher.ask("still here?")["type"] == "result"
