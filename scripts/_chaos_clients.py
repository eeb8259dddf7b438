"""The clients that scripts/chaos asks with: each keeps its own books of what it heard."""

from __future__ import annotations

import base64
import json
import random
import socket
import threading
import time
import uuid
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

BASE = "phid/v1"
DEVICE = "dut"
# Not accepted: asked again. Everything else that is told is final.
NOT_TAKEN = frozenset({"busy", "loading", "paused", "draining"})
# An outcome too, of what was looked at and not begun.
REFUSALS = frozenset({"bad_request", "unsupported", "too_large"})
ASK_AGAIN_S, LARGE_AGAIN_S = 3.0, 10.0
OPEN_EACH = 4
LARGE_SHARE = 0.01
MOST_TURNS = 16
# Asked a single time: for these a refusal is an outcome, and silence a loss.
ONCE_SHARE = 0.15
PROMPTS = ("Why is the sky blue?", "Name three fruits.", "What is a bicycle?", "Count to ten.")
PIXEL = base64.b64encode(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
        "0000000c49444154789c63606060000000040001f61738550000000049454e44ae426082"
    )
).decode()


@dataclass
class Asked:
    """One request, and everything that was heard of it."""

    kind: str
    payload: dict[str, Any]
    expected: str | None = None
    asked: int = 0
    ask_at: float = 0.0
    cancel_at: float | None = None
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    deltas: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    late_deltas: int = 0
    taken: bool = False
    again_s: float = ASK_AGAIN_S
    once: bool = False
    refused: bool = False
    void: bool = False
    turns: int | None = None
    """How many turns its session has before it."""

    @property
    def ended(self) -> bool:
        return bool(self.outcomes) or self.refused or self.void

    @property
    def answered_well(self) -> bool:
        return bool(self.outcomes) and self.outcomes[0]["type"] == "result"

    @property
    def accepted(self) -> bool:
        """Said to be, or shown by an outcome that only work has."""
        return self.taken or any(one.get("code") not in REFUSALS for one in self.outcomes)


class Asker:
    """A client on plain paho that keeps its own books and asks again what was not answered."""

    def __init__(self, number: int, port: int, chance: random.Random, *, scripted: bool) -> None:
        self.name = f"asker{number}-{uuid.uuid4().hex[:6]}"
        self.records: dict[str, Asked] = {}
        self.large_wanted = False
        self.conflicts = 0
        self._chance = chance
        self._scripted = scripted
        self._lock = threading.Lock()
        # What was asked last in our session; the next is asked when it has its outcome.
        self._talked: Asked | None = None
        self._sessions = 0
        self._client = client(self.name, port, f"{BASE}/client/{self.name}/rx", self._heard)

    def tick(self, now: float, *, more: bool) -> None:
        """Ask, ask again, cancel: whatever is due."""
        with self._lock:
            open_ones = [one for one in self.records.values() if not one.ended]
        for one in open_ones:
            if now >= one.ask_at and not one.once:
                self._ask(one, now)
            if one.cancel_at is not None and now >= one.cancel_at:
                one.cancel_at = None
                self._publish("cancel", {"id": one.payload["id"]})
        if more and self._chance.random() < 0.02:
            self._ask_otherwise()
        wanted = len(open_ones) < OPEN_EACH and self._chance.random() < 0.3
        if more and (wanted or self.large_wanted):
            one = self._new(now)
            with self._lock:
                self.records[one.payload["id"]] = one
                self._talk(one)
            self._ask(one, now)
            if not one.once and self._chance.random() < 0.1:
                self._ask(one, now)  # a duplicate at once

    def _talk(self, one: Asked) -> None:
        """Go on with a conversation in it, or begin another, if the last turn of it is over.

        Nothing of these is as long as to lose its oldest turns.
        """
        last = self._talked
        if one.kind not in ("text", "stream") or one.once or (last and not last.outcomes):
            return
        turns = 0
        if last is not None and last.turns is not None and last.turns < MOST_TURNS:
            said = last.answered_well and last.outcomes[0]["text"].strip()
            turns = last.turns + (2 if said else 0)
        one.turns, self._talked = turns, one
        one.payload["session"] = f"s{self._sessions}" if turns else self._begin()

    def _begin(self) -> str:
        self._sessions += 1
        return f"s{self._sessions}"

    def _ask_otherwise(self) -> None:
        """Ask something else under the id of a request that has just had its result."""
        with self._lock:
            ended = [one for one in [*self.records.values()][-10:] if one.outcomes]
            last = ended[-1] if ended else None
        if last is not None and last.outcomes[0]["type"] == "result":
            other = last.payload | {"prompt": last.payload["prompt"] + " "}
            self._publish("frame" if last.kind == "frame" else "text", other)

    def broker_dies(self) -> None:
        """What it has not saved is gone, and so may be what is asked only once."""
        with self._lock:
            for one in self.records.values():
                one.void = one.void or (one.once and not one.ended)

    def stop(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _new(self, now: float) -> Asked:
        draw = self._chance
        payload: dict[str, Any] = {"id": uuid.UUID(int=draw.getrandbits(128)).hex}
        kind = draw.choice(("text", "text", "text", "stream", "stream", "frame", "bad"))
        expected = None
        if self._scripted:
            count = draw.randint(0, 40)
            script = {"tokens": count, "token_ms": draw.choice((0, 5, 20, 50))}
            script |= {"prefill_ms": draw.choice((0, 100, 400))}
            payload["prompt"] = "@script " + json.dumps(script)
            expected = "".join(f"t{n} " for n in range(1, count + 1))
        else:
            payload |= {"prompt": draw.choice(PROMPTS), "temperature": 1.0}
            payload["max_tokens"] = draw.randint(1, 40)
        if kind == "stream":
            payload["stream"] = "delta"
        if kind == "frame":
            payload["images"] = [{"b64": PIXEL}]
        if self.large_wanted or draw.random() < LARGE_SHARE:
            # By its header a picture of one pixel: the weight of a real one behind it.
            self.large_wanted = False
            kind = "frame"
            weight = bytes(draw.randint(1 << 20, 6 << 20))
            payload["images"] = [
                {"b64": base64.b64encode(base64.b64decode(PIXEL) + weight).decode()}
            ]
        if kind == "bad":
            payload |= draw.choice(({"priority": 99}, {"prompt": ""}, {"max_tokens": 0}))
        if draw.random() < 0.1:
            payload["deadline_ms"] = draw.choice((200, 1000, 5000))
        one = Asked(kind, payload, expected)
        if len(payload.get("images", ())) and len(payload["images"][0]["b64"]) > len(PIXEL):
            one.again_s = LARGE_AGAIN_S
        if draw.random() < 0.1:
            one.cancel_at = now + draw.uniform(0, 2)
        one.once = one.again_s == ASK_AGAIN_S and draw.random() < ONCE_SHARE
        return one

    def _ask(self, one: Asked, now: float) -> None:
        one.asked += 1
        one.ask_at = now + one.again_s
        self._publish("frame" if one.kind == "frame" else "text", one.payload)

    def _publish(self, kind: str, payload: dict[str, Any]) -> None:
        properties = Properties(PacketTypes.PUBLISH)
        properties.ResponseTopic = f"{BASE}/client/{self.name}/rx"
        topic = f"{BASE}/{DEVICE}/in/{kind}/{self.name}"
        self._client.publish(topic, json.dumps(payload), 1, properties=properties)

    def _heard(self, message: paho.MQTTMessage) -> None:
        said = json.loads(message.payload)
        with self._lock:
            one = self.records.get(said.get("id", ""))
            if one is None:
                return
            match said["type"]:
                case "accepted":
                    one.taken = True
                case "delta":
                    one.late_deltas += bool(one.outcomes)
                    one.deltas[said["seq"]].add(said["text"])
                case "error" if said["code"] == "id_conflict":
                    self.conflicts += 1
                case "error" if said["code"] in NOT_TAKEN:
                    # What was accepted cannot be refused: then it stays open, and is lost.
                    one.refused = one.once and not one.taken
                    one.ask_at = time.monotonic() + said.get("retry_after_ms", 500) / 1000
                case _:
                    said.pop("duplicate", None)
                    if said not in one.outcomes:
                        one.outcomes.append(said)


class Pinger:
    """Pings the service ten times a second, from a client of its own."""

    def __init__(self, port: int) -> None:
        self._times_ms: list[tuple[float, float]] = []
        self._sent: dict[str, float] = {}
        self._rx = f"{BASE}/client/pinger/rx"
        self._hears = threading.Event()  # an answer, from its subscription on
        self._client = client("pinger", port, self._rx, self._heard, 0, self._hears)

    def ping(self) -> None:
        if not self._hears.is_set():
            return
        properties = Properties(PacketTypes.PUBLISH)
        properties.ResponseTopic = self._rx
        ping_id = uuid.uuid4().hex
        self._sent[ping_id] = time.monotonic()
        body = json.dumps({"id": ping_id})
        self._client.publish(f"{BASE}/{DEVICE}/in/ctl/ping", body, 1, properties=properties)

    def stop(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def times(self) -> list[tuple[float, float]]:
        """When each was sent, and how long its answer took so far, ms: some wait for ever."""
        now = time.monotonic()
        waiting = ((sent, (now - sent) * 1e3) for sent in self._sent.values())
        return [*self._times_ms, *waiting]

    def _heard(self, message: paho.MQTTMessage) -> None:
        sent = self._sent.pop(json.loads(message.payload)["id"], None)
        if sent is not None:
            self._times_ms.append((sent, (time.monotonic() - sent) * 1e3))


def client(
    name: str,
    port: int,
    topic: str,
    heard: Any,
    keep_s: int = 3600,
    hears: threading.Event | None = None,
) -> paho.Client:
    """A connected client that comes back by itself; `hears` is set while it hears its topic."""
    one = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id=name, protocol=paho.MQTTv5)
    one.reconnect_delay_set(1, 1)
    one.on_socket_open = lambda _client, _data, sock: sock.setsockopt(
        socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
    )
    one.on_connect = lambda *_: one.subscribe(topic, 1)
    one.on_message = lambda _client, _data, message: heard(message)
    if hears is not None:
        one.on_subscribe = lambda *_: hears.set()
        one.on_disconnect = lambda *_: hears.clear()
    properties = Properties(PacketTypes.CONNECT)
    properties.SessionExpiryInterval = keep_s
    one.connect("127.0.0.1", port, 10, clean_start=False, properties=properties)
    one.loop_start()
    return one
