"""A client that floods a daemon with refused requests, and a good one beside it."""

from __future__ import annotations

import itertools
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import paho.mqtt.client as paho

from rig import Daemon, serving
from wire import BASE, PATIENCE, Requester

# Tiny, each wrong in its own way.
BAD = (
    b"",
    b"{",
    b"{}",
    b"[]",
    b'{"prompt":""}',
    b'{"promt":"x"}',
    b'{"prompt":"x","max_tokens":0}',
    b'{"prompt":"x","id":"a/b"}',
    b'{"prompt":"x","images":[1]}',
    b'{"prompt":"x","model":"none"}',
    b"\xff\xfe",
)
# More than what the daemon's side holds of answers would lose some of them.
MAX_OUTSTANDING = 1000


class Flooder:
    """Sends bad requests as fast as they are refused."""

    def __init__(self, port: int, name: str = "flooder") -> None:
        self.refused = 0
        self._news = threading.Condition()
        self._topic = f"{BASE}/dut/in/text/{name}"
        self._subscribed = threading.Event()
        client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id=name, protocol=paho.MQTTv5)
        client.on_subscribe = lambda *_: self._subscribed.set()
        client.on_message = self._on_message
        client.max_inflight_messages = MAX_OUTSTANDING
        client.connect("127.0.0.1", port)
        client.loop_start()
        client.subscribe(f"{BASE}/dut/out/res/{name}/+", 1)
        assert self._subscribed.wait(10 * PATIENCE)
        self._client = client

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def flood(self, count: int, timeout: float = 600) -> float:
        """Have so many requests refused: requests a second."""
        began = time.monotonic()
        due = self.refused + count
        payloads = itertools.cycle(BAD)
        for n in range(count):
            self._wait(due - count + n - MAX_OUTSTANDING, began + timeout)
            self._client.publish(self._topic, next(payloads), 1)
        self._wait(due - 1, began + timeout)
        return count / (time.monotonic() - began)

    def _wait(self, more_than: int, until: float) -> None:
        with self._news:
            while self.refused <= more_than:
                left = until - time.monotonic()
                assert left > 0, f"only {self.refused} refused"
                self._news.wait(left)

    def _on_message(self, _client: Any, _userdata: Any, message: paho.MQTTMessage) -> None:
        assert b'"error"' in message.payload
        with self._news:
            self.refused += 1
            self._news.notify_all()


class GoodClient:
    """Asks something small again and again, in the background, and times the answers."""

    def __init__(self, port: int, pause_s: float = 0.2) -> None:
        self.times_s: list[float] = []
        self.faults: list[str] = []
        self._requester = Requester(port)
        self._pause_s = pause_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)

    @property
    def slowest_s(self) -> float:
        return max(self.times_s)

    def _run(self) -> None:
        for n in itertools.count():
            began = time.monotonic()
            try:
                result = self._requester.ask(f"good {n}", timeout=60)
                assert result.get("text") == f"good {n}", result
            except AssertionError as error:
                self.faults.append(str(error))
            self.times_s.append(time.monotonic() - began)
            if self._stopping.wait(self._pause_s):
                return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._requester.close()


def rss_kb(daemon: Daemon) -> int:
    """What the service holds of memory, by the kernel's word."""
    assert daemon.process is not None
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1])


@contextmanager
def flooder_of(daemon: Daemon) -> Iterator[Flooder]:
    flooder = Flooder(daemon.port)
    try:
        yield flooder
    finally:
        flooder.close()


def flood(count: int) -> dict[str, Any]:
    """The figures of a flood on a daemon and a broker of its own."""
    with tempfile.TemporaryDirectory(prefix="phid-flood-") as folder:
        with serving(Path(folder), log__level="warning") as daemon, flooder_of(daemon) as flooder:
            flooder.flood(max(2000, count // 10))
            before = rss_kb(daemon)
            with GoodClient(daemon.port) as good:
                rate = flooder.flood(count)
            after = rss_kb(daemon)
        return {
            "refused": count,
            "refused_per_s": round(rate),
            "rss_before_mb": round(before / 1024, 2),
            "rss_after_mb": round(after / 1024, 2),
            "rss_growth_pct": round((after - before) / before * 100, 2),
            "good_answers": len(good.times_s),
            "good_faults": good.faults,
            "good_slowest_s": round(good.slowest_s, 3),
        }
