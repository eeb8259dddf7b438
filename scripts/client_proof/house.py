"""The house that both programs are put into: a broker, a device, and an ear at the wire."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT / "tests"))

from phid import acl, demo, settings  # noqa: E402 - found by the line above
from phid.progress import Progress  # noqa: E402
from rig import Daemon, Mosquitto, until  # noqa: E402
from wire import BASE, Heard, Requester  # noqa: E402

DEVICE = "porch"
HEALTH_S = 2
CLIENTS = ("node-red", "home-assistant")
CAMERA = "frigate/door/person/snapshot"
SCENE = CHECKOUT / "tests" / "models" / "scene.jpg"


class House:
    """mosquitto with phid's own access list; phid with the demo model and the tiny vision model."""

    def __init__(self, folder: Path) -> None:
        demo.prepare(settings.default_models_dir(), Progress())
        (folder / "acl").write_text(_access() + "\n# the proof's own ear\nuser tap\ntopic #\n")
        self.broker = Mosquitto(folder, f"acl_file {folder}/acl\n")
        example = tomllib.loads((CHECKOUT / "config" / "watches-frigate.toml").read_text())
        people = next(watch for watch in example["watches"] if watch["name"] == "people")
        self.device = Daemon(
            self.broker.port,
            folder,
            DEVICE,
            mqtt__username=DEVICE,
            engine__runtime="genai",
            engine__model=demo.NAME,
            engine__frame_model=CHECKOUT / "tests" / "models" / "tiny-phi3v",
            models_dir=settings.default_models_dir(),
            vision__camera_topics='["frigate/#"]',
            watches=json.dumps([people]),
            health__interval_s=HEALTH_S,
            health__heartbeat_s=2,
        )
        self.broker.start()
        self.device.start()
        self.ear = Requester(self.broker.port, DEVICE, "tap", username="tap")
        self.ear.listen("phid/#")
        self.ear.online(120)

    def close(self) -> None:
        self.ear.close()
        self.device.close()
        self.broker.stop()

    def heard(self, client: str, kind: str, after: int = 0) -> list[dict[str, Any]]:
        """What came into a client's inbox, of this type."""
        inbox = f"{BASE}/client/{client}/rx"
        came = [h.json for h in self.ear.heard[after:] if h.topic == inbox]
        return [told for told in came if told["type"] == kind]

    def asked(self, client: str, kind: str = "text", after: int = 0) -> list[dict[str, Any]]:
        """What a client has asked."""
        topic = f"{BASE}/{DEVICE}/in/{kind}/{client}"
        return [h.json for h in self.ear.heard[after:] if h.topic == topic]

    def answer(self, client: str, after: int = 0, timeout: float = 60) -> dict[str, Any]:
        """The outcome that came into a client's inbox, past so many messages."""
        outcomes = until(
            lambda: self.heard(client, "result", after) + self.heard(client, "error", after),
            timeout,
            f"an answer for {client}",
        )
        return dict(outcomes[-1])

    def latest(self, out: str) -> dict[str, Any]:
        """What the device said last on one of its topics."""
        topic = f"{BASE}/{DEVICE}/out/{out}"
        told: Heard = until(
            lambda: next((h for h in reversed(list(self.ear.heard)) if h.topic == topic), None),
            20,
            f"{out} of the device",
        )
        return dict(told.json)

    @property
    def mark(self) -> int:
        """How many messages were heard so far."""
        return len(self.ear.heard)

    def see(self) -> str:
        """Have the camera show a person; what the watch made of it."""
        mark = self.mark
        self.ear.publish(CAMERA, SCENE.read_bytes(), qos=0)
        topic = f"{BASE}/{DEVICE}/out/watch/people/result"
        until(lambda: [h for h in self.ear.heard[mark:] if h.topic == topic], 60, "a finding")
        return str(self.latest("watch/people/result")["text"])

    def stale_will(self) -> None:
        """The will of another connection, as the broker sends one that it finds dead late."""
        status = {**self.latest("status"), "state": "offline", "reason": "lwt", "session": "old-1"}
        self.ear.publish(f"{BASE}/{DEVICE}/out/status", status)


def _access() -> str:
    """What `phid acl mosquitto` writes, and for each program the rights of a watcher, too."""
    fleet = acl.Fleet(
        BASE,
        devices=(DEVICE,),
        clients=CLIENTS,
        watchers=("wall",),
        cameras=(("frigate", "frigate/#"),),
    )
    everyone = acl.members(fleet)
    (watcher,) = (member for member in everyone if member.role == "watcher")
    return acl.mosquitto(
        dataclasses.replace(member, rights=tuple(dict.fromkeys((*member.rights, *watcher.rights))))
        if member.role == "client"
        else member
        for member in everyone
    )


class Program:
    """One of the two programs as a process of its own."""

    def __init__(self, command: Sequence[str], log: Path, **options: Any) -> None:
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                list(command), stdout=output, stderr=output, stdin=subprocess.DEVNULL, **options
            )

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, fact: Callable[[], Any], timeout: float, what: str) -> Any:
        """What `fact` says once that is true, while the program runs."""

        def look() -> Any:
            ended = self.process.poll()
            assert ended is None, f"it ended with status {ended}:\n{self.log[-3000:]}"
            return fact()

        return until(look, timeout, what)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def http(
    port: int,
    path: str,
    body: Any = None,
    method: str | None = None,
    form: bool = False,
    **headers: str,
) -> Any:
    """What a program's HTTP API answers, decoded if it is JSON."""
    data = None
    if form:
        data = urllib.parse.urlencode(body).encode()
    elif body is not None:
        data = json.dumps(body).encode()
        headers["Content-Type"] = "application/json"
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        data,
        {name.replace("_", "-"): value for name, value in headers.items()},
        method=method,
    )
    try:
        with urllib.request.urlopen(request, timeout=150) as answer:  # noqa: S310 - http, above
            text = answer.read().decode()
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{path}: {error.code} {error.read().decode()[:500]}") from None
    return json.loads(text) if text[:1] in ("{", "[") else text


def same(fact: Callable[[], Any], wanted: Any, what: str, timeout: float = 15) -> None:
    """Wait until it says what is wanted, and tell what it said instead."""
    late = time.monotonic() + timeout
    while (said := fact()) != wanted:
        assert time.monotonic() < late, f"{what} is {said!r}, not {wanted!r}"
        time.sleep(0.05)
