"""Standing prompts on a real broker, with cameras that publish faster than anything answers."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import paho.mqtt.client as paho
import psutil
import pytest

import pictures
from rig import Daemon, DaemonFactory, Mosquitto, until
from wire import BASE, Requester

pytestmark = pytest.mark.mosquitto

OUT = f"{BASE}/dut/out/watch"
# The engine takes 0.6 s for a frame, and answers with the hash of the bytes it was given.
SLOW = '@script {"see": true, "prefill_ms": 600} {label} at {camera}'


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def frame(number: int, grey: int = 0x90) -> bytes:
    """A PNG that no other number gives, of one colour but for a spot."""
    header = struct.pack(">IIBBBBB", 64, 48, 8, 2, 0, 0, 0)
    plain, spot = b"\x80\x90\xa0" * 56, bytes([grey]) * 24
    body = zlib.compress(b"".join(b"\0" + plain + spot for _ in range(48)))
    text = chunk(b"tEXt", b"frame\0%d" % number)
    image = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + text
    return image + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def digits(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()[:12]


class Camera:
    """Publishes as Frigate does: raw pictures, retained, at QoS 0, so many a second.

    `sent` has, by the first digits of a frame's hash, its number and when it was published, as the
    clock on the wall has it. With a `picture` it is always this one, and a number behind it.
    """

    def __init__(self, port: int, topic: str, rate: float, picture: bytes = b"") -> None:
        self.topic = topic
        self.sent: dict[str, tuple[int, float]] = {}
        self._rate, self._picture = rate, picture
        self._client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        self._client.disconnect()
        self._client.loop_stop()
        self._client._reset_sockets()

    def _run(self) -> None:
        began = time.monotonic()
        number = 0
        while not self._stopping.wait(max(0, began + number / self._rate - time.monotonic())):
            number += 1
            payload = self._picture + b"%d" % number if self._picture else frame(number)
            self.sent[digits(payload)] = (number, time.time())
            self._client.publish(self.topic, payload, retain=True)


@contextmanager
def cameras(*cameras: Camera) -> Iterator[None]:
    try:
        yield
    finally:
        for camera in cameras:
            camera.stop()


def watching(*watches: dict[str, Any], **settings: str) -> dict[str, str]:
    """The settings of a daemon with a model that looks at pictures, and these watches."""
    return {"engine__model": "eye?vision", "watches": json.dumps(watches), **settings}


def yard(**fields: Any) -> dict[str, Any]:
    return {"name": "yard", "topic": "frigate/+/+/snapshot", "prompt": SLOW, **fields}


@pytest.fixture
def listener(requester: Requester) -> Requester:
    requester.listen(f"{OUT}/#")
    return requester


def results(listener: Requester, name: str = "yard") -> list[Any]:
    return [h for h in list(listener.heard) if h.topic == f"{OUT}/{name}/result"]


def health(listener: Requester) -> dict[str, Any]:
    topic = f"{BASE}/dut/out/health"
    listener.listen(topic)
    before = len(listener.heard)
    listener.ctl("discover")
    until(lambda: any(h.topic == topic for h in listener.heard[before:]), what="health")
    return dict(next(h.json for h in reversed(listener.heard) if h.topic == topic))


@pytest.mark.measures
def test_the_newest_frame_is_answered_and_never_an_old_one(
    start_daemon: DaemonFactory, mosquitto: Mosquitto, listener: Requester
) -> None:
    start_daemon(**watching(yard(min_interval_s=0)), health__discover_spread_s="0")
    camera = Camera(mosquitto.port, "frigate/porch/person/snapshot", 30)
    with cameras(camera):
        until(lambda: len(results(listener)) >= 6, what="six answers")
    numbers = []
    for heard in results(listener):
        told = heard.json
        assert told["type"] == "watch_result", told
        number, published = camera.sent[told["text"].strip()]
        numbers.append(number)
        # By the daemon's own word: when we hear of it says more of us.
        handed = told["ts"] + told["timing"]["queued_ms"] / 1000
        # A frame needs a moment through the broker, and this machine may be busy.
        newest = max(n for n, at in camera.sent.values() if at <= max(handed - 0.4, published))
        assert number >= newest, (number, newest)
        assert told["timing"]["queued_ms"] < 600  # while the engine was busy it was not there yet
        assert (told["camera"], told["topic"]) == ("porch", camera.topic)
        assert told["usage"]["image_tokens"] == 313
    assert numbers == sorted(set(numbers))
    # About eighteen frames pass while one is answered.
    assert numbers[-1] - numbers[0] > 5 * (len(numbers) - 1)
    counts = health(listener)
    assert counts["watch_answers_total"] >= 6
    assert counts["watch_dropped_total"] > 4 * counts["watch_answers_total"]
    assert counts["watch_frames_total"] >= numbers[-1]
    assert counts["jobs_ok_total"] == 0


@pytest.mark.measures
def test_four_cameras_cost_little_while_the_engine_is_busy(
    start_daemon: DaemonFactory, mosquitto: Mosquitto, listener: Requester
) -> None:
    daemon = start_daemon(**watching(yard()), health__discover_spread_s="0")
    assert daemon.process is not None
    listener.request({"id": "hold", "prompt": '@script {"prefill_ms": 60000, "tokens": 1}'})
    process = psutil.Process(daemon.process.pid)
    names = ("front", "back", "side", "porch")
    shot = pictures.jpeg(pictures.busy(1920, 1080), quality=84)
    assert len(shot) > 290_000
    sources = [
        Camera(mosquitto.port, f"frigate/{name}/person/snapshot", 30, shot) for name in names
    ]
    shares: list[float] = []
    with cameras(*sources):
        time.sleep(1.0)
        frames = sum(len(source.sent) for source in sources)
        rss, start = process.memory_info().rss, time.monotonic()
        peak = rss
        while len(shares) < 3 and min(shares, default=1) >= 0.10:  # others use the same caches
            cpu, began = process.cpu_times(), time.monotonic()
            while time.monotonic() < began + 5:
                time.sleep(0.1)
                peak = max(peak, process.memory_info().rss)
            after = process.cpu_times()
            spent_s = after.user + after.system - cpu.user - cpu.system
            shares.append(spent_s / (time.monotonic() - began))
        frames = sum(len(source.sent) for source in sources) - frames
        wall_s = time.monotonic() - start
    share, grown_mb = min(shares), (peak - rss) / 1e6
    counts = health(listener)
    print(f"{frames / wall_s:.0f} frames/s: {share:.1%} of a core, {grown_mb:.1f} MB more")
    assert "jobs_ok_total" in counts
    assert counts["jobs_ok_total"] == 0  # the engine was busy all the time
    assert counts["watch_frames_total"] >= 0.9 * frames
    assert counts["watch_answers_total"] == 0
    assert share < 0.10
    assert grown_mb < 10


def is_looked_at(listener: Requester) -> bool:
    """Whether the only camera's frames are not all replaced or waiting: one at most waits."""
    counts = health(listener)
    return bool(counts["watch_frames_total"] - counts["watch_dropped_total"] >= 2)


def test_requests_go_first_and_a_running_watch_gives_way(
    start_daemon: DaemonFactory, mosquitto: Mosquitto, listener: Requester
) -> None:
    start_daemon(**watching(), health__discover_spread_s="0")
    # An answer that takes longer than anybody here waits.
    endless = '@script {"prefill_ms": 200, "tokens": 4000, "token_ms": 100}'
    watch = yard(prompt=endless, max_tokens=4000, min_interval_s=0)
    assert listener.ctl("watch", **watch)["ok"]
    camera = Camera(mosquitto.port, "frigate/porch/person/snapshot", 30)
    with cameras(camera):
        until(lambda: is_looked_at(listener), what="a look at the camera")
        ids = [f"r{n}" for n in range(5)]
        for request_id in ids:
            listener.request({"id": request_id, "prompt": '@script {"prefill_ms": 300}'})
        for request_id in ids:
            assert listener.outcome(request_id)["type"] == "result"
        assert results(listener) == []
        assert health(listener)["watch_yielded_total"] >= 1
        assert listener.ctl("watch", name="yard", prompt=SLOW)["ok"]
        until(lambda: results(listener), what="an answer when no request waits")


def test_a_retained_frame_is_not_looked_at(
    start_daemon: DaemonFactory, mosquitto: Mosquitto, listener: Requester
) -> None:
    topic = "frigate/porch/person/snapshot"
    listener.publish(topic, frame(1), retain=True)
    quick = '@script {"see": true}'
    start_daemon(**watching(yard(prompt=quick, min_interval_s=0)), health__discover_spread_s="0")
    assert listener.ask("still here")["type"] == "result"
    listener.publish(topic, b"", retain=True)  # what clears it is no frame either
    assert health(listener)["watch_frames_total"] == 0
    listener.publish(topic, frame(2), retain=True)
    told = listener.wait(lambda h: h.topic == f"{OUT}/yard/result").json
    assert told["text"].strip() == digits(frame(2))


def test_a_silent_camera_is_not_asked_about_again_and_the_past_is_left_alone(
    start_daemon: DaemonFactory, mosquitto: Mosquitto, listener: Requester
) -> None:
    quick = '@script {"see": true}'
    start_daemon(
        **watching(yard(prompt=quick, min_interval_s=0, max_age_s=2)),
        health__discover_spread_s="0",
    )
    topic = "frigate/porch/person/snapshot"
    coded = base64.b64encode(frame(1)).decode()
    listener.publish(topic, {"image": coded, "ts": time.time() - 60}, qos=0)  # yesterday's news
    taken = time.time() - 0.2
    listener.publish(topic, {"b64": coded, "ts": taken}, qos=0)
    told = listener.wait(lambda h: h.topic == f"{OUT}/yard/result").json
    assert told["ts"] == round(taken, 3)
    # One that waits too long behind a request is never answered: the camera says no more.
    listener.request({"id": "hold", "prompt": '@script {"prefill_ms": 3000, "tokens": 1}'})
    listener.publish(topic, frame(2), qos=0)
    listener.outcome("hold")
    until(lambda: health(listener)["watch_stale_total"] >= 1, what="a stale frame")
    assert len(results(listener)) == 1
    counts = health(listener)
    stale, dropped = counts["watch_stale_total"], counts["watch_dropped_total"]
    assert (counts["watch_frames_total"], stale + dropped) == (3, 2)


def test_a_watch_is_made_changed_kept_over_a_restart_and_deleted_by_command(
    start_daemon: DaemonFactory, mosquitto: Mosquitto, listener: Requester
) -> None:
    daemon = start_daemon(**watching(yard()))
    quick = '@script {"see": true}'
    made = listener.ctl("watch", name="gate", topic="cam/gate", prompt=quick, min_interval_s=0)
    assert made["ok"]
    assert (made["data"]["state"], made["data"]["watch"]["topic"]) == ("on", "cam/gate")
    shown = listener.wait(lambda h: h.topic == f"{OUT}/gate").json
    assert shown["watch"] == made["data"]["watch"]
    assert listener.ctl("watch", name="yard", enabled=False)["data"]["state"] == "off"

    listener.publish("cam/gate", frame(1))
    told = listener.wait(lambda h: h.topic == f"{OUT}/gate/result").json
    assert told["text"].strip() == digits(frame(1))

    assert daemon.stop() == 0
    daemon.start()
    restart(mosquitto, daemon)
    assert listener.ctl("watch", name="yard")["data"]["state"] == "off"
    again = listener.ctl("watch", name="gate")
    assert again["data"]["watch"] == made["data"]["watch"]
    count = len(results(listener, "gate"))
    listener.publish("cam/gate", frame(2))
    until(lambda: len(results(listener, "gate")) > count)

    assert listener.ctl("watch", name="gate", delete=True)["data"]["deleted"]
    listener.publish("cam/gate", frame(3))
    assert listener.ctl("ping")["ok"]
    with Requester(mosquitto.port) as late:
        late.listen(f"{OUT}/#")
        assert late.wait(lambda h: h.topic == f"{OUT}/yard").retain
        assert not [h for h in late.heard if h.topic.startswith(f"{OUT}/gate")]
    assert daemon.logged("watch_answered", watch="gate")[-1]
    assert len(results(listener, "gate")) == count + 1


def restart(mosquitto: Mosquitto, daemon: Daemon) -> None:
    with Requester(mosquitto.port) as watcher:
        watcher.listen(f"{BASE}/dut/out/status")
        watcher.online()


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "without a name": ({"topic": "a", "prompt": "x"}, "bad_request", "name"),
    "without a topic": ({"name": "w", "prompt": "x"}, "bad_request", "topic"),
    "a typo": ({"name": "w", "topic": "a", "promt": "x"}, "bad_request", "promt"),
    "our own topics": ({"name": "w", "topic": "#", "prompt": "x"}, "bad_request", "topic"),
    "no filter": ({"name": "w", "topic": "a/#/b", "prompt": "x"}, "bad_request", "topic"),
    "detail": ({"name": "w", "topic": "a", "prompt": "x", "detail": 99}, "bad_request", "detail"),
    "frames": ({"name": "w", "topic": "a", "prompt": "x", "frames": 5}, "bad_request", "frames"),
    "deleting a stranger": ({"name": "w", "delete": True}, "not_found", "name"),
    "deleting the settings'": ({"name": "yard", "delete": True}, "unsupported", "delete"),
    "changing the settings'": ({"name": "yard", "prompt": "x"}, "unsupported", "prompt"),
}


def test_a_wrong_definition_is_refused_with_code_and_field(
    start_daemon: DaemonFactory, listener: Requester
) -> None:
    start_daemon(**watching(yard()))
    for case, (fields, code, field) in WRONG.items():
        answer = listener.ctl("watch", **fields)
        assert not answer["ok"], case
        error = answer["error"]
        assert (error["code"], error["field"]) == (code, field), (case, error)
    assert listener.ctl("watch", name="yard")["data"]["source"] == "settings"


def test_bad_frames_are_told_with_a_code_and_good_ones_are_answered_after_them(
    start_daemon: DaemonFactory, mosquitto: Mosquitto, listener: Requester
) -> None:
    quick = '@script {"see": true}'
    start_daemon(**watching(yard(prompt=quick, min_interval_s=0)))
    bad = [
        b"hello",
        b"{",
        b"{}",
        frame(1)[:20],
        b'{"b64": "*"}',
        b"GIF89a" + bytes(50),
        b"\xff" * 99,
    ]
    for n, payload in enumerate(bad):
        listener.publish(f"frigate/c{n}/person/snapshot", payload)
    until(lambda: len(results(listener)) == len(bad), what="an error for each")
    codes = {h.json["camera"]: h.json["code"] for h in results(listener)}
    assert set(codes.values()) == {"unsupported", "bad_request"}
    assert codes["c2"] == "bad_request"
    listener.publish("frigate/fine/person/snapshot", frame(5))
    told = listener.wait(lambda h: h.topic == f"{OUT}/yard/result" and h.type == "watch_result")
    assert told.json["camera"] == "fine"


def test_a_crash_of_the_engine_under_a_frame_is_told_and_not_repeated_for_ever(
    start_daemon: DaemonFactory, mosquitto: Mosquitto, listener: Requester
) -> None:
    start_daemon(**watching(yard(prompt='@script {"crash_at": 0}', min_interval_s=0)))
    camera = Camera(mosquitto.port, "frigate/porch/person/snapshot", 10)
    with cameras(camera):
        suspended = listener.wait(
            lambda h: h.topic == f"{OUT}/yard" and h.json["state"] == "suspended"
        ).json
        assert "engines were lost" in suspended["reason"]
        assert [h.json["code"] for h in results(listener)] == ["engine_lost"] * 2
        assert listener.ask("and now?")["text"] == "and now?"


@pytest.mark.measures
def test_several_frames_go_as_one_question(
    start_daemon: DaemonFactory, mosquitto: Mosquitto, listener: Requester
) -> None:
    quick = '@script {"see": true}'
    start_daemon(**watching(yard(prompt=quick, frames=3, every_s=0.8, min_interval_s=0.2)))
    camera = Camera(mosquitto.port, "frigate/porch/person/snapshot", 30)
    with cameras(camera):
        until(lambda: len(results(listener)) >= 4)
    for heard in results(listener):
        assert heard.json["frames"] == 3
        assert heard.json["usage"]["image_tokens"] == 3 * 313
        seen = [camera.sent[text] for text in heard.json["text"].split()]
        assert len(seen) == 3
        for (first, published), (second, later) in pairwise(seen):
            assert first < second
            # As they arrive they are 0.8 s apart, and each may have been on its way for a moment.
            assert later - published > 0.4


def test_two_watches_see_the_same_frame_and_each_of_them_once(
    start_daemon: DaemonFactory, mosquitto: Mosquitto, listener: Requester
) -> None:
    quick = '@script {"see": true}'
    people = {"name": "people", "topic": "frigate/+/person/snapshot", "prompt": quick}
    start_daemon(
        **watching(yard(prompt=quick, min_interval_s=0), people | {"min_interval_s": 0}),
        health__discover_spread_s="0",
    )
    listener.publish("frigate/porch/person/snapshot", frame(1))
    until(lambda: results(listener) and results(listener, "people"), what="two answers")
    assert listener.ask("anything else?")["type"] == "result"
    counts = health(listener)
    assert (counts["watch_frames_total"], counts["watch_answers_total"]) == (2, 2)


def test_after_the_broker_was_restarted_the_cameras_are_heard_again(
    start_daemon: DaemonFactory, mosquitto: Mosquitto, listener: Requester
) -> None:
    quick = '@script {"see": true}'
    daemon = start_daemon(**watching(yard(prompt=quick, min_interval_s=0)))
    mosquitto.stop()
    (mosquitto.folder / "mosquitto.db").unlink(missing_ok=True)  # and nothing is remembered
    mosquitto.start()
    until(lambda: len(daemon.logged("broker_connected")) == 2, what="a second connection")
    with Requester(mosquitto.port) as fresh:
        fresh.listen(f"{OUT}/#")
        assert fresh.wait(lambda h: h.topic == f"{OUT}/yard").json["state"] == "on"
        fresh.ctl("ping")  # it is answered after the cameras are subscribed to
        fresh.publish("frigate/porch/person/snapshot", frame(9))
        told = fresh.wait(lambda h: h.topic == f"{OUT}/yard/result").json
        assert told["text"].strip() == digits(frame(9))


def test_a_frame_that_looks_like_the_last_one_answered_is_skipped(
    start_daemon: DaemonFactory, mosquitto: Mosquitto, listener: Requester
) -> None:
    quick = '@script {"see": true}'
    start_daemon(
        **watching(yard(prompt=quick, min_interval_s=0, min_change_pct=4)),
        health__discover_spread_s="0",
    )
    topic = "frigate/porch/person/snapshot"
    shown = [(1, 0x90), (2, 0x91), (3, 0x93), (4, 0x94), (5, 0xF0), (6, 0xF1)]
    for looked, (number, grey) in enumerate(shown, 1):
        listener.publish(topic, frame(number, grey=grey))
        until(lambda n=looked: _looked_at(listener) == n, what=f"a look at {number}")
    seen = [h.json["text"].strip() for h in results(listener)]
    assert seen == [digits(frame(1)), digits(frame(5, grey=0xF0))]
    # A broken one is told, and does not count as seen.
    listener.publish(topic, frame(7)[:-30])
    until(lambda: len(results(listener)) == 3)
    assert results(listener)[-1].json["code"] == "unsupported"


def _looked_at(listener: Requester) -> int:
    counts = health(listener)
    return int(counts["watch_skipped_total"] + counts["watch_answers_total"])
