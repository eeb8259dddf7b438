"""What phid acl writes, on a real mosquitto with TLS and client certificates: the shipped example.

Each refusal has its twin beside it: the same act by the one who may, which works.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from authority import Authority
from rig import ROOT, Daemon, free_port, wait_for_port
from wire import BASE, PATIENCE, Requester

pytestmark = pytest.mark.mosquitto

REFUSED = "Not authorized"
ROLES = {
    "device": ["dut", "garage"],
    "client": ["alice", "bob"],
    "operator": ["ops"],
    "watcher": ["wall"],
}
MEMBERS = [*(name for names in ROLES.values() for name in names), "frigate"]
CAMERA = "cam/door"


@dataclass(frozen=True)
class Site:
    """A broker set up as config/mosquitto/phid.conf says, with a daemon on it."""

    port: int
    folder: Path
    authority: Authority
    daemon: Daemon

    def tls(self, name: str | None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.authority.certificate))
        if name is not None:
            context.load_cert_chain(*(self.folder / f"ca/{name}.{kind}" for kind in ("crt", "key")))
        return context

    def member(self, name: str, client_id: str | None = None) -> Requester:
        return Requester(self.port, name=client_id or name, tls=self.tls(name))

    def phid(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command of phid's, run by a member."""
        environment = self.daemon._environment | self.credentials(self.folder / "ca", name)
        return subprocess.run(
            [sys.executable, "-m", "phid", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60 * PATIENCE,
            check=False,
        )

    @staticmethod
    def credentials(folder: Path, name: str) -> dict[str, str]:
        files = {"CA": "ca.crt", "CERT": f"{name}.crt", "KEY": f"{name}.key"}
        return {f"PHID_MQTT__{n}_FILE": str(folder / file) for n, file in files.items()}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    authority = Authority(folder / "ca")
    authority.issue("broker", host="127.0.0.1")
    for name in MEMBERS:
        authority.issue(name)
    roles = [f"--{role}={name}" for role, names in ROLES.items() for name in names]
    written = subprocess.run(
        [sys.executable, "-m", "phid", "acl", "mosquitto", *roles, "--camera=frigate=cam/#"],
        env={"PYTHONPATH": str(ROOT / "daemon")},
        capture_output=True,
        text=True,
        check=True,
    )
    (folder / "phid.acl").write_text(written.stdout)
    port = free_port()
    config = (ROOT / "config" / "mosquitto" / "phid.conf").read_text()
    config = config.replace("/etc/mosquitto/certs", str(folder / "ca"))
    config = config.replace("/etc/mosquitto/phid.acl", str(folder / "phid.acl"))
    config = re.sub(r"^listener 8883$", f"listener {port} 127.0.0.1", config, flags=re.MULTILINE)
    config += f"user root\npersistence_location {folder}/\n"
    (folder / "mosquitto.conf").write_text(config)
    with ExitStack() as stack:
        log = stack.enter_context((folder / "mosquitto.log").open("wb"))
        broker = subprocess.Popen(
            ["mosquitto", "-c", str(folder / "mosquitto.conf")], stdout=log, stderr=log
        )
        stack.callback(broker.wait, 10 * PATIENCE)
        stack.callback(broker.terminate)
        wait_for_port(port)
        daemon = Daemon(
            port,
            folder,
            mqtt__tls="true",
            vision__camera_topics='["cam/+"]',
            health__interval_s="0.5",
            **{
                name.removeprefix("PHID_").lower(): file
                for name, file in Site.credentials(folder / "ca", "dut").items()
            },
        )
        stack.callback(daemon.close)
        daemon.start()
        site = Site(port, folder, authority, daemon)
        with site.member("wall", "first") as watcher:
            watcher.listen(f"{BASE}/dut/out/status")
            watcher.status("online")
        with site.member("ops") as ops:
            ops.ctl("ping")  # it is answered after the cameras are subscribed to
        yield site
        print(daemon.log[-4000:], (folder / "mosquitto.log").read_text()[-2000:])


Enter = Callable[[str], Requester]


@pytest.fixture
def enter(site: Site) -> Iterator[Enter]:
    """Lets members in by name; each gets a connection of its own."""
    with ExitStack() as stack:
        yield lambda name: stack.enter_context(site.member(name, f"{name}-{uuid.uuid4().hex[:6]}"))


# Getting in.


def test_with_a_certificate_one_gets_in_and_without_one_not(site: Site, tmp_path: Path) -> None:
    stranger = Authority(tmp_path / "stranger")
    certificate, key = stranger.issue("alice")
    forged = site.tls(None)
    forged.load_cert_chain(certificate, key)
    assert not is_let_in(site.port, site.tls(None))
    assert not is_let_in(site.port, forged)
    assert is_let_in(site.port, site.tls("alice"))


def is_let_in(port: int, context: ssl.SSLContext) -> bool:
    """Whether an MQTT 5 CONNECT gets its CONNACK."""
    connect = bytes([0x10, 14, 0, 4]) + b"MQTT" + bytes([5, 2, 0, 30, 0, 0, 1]) + b"x"
    try:
        with (
            socket.create_connection(("127.0.0.1", port), 5) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
        ):
            secure.sendall(connect)
            # With TLS 1.3 the broker's no to a certificate comes with what is read first.
            return secure.recv(4)[:1] == b"\x20"
    except OSError:
        return False


def test_a_user_name_that_is_claimed_beside_the_certificate_is_nothing(site: Site) -> None:
    tls = site.tls("alice")
    with Requester(site.port, name="claims", username="ops", password="x", tls=tls) as claims:
        assert claims.said_to(f"{BASE}/dut/in/ctl/ping") == REFUSED
    with site.member("ops", "really") as ops:
        assert ops.said_to(f"{BASE}/dut/in/ctl/ping") != REFUSED


# Writing: who may and, beside them, who may not.

WRITES = {
    "in/text of a client": (f"{BASE}/dut/in/text/alice", "alice", ["bob", "wall", "garage", "ops"]),
    "in/frame of a client": (f"{BASE}/dut/in/frame/alice", "alice", ["bob", "wall", "garage"]),
    "a part of a client": (f"{BASE}/dut/in/part/alice/i/0", "alice", ["bob", "garage", "frigate"]),
    "a cancel of a client": (f"{BASE}/dut/in/cancel/alice", "alice", ["bob", "wall", "garage"]),
    "a command": (f"{BASE}/dut/in/ctl/ping", "ops", ["alice", "wall", "garage", "frigate"]),
    "a command that changes something": (f"{BASE}/dut/in/ctl/resume", "ops", ["alice", "dut"]),
    "a broadcast": (f"{BASE}/all/in/ctl/discover", "ops", ["alice", "wall", "garage", "frigate"]),
    "a device's event": (f"{BASE}/dut/out/event", "dut", ["garage", "alice", "ops", "wall"]),
    "a device's status": (f"{BASE}/garage/out/status", "garage", ["dut", "alice", "ops", "wall"]),
    "a device's answer": (f"{BASE}/dut/out/res/alice/x", "dut", ["garage", "alice", "bob", "ops"]),
    "a client's inbox": (f"{BASE}/client/alice/rx", "dut", ["alice", "bob", "ops", "wall"]),
    "a camera's frame": (CAMERA, "frigate", ["dut", "alice", "ops", "wall"]),
}


@pytest.mark.parametrize("what", WRITES)
def test_who_may_write_it_does_and_nobody_else(enter: Enter, what: str) -> None:
    topic, may, may_not = WRITES[what]
    payload = json.dumps({"said": what})
    for name in may_not:
        assert enter(name).said_to(topic, payload) == REFUSED, f"{name} wrote {topic}"
    assert enter(may).said_to(topic, payload) != REFUSED


@pytest.mark.parametrize("name", ["wall", "frigate"])
def test_what_hears_or_shows_only_writes_nothing_else(enter: Enter, name: str) -> None:
    member = enter(name)
    for topic in (f"{BASE}/dut/in/text/{name}", f"{BASE}/client/{name}/rx", "elsewhere", "cam"):
        wanted = "Not authorized" if (name, topic) != ("frigate", "cam") else "No matching"
        assert member.said_to(topic).startswith(wanted)


def test_a_client_without_a_level_of_its_own_is_nobody(enter: Enter) -> None:
    alice = enter("alice")
    assert alice.said_to(f"{BASE}/dut/in/text") == REFUSED
    assert alice.said_to(f"{BASE}/dut/in/text/alice", json.dumps({"prompt": "x"})) != REFUSED


# Hearing.

READS = {
    "an answer": (f"{BASE}/garage/out/res/alice/x", "garage", "alice", ["bob", "wall", "dut"]),
    "an inbox": (f"{BASE}/client/alice/rx", "garage", "alice", ["bob", "wall", "ops", "dut"]),
    "a prompt": (f"{BASE}/garage/in/text/alice", "alice", "garage", ["bob", "wall", "ops", "dut"]),
    "a command": (f"{BASE}/garage/in/ctl/drain", "ops", "garage", ["alice", "wall", "dut"]),
    "health": (f"{BASE}/garage/out/health", "garage", "wall", ["alice", "dut", "frigate"]),
    "an event": (f"{BASE}/garage/out/event", "garage", "ops", ["alice", "dut", "frigate"]),
    "what a watch found": (
        *(f"{BASE}/garage/out/watch/yard/result", "garage", "wall"),
        ["alice", "dut", "frigate"],
    ),
    "a camera": (CAMERA, "frigate", "garage", ["alice", "wall", "ops", "frigate"]),
}
# For each, a topic that it may hear, with who may write it: what proves that it listens.
HEARS = {
    "alice": (f"{BASE}/garage/out/res/alice/mark", "garage"),
    "bob": (f"{BASE}/garage/out/res/bob/mark", "garage"),
    "wall": (f"{BASE}/garage/out/status", "garage"),
    "ops": (f"{BASE}/garage/out/status", "garage"),
    "dut": (f"{BASE}/dut/in/text/bob", "bob"),
    "garage": (f"{BASE}/garage/in/text/bob", "bob"),
}


@pytest.mark.parametrize("what", READS)
def test_who_may_hear_it_does_and_nobody_else(enter: Enter, what: str) -> None:
    topic, writer, reader, others = READS[what]
    said, mark = f"{what} {uuid.uuid4().hex}".encode(), uuid.uuid4().hex.encode()
    audience = {name: enter(name) for name in (reader, *others)}
    for member in audience.values():
        member.listen("#")
        member.listen(topic)
    enter(writer).said_to(topic, said)
    audience[reader].wait(lambda h: h.payload == said, 10, f"{what} at {reader}")
    for name in others:
        if name in HEARS:  # a camera may hear nothing at all
            own, speaker = HEARS[name]
            enter(speaker).said_to(own, mark)
            audience[name].wait(lambda h: h.payload == mark, 10, f"the mark at {name}")
        assert all(h.payload != said for h in audience[name].heard), f"{name} heard {what}"


# The whole, with a daemon.


def test_a_client_is_answered_and_a_forger_is_not(site: Site) -> None:
    with site.member("alice") as alice, site.member("bob") as bob:
        topic = f"{BASE}/dut/in/text/alice"
        bob.listen(alice.rx, f"{BASE}/dut/out/res/alice/#")
        payload = json.dumps({"prompt": "forged", "id": "forged"})
        assert bob.said_to(topic, payload) == REFUSED
        assert alice.ask("mine", id="mine")["text"] == "mine"
        assert bob.ask("his own", id="own")["text"] == "his own"
        assert bob.of("mine") == []
        assert alice.of("forged") == []


def test_the_daemon_has_all_the_rights_it_needs(site: Site) -> None:
    with site.member("frigate") as camera, site.member("alice") as alice:
        picture = (ROOT / "tests" / "models" / "scene.jpg").read_bytes()
        camera.publish(CAMERA, picture)
        request = {"prompt": "x", "id": "looks", "images": [{"topic": CAMERA}]}
        alice.publish(f"{BASE}/dut/in/frame/alice", request, reply_to=alice.rx)
        assert alice.outcome("looks")["type"] == "result"
        alice.publish(f"{BASE}/dut/in/text/alice", {"prompt": "default", "id": "default"})
        alice.listen(f"{BASE}/dut/out/res/alice/+")
        assert alice.ask("at the default topic", id="default2")["text"]
    with site.member("ops") as ops:
        ops.listen(f"{BASE}/dut/out/+")
        assert ops.ctl("ping")["ok"]
        assert ops.ctl("discover")["ok"]
        answer = ops.ctl("watch", name="yard", topic="cam/+", prompt="What?")
        assert answer["data"]["state"] == "on"
        assert ops.ctl("watch", name="yard", delete=True)["ok"]
        count = len(ops.heard)
        health = ops.wait(lambda h: h.topic.endswith("health") and h in ops.heard[count:]).json
        assert health["messages_refused_total"] == 0
    assert site.daemon.logged("state_changed", state="degraded") == []


def test_phids_own_commands_work_for_those_who_may(site: Site) -> None:
    answered = site.phid("alice", "ask", "--device=dut", "--client=alice", "over TLS")
    assert (answered.returncode, answered.stdout) == (0, "over TLS\n"), answered.stderr
    forged = site.phid("bob", "ask", "--device=dut", "--client=alice", "--timeout=2", "over TLS")
    assert forged.returncode != 0
    assert "the broker does not let us ask as client 'alice' (Not authorized)" in forged.stderr
    seen = site.phid("wall", "fleet", "--once", "--json", "--wait=1")
    assert [row["state"] for row in json.loads(seen.stdout) if row["device"] == "dut"] == ["online"]
    examined = site.phid("dut", "doctor", "--json")
    verdicts = {c["name"]: c["verdict"] for c in json.loads(examined.stdout)["checks"]}
    assert (verdicts["broker"], verdicts["daemon"]) == ("ok", "ok"), examined.stdout
