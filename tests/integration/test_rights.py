"""What the device itself allows: verbs, rates, reply topics, cameras; beside each no a yes."""

from __future__ import annotations

import json
import signal
import time
import uuid
from pathlib import Path

import pytest

from flood import rss_kb
from integration.test_frames_wire import SOUND
from phid.control import VERBS
from rig import DaemonFactory, until
from wire import BASE, Requester

pytestmark = pytest.mark.mosquitto

# What each needs to be sound; the two that end something come last.
OPTIONS = {
    "log": {"level": "warning"},
    "watch": {"name": "yard", "topic": "cam/+", "prompt": "What?"},
    "model": {"action": "load", "name": "scripted"},
    "restart": {"what": "engine"},
}


def test_a_verb_that_is_switched_off_is_unauthorized_and_does_nothing(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    allowed = ["ping", "log"]
    daemon = start_daemon(control__allow=json.dumps(allowed))
    requester.listen(f"{BASE}/dut/out/status", f"{BASE}/dut/out/watch/#")
    engine = daemon.engine_pid
    for verb in VERBS:
        answer = requester.ctl(verb, **OPTIONS.get(verb, {}))
        if verb in allowed:
            assert answer["ok"], answer
        else:
            error = answer["error"]
            assert (error["code"], error["status"]) == ("unauthorized", 401)
            assert f"{verb} is switched off: see control.allow" in error["message"]
    assert requester.ctl("nonsense")["error"]["code"] == "not_found"
    assert requester.status("online")
    assert daemon.engine_pid == engine
    assert all("/watch/" not in h.topic for h in requester.heard)
    assert requester.ask("still served")["text"] == "still served"


def test_verbs_are_switched_while_it_runs(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    daemon = start_daemon()
    requester.listen(f"{BASE}/dut/out/status", f"{BASE}/dut/out/info")
    assert requester.ctl("pause")["ok"]
    assert requester.ctl("resume")["ok"]
    daemon.config.write_text('[control]\nallow = ["ping"]\n')
    assert requester.ctl("reload")["data"]["restart_needed"] == []
    for verb in ("pause", "reload"):
        assert requester.ctl(verb)["error"]["code"] == "unauthorized"
    # Nobody can switch it on again over MQTT, but whoever is at the machine can.
    daemon.config.write_text("# nothing\n")
    daemon.signal(signal.SIGHUP)
    until(lambda: requester.ctl("pause")["ok"], 10, "the right to pause")
    assert requester.ctl("resume")["ok"]


def test_a_broadcast_is_no_way_round(start_daemon: DaemonFactory, requester: Requester) -> None:
    daemon = start_daemon(control__allow='["ping", "reload"]', health__discover_spread_s=0)
    requester.listen(f"{BASE}/dut/out/health")
    topic = f"{BASE}/all/in/ctl/discover"
    requester.publish(topic, b"")
    assert requester.ctl("ping")["ok"]  # what came before it is decided
    assert all(not h.topic.endswith("/health") for h in requester.heard)
    daemon.config.write_text("# nothing\n")  # the environment wins, so this changes nothing
    assert requester.ctl("reload")["data"]["changed"] == []
    assert requester.ctl("discover")["error"]["code"] == "unauthorized"


def test_a_verb_that_there_is_not_is_refused_in_the_settings(tmp_path: Path) -> None:
    from phid import settings

    file = tmp_path / "phid.toml"
    file.write_text('[control]\nallow = ["ping", "shutdown"]\n')
    with pytest.raises(settings.SettingsError, match=r"control\.allow"):
        settings.load(file)


# Rates.


def test_a_client_over_its_rate_is_busy_and_another_is_not(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    # At once, and with no disk to wait for: a second later there would be room for one more.
    daemon = start_daemon(
        limits__rate_per_client=60, limits__burst_per_client=3, journal__enabled="false"
    )
    for request_id in ("r0", "r1", "r2", "over"):
        requester.request({"prompt": "x", "id": request_id})
    assert all(requester.outcome(f"r{n}")["type"] == "result" for n in range(3))
    error = requester.outcome("over")
    assert (error["code"], error["status"]) == ("busy", 429)
    assert 0 < error["retry_after_ms"] <= 1000
    # What was taken is answered again, and costs nothing.
    requester.request({"prompt": "x", "id": "r0"})
    assert requester.wait(lambda h: h.json.get("duplicate"), what="the answer again")
    with Requester(daemon.port) as other:
        assert other.ask("y")["type"] == "result"
    time.sleep(error["retry_after_ms"] / 1000)
    assert requester.ask("x", id="later")["type"] == "result"


def test_a_rate_is_taken_over_by_a_reload_and_is_none_by_default(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    daemon = start_daemon()
    assert all(requester.ask("x")["type"] == "result" for _ in range(30))
    daemon.config.write_text("[limits]\nrate_per_client = 1\nburst_per_client = 1\n")
    assert requester.ctl("reload")["ok"]
    assert requester.ask("x")["type"] == "result"
    assert requester.ask("x")["code"] == "busy"


def test_parts_have_the_rate_of_the_requests_that_can_name_them(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    start_daemon(limits__rate_per_client=1, limits__burst_per_client=1, vision__max_images=2)
    for n in range(3):
        requester.publish(f"{BASE}/dut/in/part/{requester.name}/r/{n}", SOUND)
    frame = {"prompt": "what?", "id": "r", "images": [{"part": 0}, {"part": 2}]}
    requester.publish(f"{BASE}/dut/in/frame/{requester.name}", frame, reply_to=requester.rx)
    error = requester.outcome("r")
    assert (error["code"], error["field"]) == ("busy", "part.2")
    assert 0 < error["retry_after_ms"] <= 30_000


def test_parts_that_nobody_asks_for_do_not_keep_requests_out_of_the_journal(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    daemon = start_daemon(journal__max_bytes=4 << 20, vision__parts_s=1)
    for n in range(5):
        topic = f"{BASE}/dut/in/part/{requester.name}/s{n}/0"
        requester.publish(topic, SOUND + bytes(1 << 20))
    frame = {"prompt": "what?", "id": "s4", "images": [{"part": 0}]}
    requester.publish(f"{BASE}/dut/in/frame/{requester.name}", frame, reply_to=requester.rx)
    error = requester.outcome("s4")
    assert (error["code"], error["field"]) == ("busy", "part.0")
    assert "journal is full" in error["message"]
    assert requester.ask("x")["type"] == "result"
    time.sleep(1)  # vision.parts_s

    def shown() -> bool:
        request_id = uuid.uuid4().hex[:8]
        topic = f"{BASE}/dut/in/part/{requester.name}/{request_id}/0"
        requester.publish(topic, SOUND + bytes(1 << 20))
        topic = f"{BASE}/dut/in/frame/{requester.name}"
        requester.publish(topic, frame | {"id": request_id}, reply_to=requester.rx)
        return bool(requester.outcome(request_id)["type"] == "result")

    until(shown, what="room for a part")
    assert not daemon.logged("journal_not_written")


def test_a_flood_over_the_rate_costs_no_memory_and_nobody_else(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    daemon = start_daemon(
        limits__rate_per_client=60, limits__burst_per_client=2, log__level="warning"
    )
    with Requester(daemon.port, name="greedy") as greedy:
        before = 0
        for _ in range(2):
            for _ in range(2000):
                greedy._client.publish(f"{BASE}/dut/in/text/greedy", b'{"prompt": "x"}', 0)
            assert requester.ask("mine", timeout=60)["text"] == "mine"
            before = before or rss_kb(daemon)
        assert rss_kb(daemon) - before < 4000
        assert requester.ctl("ping")["ok"]


# Where answers go, and where pictures come from.


def test_a_reply_topic_elsewhere_is_used_only_where_it_is_allowed(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    start_daemon(mqtt__reply_allow='["house/+/answers"]')
    requester.listen("house/#", "garden/#", f"{BASE}/client/victim/rx", f"{BASE}/dut/out/#")
    requester.request({"prompt": "yes", "id": "yes"}, reply_to="house/kitchen/answers")
    requester.wait(lambda h: h.topic == "house/kitchen/answers" and h.json["text"] == "yes")
    for n, elsewhere in enumerate(
        (
            *("garden/answers", "house/kitchen/answers/x", f"{BASE}/client/victim/rx"),
            *(f"{BASE}/dut/in/ctl/pause", f"{BASE}/dut/out/status", "house/+/answers", "$SYS/x"),
        )
    ):
        payload = {"prompt": "no", "id": f"no{n}", "reply_to": elsewhere}
        requester.publish(f"{BASE}/dut/in/text/{requester.name}", payload)
        error = requester.outcome(f"no{n}")
        assert (error["code"], error["field"]) == ("unauthorized", "reply_to")
        (heard,) = requester.of(f"no{n}")
        assert heard.topic == f"{BASE}/dut/out/res/{requester.name}/no{n}"
    assert requester.ctl("ping")["data"]["state"] == "online"
    assert all(not h.topic.startswith(("garden/", f"{BASE}/client/v")) for h in requester.heard)


def test_a_cameras_topic_is_looked_at_only_where_it_is_allowed(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    start_daemon(vision__camera_topics='["cam/+"]')
    picture = (Path(__file__).parents[1] / "models" / "scene.jpg").read_bytes()
    for topic in ("cam/door", "private/door"):
        requester.publish(topic, picture)

    def look(request_id: str, topic: str) -> dict[str, object]:
        payload = {"prompt": "x", "id": request_id, "images": [{"topic": topic}]}
        where = f"{BASE}/dut/in/frame/{requester.name}"
        requester.publish(where, payload, reply_to=requester.rx)
        return requester.outcome(request_id)

    assert look("allowed", "cam/door")["type"] == "result"
    for n, topic in enumerate(("private/door", "cam/door/x", f"{BASE}/dut/out/status")):
        error = look(f"not{n}", topic)
        assert (error["type"], error["code"]) == ("error", "unauthorized"), error
