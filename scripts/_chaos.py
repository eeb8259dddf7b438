"""A daemon, a broker and clients under faults, and the laws checked from the clients' records.

What is random is drawn from --seed: which request comes next, which fault, and when. How it falls
together is the machine's business, so a seed repeats the plan and not the run.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import resource
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter, defaultdict
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import psutil
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from cable import Cable
from phid import demo, settings
from phid.progress import Progress
from rig import Daemon, Mosquitto, child_pids, until

BASE = "phid/v1"
DEVICE = "dut"
# Not accepted: asked again. Everything else that is told is final.
NOT_TAKEN = frozenset({"busy", "loading", "paused", "draining"})
# An outcome too, of what was looked at and not begun.
REFUSALS = frozenset({"bad_request", "unsupported", "too_large"})
ASK_AGAIN_S, LARGE_AGAIN_S = 3.0, 10.0
CLIENTS = 5
MOST_PING_MS = 100
# Until it is connected (again): reconnecting backs off to a second, and a half.
_BACK_S = 6
OPEN_EACH = 4
LARGE_SHARE = 0.01
# Asked a single time: for these a refusal is an outcome, and silence a loss.
ONCE_SHARE = 0.15
KEEPALIVE_S = 5
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

    @property
    def ended(self) -> bool:
        return bool(self.outcomes) or self.refused or self.void

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
            self._ask(one, now)
            if not one.once and self._chance.random() < 0.1:
                self._ask(one, now)  # a duplicate at once

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


class Faults:
    """What goes wrong, one thing after another; `down` are the times no ping can be held to."""

    def __init__(
        self,
        chance: random.Random,
        daemon: Daemon,
        broker: Mosquitto,
        cable: Cable,
        askers: list[Asker],
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.down: list[tuple[float, float]] = []
        self._chance = chance
        self._daemon = daemon
        self._broker = broker
        self._cable = cable
        self._askers = askers
        self._deck: list[str] = []
        self._kinds = {
            "engine_kills": (4, self._kill_engine),
            "engine_hangs": (1, self._stop_engine),
            "service_kills": (3, self._kill_service),
            "service_restarts": (1, self._restart_service),
            "broker_restarts": (1, lambda: self._restart_broker(signal.SIGTERM)),
            "broker_kills": (1, lambda: self._restart_broker(signal.SIGKILL)),
            "net_cuts": (2, lambda: self._cable.cut(self._chance.uniform(0, 2))),
            "net_stalls": (1, lambda: self._cable.stall(self._chance.uniform(0.2, 2))),
            "upload_cuts": (2, self._cut_upload),
            "half_opens": (1, self._leave_half_open),
            "mute_brokers": (1, lambda: self._cable.mute(self._chance.uniform(0.5, 3))),
            "disk_full": (1, self._fill_disk),
        }

    @property
    def kinds(self) -> list[str]:
        """Everything that can go wrong."""
        return sorted(self._kinds)

    def go_on(self, ended: threading.Event, every: tuple[float, float]) -> None:
        """One after another, so many seconds apart, until told otherwise."""
        while not ended.wait(self._chance.uniform(*every)):
            self.one()

    def one(self) -> None:
        """Do one at random."""
        if not self._deck:  # each comes up, the ones with more weight more often
            self._deck = [name for name, (weight, _) in self._kinds.items() for _ in range(weight)]
            self._chance.shuffle(self._deck)
        name = self._deck.pop()
        began = time.monotonic()
        if self._kinds[name][1]() is False:
            return
        self.counts[name] += 1
        if not name.startswith(("engine", "disk")):
            self.down.append((began - 0.5, time.monotonic() + _BACK_S))

    def _engine(self) -> int | None:
        process = self._daemon.process
        children = child_pids(process.pid) if process is not None else []
        return children[0] if children else None

    def _kill_engine(self) -> None:
        if (pid := self._engine()) is not None:
            os.kill(pid, signal.SIGKILL)

    def _stop_engine(self) -> None:
        if (pid := self._engine()) is not None:
            os.kill(pid, signal.SIGSTOP)

    def _kill_service(self) -> None:
        self._daemon.stop(signal.SIGKILL)
        time.sleep(self._chance.uniform(0, 1))
        self._daemon.start()

    def _restart_service(self) -> None:
        self._daemon.stop()
        self._daemon.start()

    def _restart_broker(self, number: int) -> None:
        self._broker.stop(number)
        if number == signal.SIGKILL:
            for asker in self._askers:
                asker.broker_dies()
        time.sleep(self._chance.uniform(0, 1))
        self._broker.start()

    def _cut_upload(self) -> bool:
        """The link breaks in the middle of a picture of megabytes; False if none came in time."""
        self._chance.choice(self._askers).large_wanted = True
        return self._cable.cut_within(self._chance.randint(1 << 16, 1 << 20), 5)

    def _leave_half_open(self) -> None:
        """The link is dead and looks alive: noticed within 1.5 times the keep-alive."""
        self._cable.abandon()
        time.sleep(1.5 * KEEPALIVE_S + 0.5)

    def _fill_disk(self) -> None:
        """The service's files may not grow: what a full disk comes to, without filling one."""
        assert self._daemon.process is not None
        pid, endless = self._daemon.process.pid, resource.RLIM_INFINITY
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, endless))
        time.sleep(self._chance.uniform(0.5, 2))
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (endless, endless))


def judge(askers: list[Asker], pinger: Pinger, faults: Faults) -> dict[str, Any]:
    """What the clients' books say of the laws."""
    records = [one for asker in askers for one in asker.records.values()]
    errors: list[str] = []
    for one in records:
        errors += stream_errors(one)
    quiet = [ms for sent, ms in pinger.times() if not any(a <= sent <= b for a, b in faults.down)]
    codes = Counter(
        outcome.get("code") or outcome["finish"] for one in records for outcome in one.outcomes[:1]
    )
    return {
        "asked": len(records),
        "accepted": sum(one.accepted for one in records),
        "answered": sum(one.ended for one in records),
        "lost": sum(not one.ended for one in records),
        "asked_once": sum(one.once for one in records),
        "refused_once": sum(one.refused for one in records),
        "gone_with_the_broker": sum(
            one.void and not (one.outcomes or one.refused) for one in records
        ),
        "answered_twice": sum(len(one.outcomes) > 1 for one in records),
        "conflicts": sum(asker.conflicts for asker in askers),
        "stream_errors": len(errors),
        "asked_again": sum(one.asked - 1 for one in records),
        "pings": len(quiet),
        "p99_ping_ms": round(sorted(quiet)[int(len(quiet) * 0.99)], 1) if quiet else None,
        "outcomes": dict(codes.most_common()),
        "faults": faults.counts.total(),
        **{name: faults.counts[name] for name in faults.kinds},
        "examples": errors[:5]
        + [json.dumps(one.outcomes)[:600] for one in records if len(one.outcomes) > 1][:5]
        + [f"lost: {json.dumps(one.payload)}" for one in records if not one.ended][:5],
    }


def stream_errors(one: Asked) -> list[str]:
    """How the deltas of a request, or its text, contradict its outcome."""
    if not one.outcomes:
        return []
    outcome, request_id = one.outcomes[0], one.payload["id"]
    found = []
    if any(len(texts) > 1 for texts in one.deltas.values()):
        found.append(f"{request_id}: a seq with two texts")
    if one.late_deltas:
        found.append(f"{request_id}: {one.late_deltas} deltas after the outcome")
    text = outcome.get("text")
    joined = ""
    for seq in range(len(one.deltas)):  # QoS 0: what follows a gap proves nothing
        if seq not in one.deltas:
            break
        joined += next(iter(one.deltas[seq]))
    if text is not None and not text.startswith(joined):
        found.append(f"{request_id}: {joined!r} is no prefix of {text!r}")
    if outcome["type"] == "result" and one.expected is not None:
        whole = outcome["finish"] in ("stop", "length")
        if not one.expected.startswith(text) or (whole and text != one.expected):
            found.append(f"{request_id}: {text!r} is not {one.expected!r}")
    return found


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    chance = random.Random(options.seed)
    scripted = options.model == "scripted"
    broker = Mosquitto(folder, "autosave_interval 1\n")
    broker.start()
    cable = Cable(broker.port)
    own: dict[str, object] = {} if scripted else {"engine__runtime": "genai"}
    if not scripted:
        own |= {"engine__model": options.model, "models_dir": settings.default_models_dir()}
    daemon = Daemon(
        cable.port,
        folder,
        **own,
        engine__hang_s=1,
        engine__restart_max_s=0.5,
        mqtt__reconnect_max_s=1,
        mqtt__keepalive_s=KEEPALIVE_S,
        limits__drain_s=2,
        limits__per_client=64,
        limits__backlog=12,
    )
    daemon.start()
    progress = Progress()
    with ExitStack() as stack:
        stack.callback(broker.stop)
        stack.callback(daemon.close)
        # Who asks before anybody has subscribed asks nobody.
        until(lambda: daemon.logged("state_changed", state="online"), 120, "the daemon")
        askers = [
            Asker(n, broker.port, random.Random(chance.random()), scripted=scripted)
            for n in range(CLIENTS)
        ]
        pinger = Pinger(broker.port)
        for one in (*askers, pinger):
            stack.callback(one.stop)
        faults = Faults(random.Random(chance.random()), daemon, broker, cable, askers)
        ended = threading.Event()

        breaker = threading.Thread(
            target=faults.go_on, args=(ended, options.every), name="faults", daemon=True
        )
        began = time.monotonic()
        breaker.start()
        max_rss = ask_on(options, askers, pinger, faults, daemon)
        ended.set()
        breaker.join(60)
        settle(askers, options.settle)
        progress(f"{time.monotonic() - began:.0f} s", 1.0)
        figures = judge(askers, pinger, faults)
        figures["max_service_rss_mb"] = round(max_rss, 1)
        figures |= {"seconds": options.seconds, "seed": options.seed, "model": options.model}
        if options.keep:
            (options.keep / "chaos-daemon.log").write_text(daemon.log, encoding="utf-8")
    return figures


def ask_on(
    options: argparse.Namespace,
    askers: list[Asker],
    pinger: Pinger,
    faults: Faults,
    daemon: Daemon,
) -> float:
    """Ask and ping while things break: the most memory that the service took, MiB."""
    began, most, turns = time.monotonic(), 0.0, 0
    progress = Progress()
    while (now := time.monotonic()) < began + options.seconds:
        for asker in askers:
            asker.tick(now, more=True)
        turns += 1
        if turns % 2 == 0:
            pinger.ping()
        if turns % 20 == 0:
            most = max(most, rss_mb(daemon))
            done = sum(one.ended for asker in askers for one in asker.records.values())
            says = f"{done} answered, {faults.counts.total()} faults"
            progress(says, (now - began) / options.seconds)
        time.sleep(0.05)
    return most


def settle(askers: list[Asker], patience_s: float) -> None:
    """With nothing breaking any more, ask again until all is answered, or nothing is any more."""
    records = [one for asker in askers for one in asker.records.values()]
    left, late = len(records), time.monotonic() + patience_s
    while left and (now := time.monotonic()) < late:
        for asker in askers:
            asker.tick(now, more=False)
        if (still := sum(not one.ended for one in records)) < left:
            left, late = still, now + patience_s
        time.sleep(0.05)


def rss_mb(daemon: Daemon) -> float:
    process = daemon.process
    with suppress(psutil.Error):
        if process is not None:
            return float(psutil.Process(process.pid).memory_info().rss / 2**20)
    return 0.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long things break (60)")
    parser.add_argument("--seed", type=int, default=1, help="of the plan (1)")
    parser.add_argument(
        "--model", default="scripted", help="scripted (default), or a model's name, such as demo"
    )
    parser.add_argument(
        "--every",
        type=float,
        nargs=2,
        default=(0.5, 3.0),
        metavar=("MIN", "MAX"),
        help="seconds between two faults (0.5 3)",
    )
    parser.add_argument(
        "--settle", type=float, default=60.0, help="most seconds without an answer, after it (60)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the daemon's log there")
    options = parser.parse_args()
    if options.keep:  # now, and not when all is done
        options.keep.mkdir(parents=True, exist_ok=True)
    if options.model == "demo":
        options.model = demo.NAME
        demo.prepare(settings.default_models_dir(), Progress())
    with tempfile.TemporaryDirectory(prefix="phid-chaos-") as name:
        figures = run(options, Path(name))
    print(json.dumps(figures, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 1 if is_broken(figures) else 0


def is_broken(figures: dict[str, Any]) -> bool:
    """True if a law is, or nothing was shown."""
    # Of fewer pings than a hundred the slowest one is the 99th percentile: that is the machine's.
    deaf = figures["pings"] >= 100 and figures["p99_ping_ms"] > MOST_PING_MS
    wrong = figures["lost"] or figures["answered_twice"] or figures["stream_errors"]
    return bool(deaf or wrong or not figures["answered"])


if __name__ == "__main__":
    sys.exit(main())
