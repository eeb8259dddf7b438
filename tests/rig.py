"""What tests run: a real broker and the real daemon, as processes of their own."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from wire import BASE, PATIENCE, Requester

ROOT = Path(__file__).parents[1]


# Below those that the kernel gives to whoever connects: one of these that is free stays so, also
# while its broker is away and everybody tries to reach it.
_PORTS = range(10_000, 32_768)
# Workers that run side by side have ports of their own.
_WORKER, _WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8, 8


def free_port() -> int:
    while True:
        port = random.SystemRandom().choice(_PORTS) // _WORKERS * _WORKERS + _WORKER
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_for_port(port: int, timeout: float = 10) -> None:
    timeout *= PATIENCE
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def unread_bytes(port: int) -> int:
    """What the server at this port has been sent and has not read."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    mine = [line for line in lines if int(line[1].rpartition(":")[2], 16) == port]
    # A listening socket counts connections there.
    return sum(int(line[4].rpartition(":")[2], 16) for line in mine if line[3] != "0A")


def until(fact: Callable[[], Any], timeout: float = 30, what: str = "it") -> Any:
    """What `fact` says once that is true: for what tells nobody when it changes."""
    timeout *= PATIENCE
    deadline = time.monotonic() + timeout
    while not (value := fact()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not happen within {timeout} s")
        time.sleep(0.02)
    return value


class Mosquitto:
    """A real mosquitto on a port of its own, with or without a state that survives."""

    def __init__(self, folder: Path, extra: str = "", head: str = "") -> None:
        self.port = free_port()
        self.folder = folder
        self._config = folder / "mosquitto.conf"
        self._config.write_text(
            f"{head}listener {self.port} 127.0.0.1\nallow_anonymous true\n"
            f"persistence true\npersistence_location {folder}/\nuser root\n"
            f"max_queued_messages 100000\nset_tcp_nodelay true\n{extra}\n"
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / "mosquitto.log").open("ab") as log:
            self._process = subprocess.Popen(
                ["mosquitto", "-c", str(self._config)], stdout=log, stderr=log
            )
        wait_for_port(self.port)

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(10 * PATIENCE)
            self._process = None

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def save(self) -> None:
        """Have it write its sessions to disk, as after this it is to be killed."""
        saved = self.folder / "mosquitto.db"
        saved.unlink(missing_ok=True)
        self.signal(signal.SIGUSR1)
        until(saved.exists, what="the broker's save")


RUMQTTD_311 = """\
id = 0
[router]
id = 0
max_connections = 100
max_outgoing_packet_count = 200
max_segment_size = 104857600
max_segment_count = 10
[v4.1]
name = "old"
listen = "127.0.0.1:{port}"
next_connection_delay_ms = 0
[v4.1.connections]
connection_timeout_ms = 60000
max_payload_size = 16777216
max_inflight_count = 200
dynamic_filters = true
"""


def start_broker(kind: str, folder: Path) -> tuple[int, subprocess.Popen[bytes] | Mosquitto]:
    """The port and process of a broker: mosquitto, rumqttd 5 or rumqttd 3.1.1."""
    if kind == "mosquitto":
        mosquitto = Mosquitto(folder)
        mosquitto.start()
        return mosquitto.port, mosquitto
    port = free_port()
    if kind == "rumqttd 5":
        command = [sys.executable, "-m", "phid", "broker", "--port", str(port)]
    else:
        config = folder / "rumqttd.toml"
        config.write_text(RUMQTTD_311.format(port=port))
        program = (
            "import sys, iotcore\n"
            f"with iotcore.Broker(config_path={str(config)!r}):\n    sys.stdin.read()\n"
        )
        command = [sys.executable, "-c", program]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT / "daemon")}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
    wait_for_port(port)
    return port, process


class Daemon:
    """`phid run` as a child process."""

    def __init__(self, port: int, folder: Path, device: str = "dut", **settings: object) -> None:
        self.port = port
        self.device = device
        self._log = folder / f"{device}.log"
        self._environment = {
            name: value for name, value in os.environ.items() if not name.startswith("PHID_")
        } | {
            "PYTHONPATH": str(ROOT / "daemon"),
            "PHID_CONFIG": str(folder / f"{device}.toml"),
            "PHID_DEVICE": device,
            "PHID_MODELS_DIR": str(folder / "models"),
            "PHID_STATE_DIR": str(folder / "state"),
            "PHID_MQTT__PORT": str(port),
            "PHID_MQTT__HOST": "127.0.0.1",
            "PHID_ENGINE__RUNTIME": "scripted",
        }
        self._environment |= {
            f"PHID_{name.upper()}": value if isinstance(value, str) else str(value)
            for name, value in settings.items()
        }
        self.config = folder / f"{device}.toml"
        self.config.touch()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, command: Sequence[str] = (sys.executable, "-m", "phid", "run")) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                list(command),
                env=self._environment,
                stdout=log,
                stderr=log,
            )

    @property
    def has_ended(self) -> bool:
        """True once the process is gone; its status is in process.returncode."""
        return self.process is not None and self.process.poll() is not None

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def logged(self, event: str, **fields: object) -> list[dict[str, Any]]:
        """The log's lines of this event, with these fields."""
        lines = [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event and fields.items() <= line.items()]

    @property
    def engine_pid(self) -> int:
        """The engine's process id, by the kernel's word."""
        assert self.process is not None
        pid = self.process.pid
        return int(until(lambda: child_pids(pid), what="an engine")[0])

    @contextmanager
    def engine_held(self) -> Iterator[None]:
        """Its engine stands still in this block: whatever it has to do is not done before its end.

        Shorter than engine.hang_s, for then it would be ended as hung.
        """
        pid = self.engine_pid
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def stop(self, number: int = signal.SIGTERM, timeout: float = 40) -> int:
        """The exit status."""
        assert self.process is not None
        process, self.process = self.process, None
        process.send_signal(number)
        return process.wait(timeout * PATIENCE)

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def bound() -> list[str]:
    """What a command begins with for whom files have rights: root is bound by none."""
    if os.geteuid():
        return []
    without = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    try:
        subprocess.run([*without, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("root cannot give up its rights over files here")
    return without


@contextmanager
def locked(*paths: Path) -> Iterator[None]:
    """Nobody has any right to these meanwhile."""
    before = {path: path.stat().st_mode for path in paths}
    for path in paths:
        path.chmod(0)
    try:
        yield
    finally:
        for path, mode in before.items():
            path.chmod(mode)


def child_pids(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


@contextmanager
def serving(folder: Path, extra: str = "", **settings: object) -> Iterator[Daemon]:
    """A daemon, online, on a broker of its own: for several tests to share."""
    broker = Mosquitto(folder, extra)
    broker.start()
    daemon = Daemon(broker.port, folder, **settings)  # type: ignore[arg-type]
    try:
        daemon.start()
        with Requester(broker.port) as watcher:
            watcher.listen(f"{BASE}/dut/out/status")
            watcher.online()
        yield daemon
    finally:
        daemon.close()
        broker.stop()
        print(f"--- log of {daemon.device}\n{daemon.log[-6000:]}")


DaemonFactory = Callable[..., Daemon]
