"""The machine that the promises are tried in: commands, the unit, and a requester."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT / "tests"))

from authority import Authority  # noqa: E402 - found by the line above
from wire import BASE, Requester  # noqa: E402

CONFIG = Path("/etc/phid/phid.toml")
DROP_INS = Path("/etc/systemd/system/phid.service.d")
CREDENTIALS = Path("/etc/phid/credentials")
UNIT = "phid.service"
PORT = 1883
WHEELHOUSE = Path("/root/lent/wheels")


def run(*argv: str | Path, check: bool = True, **options: Any) -> str:
    done = subprocess.run(
        [str(part) for part in argv], capture_output=True, text=True, check=False, **options
    )
    output = done.stdout + done.stderr
    assert not check or done.returncode == 0, f"{argv}: {done.returncode}: {output[-2000:]}"
    return output


def install(
    *arguments: str | Path,
    checkout: Path = CHECKOUT,
    environment: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    argv = [checkout / "scripts/install", "--offline", WHEELHOUSE, *arguments]
    done = subprocess.run(
        [str(part) for part in argv],
        capture_output=True, text=True, check=False, env=os.environ | dict(environment or {}),
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def show(name: str) -> str:
    return run("systemctl", "show", "-P", name, UNIT).strip()


def pid() -> int:
    return int(show("MainPID"))


def engine_pid() -> int:
    children = Path(f"/proc/{pid()}/task").glob("*/children")
    found = [int(child) for path in children for child in path.read_text().split()]
    return found[0] if found else 0


def until(fact: Callable[[], Any], timeout: float = 60, what: str = "it") -> Any:
    deadline = time.monotonic() + timeout
    while not (value := fact()):
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout} s"
        time.sleep(0.1)
    return value


def words(since: float, *more: str) -> str:
    """The unit's journal since then."""
    return run("journalctl", "-u", UNIT, "--no-pager", "--since", f"@{since:.0f}", *more)


def device() -> str:
    shown = run("/opt/phid/.venv/bin/phid", "config", "show", "--json", "--config", CONFIG)
    return str(json.loads(shown)["device"]["value"])


@contextlib.contextmanager
def requester(session_expiry_s: int = 0, port: int = PORT) -> Iterator[Requester]:
    with Requester(port, device(), session_expiry_s=session_expiry_s) as client:
        client.listen(f"{BASE}/{client.device}/out/status")
        yield client


def online(timeout: float = 60, port: int = PORT) -> None:
    with requester(port=port) as client:
        client.status("online", timeout)


@contextlib.contextmanager
def drop_in(text: str) -> Iterator[None]:
    """The unit changed, for a while."""
    path = DROP_INS / "99-proof.conf"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    run("systemctl", "daemon-reload")
    try:
        yield
    finally:
        path.unlink()
        run("systemctl", "daemon-reload")


def start_anew() -> None:
    run("systemctl", "reset-failed", UNIT, check=False)
    run("systemctl", "restart", UNIT)
    online()


class SecureBroker:
    """Another mosquitto: with TLS and a password on one port, without either on another."""

    PORT, PLAIN_PORT = 8883, 1884

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, password: str, authority: Authority) -> None:
        """Under a certificate of this authority's, for the user porch with this password."""
        certificate, key = authority.issue("broker", host="localhost")
        passwords = self._folder / "passwords"
        passwords.write_text("")
        run("mosquitto_passwd", "-b", passwords, "porch", password)
        config = self._folder / "mosquitto.conf"
        config.write_text(
            f"per_listener_settings true\nuser root\nlistener {self.PORT} localhost\n"
            f"certfile {certificate}\nkeyfile {key}\npassword_file {passwords}\n"
            f"listener {self.PLAIN_PORT} localhost\nallow_anonymous true\n"
        )
        self._process = subprocess.Popen(
            ["mosquitto", "-c", str(config)], stderr=subprocess.DEVNULL
        )
        until(lambda: _listens(self.PLAIN_PORT), what="the broker's port")

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(20)
            self._process = None


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("localhost", port), 1):
        return True
    return False


class MemoryGroup:
    """The unit's control group, where the kernel counts and bounds its memory."""

    def __init__(self) -> None:
        self._folder = Path(f"/sys/fs/cgroup{show('ControlGroup')}")

    @property
    def there(self) -> bool:
        """False where the kernel gives no memory controller."""
        return (self._folder / "memory.max").exists()

    @property
    def used_bytes(self) -> int:
        """All that counts, what could be taken back with it."""
        return int((self._folder / "memory.current").read_text())

    @property
    def reclaimable_bytes(self) -> int:
        """What the kernel takes back before it ends a process: pages of files."""
        held = self._fields("memory.stat")
        return held["file"] - held["shmem"]

    @property
    def killed(self) -> int:
        """How many of its processes the kernel has ended for memory."""
        return self._fields("memory.events")["oom_kill"]

    @contextlib.contextmanager
    def glutton(self, takes_bytes: int) -> Iterator[None]:
        """Another process of the unit's, which takes so much memory and keeps it."""
        code = (
            "import sys, time\n"
            "open(sys.argv[1], 'w').write('0')\n"
            f"held = [bytearray(b'x') * (1 << 20) for _ in range({takes_bytes >> 20})]\n"
            "time.sleep(600)"
        )
        argv = [sys.executable, "-c", code, str(self._folder / "cgroup.procs")]
        process = subprocess.Popen(argv)
        try:
            yield
        finally:
            process.kill()
            process.wait()

    def _fields(self, name: str) -> dict[str, int]:
        lines = (self._folder / name).read_text().splitlines()
        return {key: int(value) for key, value in (line.split() for line in lines)}
