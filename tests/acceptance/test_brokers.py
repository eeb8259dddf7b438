"""One acceptance suite over every broker and protocol we claim: each way gives the same wire."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from rig import Daemon, Mosquitto, start_broker
from wire import BASE, PATIENCE, Requester


@dataclass(frozen=True)
class Way:
    """A broker, what the daemon is told to speak with it, and what its requesters speak."""

    broker: str
    setting: str
    requester_5: bool

    def requester(self, port: int, name: str | None = None) -> Requester:
        """One who says in JSON what the daemon could not read from a property."""
        by_json = self.setting == "3.1.1" or self.broker == "rumqttd 3.1.1"
        return Requester(port, name=name, mqtt_5=self.requester_5, by_json=by_json)


WAYS = {
    "mosquitto, MQTT 5": Way("mosquitto", "auto", requester_5=True),
    "mosquitto, MQTT 3.1.1 by setting": Way("mosquitto", "3.1.1", requester_5=False),
    "mosquitto, daemon 3.1.1, requester 5": Way("mosquitto", "3.1.1", requester_5=True),
    "mosquitto, daemon 5, requester 3.1.1": Way("mosquitto", "5", requester_5=False),
    "rumqttd, MQTT 5": Way("rumqttd 5", "auto", requester_5=True),
    "rumqttd, MQTT 3.1.1 by fallback": Way("rumqttd 3.1.1", "auto", requester_5=False),
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(w, id=n, marks=pytest.mark.mosquitto) for n, w in WAYS.items()],
)
def way(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[int, Way, Daemon]]:
    wanted: Way = request.param
    folder = tmp_path_factory.mktemp("way")
    port, broker = start_broker(wanted.broker, folder)
    daemon = Daemon(
        port,
        folder,
        mqtt__protocol=wanted.setting,
        health__heartbeat_s="1",
        limits__backlog="5",
    )
    daemon.start()
    try:
        with wanted.requester(port) as watcher:
            watcher.listen(f"{BASE}/dut/out/status")
            watcher.status("online")
        yield port, wanted, daemon
    finally:
        daemon.close()
        if isinstance(broker, Mosquitto):
            broker.stop()
        else:
            assert broker.stdin is not None
            broker.stdin.close()
            broker.terminate()
            broker.wait(10 * PATIENCE)
        print(daemon.log[-6000:])


@pytest.fixture
def asker(way: tuple[int, Way, Daemon]) -> Iterator[Requester]:
    port, wanted, _ = way
    with wanted.requester(port) as client:
        yield client


def test_one_message_is_the_answer(asker: Requester) -> None:
    result = asker.ask("one two three", id="plain")
    assert (result["type"], result["text"], result["finish"]) == ("result", "one two three", "stop")
    assert [h.type for h in asker.of("plain")] == ["result"]


def test_a_stream_is_accepted_then_deltas_then_the_result(asker: Requester) -> None:
    result = asker.ask('@script {"tokens": 12, "token_ms": 30}', id="stream", stream="delta")
    heard = asker.of("stream")
    deltas = [h.json for h in heard if h.type == "delta"]
    assert "accepted" in {h.type for h in heard}
    assert [d["seq"] for d in deltas] == list(range(len(deltas)))
    assert "".join(d["text"] for d in deltas) == result["text"]
    assert len(deltas) == result["deltas"] > 1


def test_what_is_wrong_is_said_with_a_code(asker: Requester) -> None:
    asker.request({"id": "wrong", "prompt": "x", "max_tokens": 0})
    error = asker.outcome("wrong")
    assert (error["code"], error["status"], error["field"]) == ("bad_request", 400, "max_tokens")


def test_a_request_without_reply_topic_is_answered_at_the_default_one(asker: Requester) -> None:
    asker.listen(f"{BASE}/dut/out/res/{asker.name}/+")
    payload = {"id": "default", "prompt": "hello"}
    asker.publish(f"{BASE}/dut/in/text/{asker.name}", payload)
    asker.outcome("default")
    assert asker.of("default")[0].topic == f"{BASE}/dut/out/res/{asker.name}/default"


def test_a_cancel_ends_the_answer_with_the_text_so_far(asker: Requester) -> None:
    script = '@script {"tokens": 1000, "token_ms": 20}'
    asker.request({"id": "long", "prompt": script, "stream": "delta", "max_tokens": 2000})
    asker.wait(lambda h: h.type == "delta" and h.json["id"] == "long")
    asker.cancel("long")
    result = asker.outcome("long")
    assert result["finish"] == "cancelled"
    assert result["text"].startswith("t1 ")


def test_a_deadline_ends_it(asker: Requester) -> None:
    result = asker.ask('@script {"tokens": 1000, "token_ms": 20}', id="late", deadline_ms=300)
    assert (result["type"], result["finish"]) == ("result", "deadline")


def test_what_is_too_much_is_told_to_come_again(
    way: tuple[int, Way, Daemon], asker: Requester
) -> None:
    ids = [f"many{n}" for n in range(10)]
    asker.ask("first")  # then the engine has nothing to do, not even to see a cancel
    with way[2].engine_held():
        for request_id in ids:
            asker.request({"id": request_id, "prompt": "x"})
        asker.ctl("ping")  # what came before it is decided
    outcomes = [asker.outcome(request_id) for request_id in ids]
    busy = [o for o in outcomes if o["type"] == "error"]
    assert {o["code"] for o in busy} == {"busy"}
    assert all(o["retry_after_ms"] > 0 for o in busy)
    assert len(busy) == 4  # one runs, five wait


def test_the_same_again_is_answered_from_memory(asker: Requester) -> None:
    first = asker.ask("again", id="same")
    asker.request({"id": "same", "prompt": "again"})
    second = asker.wait(lambda h: h.type == "result" and h.json.get("duplicate")).json
    assert second == first | {"duplicate": True}
    asker.request({"id": "same", "prompt": "other"})
    assert asker.wait(lambda h: h.type == "error").json["code"] == "id_conflict"


def test_correlation_data_comes_back(way: tuple[int, Way, Daemon], asker: Requester) -> None:
    asker.request({"id": "corr", "prompt": "x"}, correlation=b"\x00\xff")
    assert asker.outcome("corr")["id"] == "corr"  # what 3.1.1 goes by
    both_5 = asker.mqtt_5 and way[1].setting != "3.1.1"
    assert asker.of("corr")[0].correlation == (b"\x00\xff" if both_5 else None)


def test_unicode_of_every_kind_goes_in_and_out(asker: Requester) -> None:
    text = "naïve 日本語 עברית 👩‍👩‍👧‍👦 e\u0301 \U0001f468\u200d\U0001f680"
    assert asker.ask(text)["text"] == text


def test_a_large_answer_arrives_whole(asker: Requester) -> None:
    text = "x" * 200_000
    assert asker.ask(text, max_tokens=4000)["text"] == text


def test_commands_are_answered(asker: Requester) -> None:
    reply = asker.ctl("ping")
    assert reply["ok"]
    assert reply["data"]["state"] == "online"


def test_status_and_info_are_retained(way: tuple[int, Way, Daemon]) -> None:
    port, wanted, _ = way
    with wanted.requester(port) as late:
        late.listen(f"{BASE}/dut/out/+")
        status = late.wait(lambda h: h.topic.endswith("/out/status"))
        info = late.wait(lambda h: h.topic.endswith("/out/info"))
        assert status.json["state"] == "online"
        assert info.json["device"] == "dut"


def test_many_requesters_get_their_own_answers(way: tuple[int, Way, Daemon]) -> None:
    port, wanted, _ = way
    failures: list[str] = []

    def converse(name: str) -> None:
        with wanted.requester(port, name) as client:
            for n in range(5):
                said = f"{name} {n}"
                outcome = client.ask(said, id=f"i{n}")
                while outcome["type"] == "error" and outcome["code"] == "busy":
                    outcome = client.ask(said, id=uuid.uuid4().hex[:8])
                if outcome.get("text") != said:
                    failures.append(json.dumps(outcome))

    threads = [threading.Thread(target=converse, args=(f"many{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60 * PATIENCE)
        assert not thread.is_alive()
    assert not failures


def test_the_last_will_says_offline_and_the_next_start_online(
    way: tuple[int, Way, Daemon],
) -> None:
    """Runs last: it ends the daemon that the others share."""
    port, wanted, daemon = way
    with wanted.requester(port) as watcher:
        watcher.listen(f"{BASE}/dut/out/status")
        before = watcher.status("online")
        assert daemon.process is not None
        daemon.process.kill()
        daemon.process.wait()
        offline = watcher.status("offline")
        assert (offline["reason"], offline["session"]) == ("lwt", before["session"])
        daemon.start()
        assert watcher.status("online")["session"] != before["session"]
        assert watcher.ask("back")["text"] == "back"
        assert daemon.stop() == 0
        assert watcher.status("offline")["reason"] == "stopped"
