"""Asks a daemon thousands of times, and tells how the memory of both its programs has grown.

First the scripted engine, then the demo model, each behind a broker of its own. What is kept of
ended requests is kept for a few only, so that all of that is there before the counting begins.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import psutil
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from _chaos_clients import PIXEL
from phid import demo, settings
from phid.progress import Progress
from rig import Daemon, serving
from wire import BASE

SERVICE_PCT, ENGINE_PCT = 2.0, 5.0
"""How much more than after the warm-up is too much."""

# So many are open at once, and so many are kept to be answered again.
_OPEN, _KEPT = 4, 256
_WARM_UP = 0.2
_SAMPLES = 100
_PATIENCE_S = 120.0
# A header is enough for the scripted engine: what follows it is weight.
_PICTURE = base64.b64encode(base64.b64decode(PIXEL) + bytes(50_000)).decode()
PROMPTS = ("Why is the sky blue?", "Name three fruits.", "What is a bicycle?", "Count to ten.")


@dataclass
class Soaker:
    """Asks again as soon as an answer has come, and keeps nothing of either."""

    port: int
    scripted: bool
    chance: random.Random
    answered: int = 0
    failed: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._news = threading.Condition()
        self._subscribed = threading.Event()
        client = paho.Client(paho.CallbackAPIVersion.VERSION2, "soaker", protocol=paho.MQTTv5)
        client.on_message = lambda _client, _data, message: self._heard(message)
        client.on_subscribe = lambda *_: self._subscribed.set()
        client.on_socket_open = lambda _client, _data, sock: sock.setsockopt(
            socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
        )
        client.connect("127.0.0.1", self.port)
        client.loop_start()
        client.subscribe(f"{BASE}/client/soaker/rx", 1)
        assert self._subscribed.wait(10)
        self._client = client
        self._asked = 0

    def ask_until(self, count: int) -> None:
        """Go on until so many have been answered in all."""
        while self.answered < count:
            while self._asked < min(count, self.answered + _OPEN):
                self._ask()
            with self._news:
                before = self.answered
                if not self._news.wait_for(lambda b=before: self.answered > b, _PATIENCE_S):
                    raise SystemExit(f"soak: no answer for {_PATIENCE_S:.0f} s: one is lost")

    def stop(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _ask(self) -> None:
        self._asked += 1
        draw = self.chance
        body: dict[str, Any] = {"id": f"s{self._asked}"}
        kind = "text"
        if self.scripted:
            script = {"tokens": draw.randint(1, 30), "prefill_ms": draw.choice((0, 0, 5))}
            body["prompt"] = "@script " + json.dumps(script)
            if draw.random() < 0.05:
                kind, body["images"] = "frame", [{"b64": _PICTURE}]
        else:
            body |= {"prompt": draw.choice(PROMPTS), "max_tokens": draw.randint(4, 24)}
        if draw.random() < 0.5:
            body["stream"] = "delta"
        properties = Properties(PacketTypes.PUBLISH)
        properties.ResponseTopic = f"{BASE}/client/soaker/rx"
        topic = f"{BASE}/dut/in/{kind}/soaker"
        self._client.publish(topic, json.dumps(body), 1, properties=properties)

    def _heard(self, message: paho.MQTTMessage) -> None:
        said = json.loads(message.payload)
        if said["type"] in ("result", "error"):
            with self._news:
                self.answered += 1
                if said["type"] == "error":
                    self.failed.append(said)
                self._news.notify_all()


def soak(count: int, model: str, seed: int, progress: Progress) -> dict[str, Any]:
    """The figures of so many requests to one model."""
    scripted = model == "scripted"
    own: dict[str, object] = {}
    if not scripted:
        own = {"engine__runtime": "genai", "engine__model": demo.NAME}
        own["models_dir"] = settings.default_models_dir()
    kept = {"limits__dedupe_entries": min(_KEPT, count // 10), "log__level": "warning"}
    with (
        tempfile.TemporaryDirectory(prefix="phid-soak-") as name,
        serving(Path(name), **own, **kept) as daemon,
    ):
        soaker = Soaker(daemon.port, scripted, random.Random(seed))
        began, samples = time.monotonic(), []
        for n in range(1, _SAMPLES + 1):
            soaker.ask_until(count * n // _SAMPLES)
            samples.append(taken_mb(daemon))
            if n % 10 == 0:
                progress(f"{soaker.answered} answers of {model}", n / _SAMPLES)
        took_s = time.monotonic() - began
        soaker.stop()
    warm = samples[int(_SAMPLES * _WARM_UP) :]
    figures: dict[str, Any] = {
        "requests": count,
        "answered": soaker.answered,
        "errors": len(soaker.failed),
        "per_s": round(count / took_s, 1),
    }
    for which, who in enumerate(("service", "engine")):
        taken = [sample[which] for sample in warm]
        tenth = len(taken) // 10
        first, last = statistics.median(taken[:tenth]), statistics.median(taken[-tenth:])
        figures |= {
            f"{who}_rss_mb": round(last, 1),
            f"{who}_most_mb": round(max(taken), 1),
            f"{who}_growth_pct": round((last - first) / first * 100, 2),
        }
    return {f"{model}.{key}": value for key, value in figures.items()}


def taken_mb(daemon: Daemon) -> tuple[float, float]:
    """Resident memory of the service and of its engine, MiB."""
    assert daemon.process is not None
    pids = (daemon.process.pid, daemon.engine_pid)
    service, engine = (psutil.Process(pid).memory_info().rss / 2**20 for pid in pids)
    return service, engine


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("--scripted", type=int, default=10_000, help="requests (10000)")
    parser.add_argument("--real", type=int, default=1000, help="requests to the demo model (1000)")
    parser.add_argument("--seed", type=int, default=1, help="of what is asked (1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    progress, figures = Progress(), {}
    if options.real:
        demo.prepare(settings.default_models_dir(), progress)
    for count, model in ((options.scripted, "scripted"), (options.real, "demo")):
        if count:
            figures |= soak(count, model, options.seed, progress)
    print(json.dumps(figures, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 1 if any(is_broken(key, value) for key, value in figures.items()) else 0


def is_broken(key: str, value: float) -> bool:
    """True for a figure that is beyond its bound."""
    bounds = {"errors": 0.0, "service_growth_pct": SERVICE_PCT, "engine_growth_pct": ENGINE_PCT}
    return value > bounds.get(key.partition(".")[2], float("inf"))


if __name__ == "__main__":
    sys.exit(main())
