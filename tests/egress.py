"""Run in a network namespace of its own: what leaves it while the daemon works, as JSON.

The namespace has nothing but loopback, and that is its default route too: whatever is sent to any
address, a name server's included, is there to be seen.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from rig import ROOT, Daemon, Mosquitto
from wire import BASE, Requester

_ALL = 0x0003  # ETH_P_ALL
_IP4, _IP6 = 0x0800, 0x86DD
_TCP, _UDP = 6, 17
_EPHEMERAL = 32_768
_RESET = 0x04
# The broker's: what is on 127.0.0.1 is a program's own, as are the pairs by which paho is woken.
BROKER = "192.0.2.1"
PAIR = "pair on 127.0.0.1"
COLLECTOR = ("127.0.0.1", 4318)
STRAY = ("198.51.100.7", 9)
NAME = "stray.example.invalid"
PORT = 1883
TEXT, VISION = "smollm2-135m-instruct", "tiny-phi3v"
WATCH = {"name": "door", "topic": "cam/+", "prompt": "What is it?", "max_tokens": 8}


class Capture:
    """Counts every packet of every interface by where it goes: "udp 198.51.100.7:9"."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
        self._socket.settimeout(0.1)
        self._seen: Counter[str] = Counter()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def taken(self) -> dict[str, int]:
        """What was seen since this was last asked."""
        time.sleep(0.5)
        seen, self._seen = self._seen, Counter()
        return dict(seen)

    def stop(self) -> None:
        self._ending.set()
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        while not self._ending.is_set():
            with contextlib.suppress(TimeoutError):
                packet, (interface, kind, *_) = self._socket.recvfrom(128)
                self._seen[f"{interface} {_where(kind, packet)}"] += 1


def _where(kind: int, packet: bytes) -> str:
    """Protocol and both ends; what is no IP by its number."""
    if kind == _IP4:
        header, protocol = (packet[0] & 15) * 4, packet[9]
        ends = [socket.inet_ntop(socket.AF_INET, packet[n : n + 4]) for n in (12, 16)]
    elif kind == _IP6:
        header, protocol = 40, packet[6]
        ends = [socket.inet_ntop(socket.AF_INET6, packet[n : n + 16]) for n in (8, 24)]
    else:
        return f"ethertype {kind:#06x}"
    if protocol not in (_TCP, _UDP):
        return f"protocol {protocol} to {ends[1]}"
    name, ports = "udp", [int.from_bytes(packet[header + n : header + n + 2]) for n in (0, 2)]
    (source, target) = (f"{end}:{port}" for end, port in zip(ends, ports, strict=True))
    if protocol == _TCP:
        name = "tcp"
        if ends == ["127.0.0.1", "127.0.0.1"]:
            # Where nobody listens the kernel says so, in a packet that begins at 0.
            refused = packet[header + 13] & _RESET and not any(packet[header + 4 : header + 8])
            return f"tcp {source}" if refused else PAIR
        if ends[0] == BROKER and int(ports[0]) < _EPHEMERAL:
            return f"{name} {source}"
    return f"{name} {target}"


def _work(folder: Path, models_dir: Path) -> None:
    """Everything that a day brings: start, answers, frames, commands, a lost engine, a stop."""
    models = folder / "models"
    models.mkdir()
    for model in (models_dir / TEXT, ROOT / "tests" / "models" / VISION):
        (models / model.name).symlink_to(model)
    daemon = Daemon(
        PORT,
        folder,
        mqtt__host=BROKER,
        engine__runtime="genai",
        engine__model=TEXT,
        engine__frame_model=VISION,
        models_dir=models,
        vision__camera_topics='["cam/+"]',
        health__interval_s=0.5,
        health__heartbeat_s=1,
    )
    daemon.config.write_text('[log]\nlevel = "info"\n')
    daemon.start()
    try:
        with Requester(PORT, host=BROKER) as asker:
            asker.listen(f"{BASE}/dut/out/#")
            asker.status("online", 60)
            assert asker.ask("Say hello.", 60, max_tokens=16, stream="delta")["text"]
            _look(asker)
            for verb, options in {
                "ping": {},
                "discover": {},
                "log": {"level": "debug"},
                "reload": {},
                "model": {"action": "switch", "name": VISION},
            }.items():
                assert asker.ctl(verb, **options)["ok"], verb
            assert asker.ctl("restart", what="engine")["ok"]
            assert asker.ask("And again.", 60, max_tokens=16)["text"]
            asker.wait(lambda h: h.topic.endswith("/health"))
        subprocess.run(
            [sys.executable, "-m", "phid", "doctor"],
            env=daemon._environment,
            check=True,
            capture_output=True,
            timeout=60,
        )
        assert daemon.stop() == 0
    finally:
        daemon.close()
        print(daemon.log[-3000:], file=sys.stderr)


def _look(asker: Requester) -> None:
    """Pictures on each way in: with the request, apart from it, a camera's, a watch's."""
    picture = (ROOT / "tests" / "models" / "scene.jpg").read_bytes()
    where = f"{BASE}/dut/in"
    ways = [{"b64": base64.b64encode(picture).decode()}, {"part": 0}, {"topic": "cam/door"}]
    asker.publish(f"{where}/part/{asker.name}/way1/0", picture)
    asker.publish("cam/door", picture)
    for number, way in enumerate(ways):
        request = {"id": f"way{number}", "prompt": "What is it?", "max_tokens": 8, "images": [way]}
        asker.publish(f"{where}/frame/{asker.name}", request, reply_to=asker.rx)
        assert asker.outcome(f"way{number}", 60)["type"] == "result", way
    assert asker.ctl("watch", **WATCH)["ok"]
    asker.publish("cam/door", picture)
    found = asker.wait(lambda h: h.topic.endswith("/watch/door/result"), 60)
    assert found.type == "watch_result", found


def _stray() -> None:
    """A packet, a look-up of a name, and a try to find a collector on this machine."""
    with contextlib.suppress(OSError):
        socket.create_connection(COLLECTOR, 1.0).close()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x", STRAY)
    looking = threading.Thread(target=_look_up, daemon=True)
    looking.start()
    looking.join(1.0)


def _look_up() -> None:
    with contextlib.suppress(OSError):
        socket.getaddrinfo(NAME, 80)


def main(folder: Path, models_dir: Path) -> None:
    """Print what was seen of the daemon's work, and of one who does not keep to it."""
    for command in (
        ("link", "set", "lo", "up"),
        ("address", "add", BROKER, "dev", "lo"),
        ("route", "add", "default", "dev", "lo", "src", "127.0.0.1"),
        ("-6", "route", "add", "default", "dev", "lo"),
    ):
        subprocess.run(["ip", *command], check=True)
    assert shutil.which("mosquitto")
    listener = f"listener {PORT} {BROKER}\nallow_anonymous true\n"
    broker = Mosquitto(folder, listener, head="per_listener_settings true\n")
    broker.start()
    capture = Capture()
    try:
        _work(folder, models_dir)
        daemons = capture.taken()
        _stray()
        strays = capture.taken()
    finally:
        capture.stop()
        broker.stop()
    print(json.dumps({"daemon": daemons, "stray": strays}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
