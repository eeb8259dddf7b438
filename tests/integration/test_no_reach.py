"""What is said over MQTT is data: no field of it reaches a file, the network or a program."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phid.commands import CancelRequest, Command, ModelCommand, WatchCommand
from phid.control import VERBS
from phid.requests import Request
from phid.watches import Watch
from rig import Daemon, Mosquitto
from wire import BASE, PATIENCE, Requester

pytestmark = pytest.mark.mosquitto

HOST = "bait.example.invalid"
# Every event of CPython's that names a file, an address, a library or a program (PEP 578).
SPY = """\
import os, sys
def spy(event, arguments, _bait={bait!r}, _to={to!r}, _busy=[]):
    if _busy or not event.startswith(("open", "os.", "socket.", "subprocess.", "ctypes.", "shutil.",
                                      "glob.", "pathlib.", "sqlite3.", "import", "exec")):
        return
    text = repr(arguments)
    if any(one in text for one in _bait):
        _busy.append(event)
        with open(_to, "a") as file:
            file.write(event + " " + text[:200] + chr(10))
        _busy.clear()
sys.addaudithook(spy)
with open({programs!r}, "a") as file:
    file.write(str(os.getpid()) + chr(10))
"""


@pytest.fixture(scope="module")
def bait(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder, as whole as a file system can tell, beside the one where models are."""
    folder = tmp_path_factory.mktemp("reach") / "bait-model"
    folder.mkdir()
    (folder / "genai_config.json").write_text(
        json.dumps({"model": {"type": "phi3", "context_length": 4096}})
    )
    (folder / "picture.jpg").write_bytes(
        (Path(__file__).parents[1] / "models" / "scene.jpg").read_bytes()
    )
    return folder


@pytest.fixture(scope="module")
def spied(bait: Path) -> Path:
    """Where the spy of every program writes down what it sees; a folder for their path."""
    folder = bait.parent / "spy"
    folder.mkdir()
    files = {"to": str(folder / "seen"), "programs": str(folder / "programs")}
    (folder / "sitecustomize.py").write_text(SPY.format(bait=["bait-model", HOST], **files))
    return folder


@pytest.fixture(scope="module")
def daemon(bait: Path, spied: Path) -> Iterator[Daemon]:
    folder = bait.parent / "daemon"
    folder.mkdir()
    broker = Mosquitto(folder)
    broker.start()
    daemon = Daemon(
        broker.port, folder, engine__model="eye?vision", vision__camera_topics='["cam/+"]'
    )
    daemon._environment["PYTHONPATH"] += f"{os.pathsep}{spied}"
    daemon.start()
    try:
        with Requester(broker.port) as watcher:
            watcher.listen(f"{BASE}/dut/out/status")
            watcher.status("online")
        assert daemon.process is not None
        spied_on = (spied / "programs").read_text().split()
        assert {str(daemon.process.pid), str(daemon.engine_pid)} <= set(spied_on)
        yield daemon
    finally:
        daemon.close()
        broker.stop()
        print(daemon.log[-4000:])


FIELDS = {"watch": WatchCommand, "model": ModelCommand}
SOUND = {"model": {"action": "load", "name": "eye"}}


def lures(bait: Path) -> list[str]:
    """The same folder, file and host in every way of writing them."""
    return [
        *(str(bait), f"file://{bait}", f"../{bait.name}", f"..\\{bait.name}", bait.name),
        *(str(bait / "picture.jpg"), f"http://{HOST}/x", f"{HOST}:80", f"\\\\{HOST}\\x"),
        *("phi-3.5-mini", "microsoft/Phi-3.5-mini-instruct-onnx"),  # what could be pulled
    ]


def filled(model: Any, name: str, lure: str) -> list[Any]:
    """What may stand in a field that a lure can be put into."""
    coded = base64.b64encode(lure.encode()).decode()
    return (
        {
            "messages": [[{"role": "user", "content": lure}], [{"role": lure, "content": "x"}]],
            "stop": [[lure]],
            "response_format": [
                {"type": lure},
                *(
                    {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
                    for schema in ({"$ref": lure}, {"$schema": lure}, {"$id": lure}, {lure: 1})
                ),
            ],
            "images": [
                *([{field: lure}] for field in ("b64", "topic", "part", "mime", "label", "url")),
                *([{"topic": "cam/a", field: lure}] for field in ("label", "mime", "sha256")),
                [{"b64": coded}],
                [{"b64": f"data:image/jpeg;base64,{coded}"}],
            ],
            "tags": [{"path": lure}, {lure[:64]: 1}],
        }.get(name, [lure])
        if model is Request
        else [lure]
    )


def test_no_field_of_a_request_reaches_for_what_it_names(
    daemon: Daemon, bait: Path, spied: Path
) -> None:
    sent = 0
    with Requester(daemon.port) as asker:
        for lure in lures(bait):
            for name in Request.model_fields:
                for value in filled(Request, name, lure):
                    payload = {"prompt": "x", name: value}
                    payload |= {"id": f"n{sent}"} if name != "id" else {}
                    if name == "messages":
                        del payload["prompt"]
                    for kind in ("text", "frame"):
                        where = f"{BASE}/dut/in/{kind}/{asker.name}"
                        options = {"reply_to": asker.rx, "correlation": b"c%d" % sent}
                        asker.publish(where, payload, qos=0, **options)
                        sent += 1
                        payload |= {"id": f"n{sent}"} if name != "id" else {}
        for n in range(sent):
            answer = asker.wait(lambda h, n=n: h.correlation == b"c%d" % n, 60, f"answer {n}").json
            assert answer["type"] in ("result", "error")
        assert asker.ask("still here")["text"] == "still here"
    assert sent > 500
    assert not (spied / "seen").exists(), (spied / "seen").read_text()


def test_no_model_is_loaded_or_fetched_by_its_name(daemon: Daemon, bait: Path) -> None:
    with Requester(daemon.port) as asker:
        for lure in lures(bait):
            error = asker.ask("x", model=lure)
            assert (error["code"], error["field"]) == ("not_found", "model")
        assert asker.ask("x", model="eye")["text"] == "x"


@pytest.mark.model
def test_a_model_is_loaded_by_name_from_its_folder_and_by_no_path(
    models_dir: Path, bait: Path, spied: Path, tmp_path: Path
) -> None:
    """Only who writes the settings may name a folder that lies elsewhere."""
    home, elsewhere, real = tmp_path / "models", tmp_path / "bait-model", "smollm2-135m-instruct"
    home.mkdir()
    for name in (real, "second"):
        (home / name).symlink_to(models_dir / real)
    elsewhere.symlink_to(models_dir / real)
    broker = Mosquitto(tmp_path)
    broker.start()
    daemon = Daemon(
        *(broker.port, tmp_path),
        engine__runtime="genai",
        engine__model=real,
        models_dir=home,
    )
    daemon._environment["PYTHONPATH"] += f"{os.pathsep}{spied}"
    daemon.start()
    try:
        with Requester(broker.port) as asker:
            asker.listen(f"{BASE}/dut/out/status")
            asker.status("online", 60)
            for name in (*lures(elsewhere), f"./{real}", f"{real}/../../bait-model", "..", "."):
                error = asker.ctl("model", action="load", name=name)["error"]
                assert error["code"] == "not_found", (name, error)
                assert asker.ask("x", model=name)["code"] == "not_found", name
            assert not (spied / "seen").exists(), (spied / "seen").read_text()
            assert asker.ctl("model", action="load", name="second")["ok"]
            assert asker.ask("Say hello.", 60, model="second", max_tokens=4)["model"] == "second"
    finally:
        daemon.close()
        broker.stop()
        print(daemon.log[-4000:])


def test_no_field_of_a_command_or_cancel_or_watch_reaches_for_what_it_names(
    daemon: Daemon, bait: Path, spied: Path
) -> None:
    with Requester(daemon.port) as asker:
        asker.listen(f"{BASE}/dut/out/#")
        engine = daemon.engine_pid
        for lure in lures(bait):
            for name in CancelRequest.model_fields:
                asker.publish(f"{BASE}/dut/in/cancel/{asker.name}", {name: lure})
            for verb in VERBS:
                sound = SOUND.get(verb, {})
                for name in FIELDS.get(verb, Command).model_fields.keys() - {"id", "reply_to"}:
                    assert not asker.ctl(verb, **sound | {name: lure})["ok"], (verb, name)
            for name in Watch.model_fields.keys() - {"name"}:
                asker.ctl("watch", **{"name": "w", "topic": "cam/+", "prompt": "x", name: lure})
                asker.publish("cam/door", b'{"image": "' + lure.encode() + b'"}')
            asker.publish(f"{BASE}/dut/in/frame/{asker.name}", b"\xff\xd8", user=[("model", lure)])
            asker.publish(f"{BASE}/dut/in/part/{asker.name}/i/0", lure.encode())
        asker.ctl("watch", name="w", delete=True)
        assert asker.ctl("ping")["ok"]
        assert daemon.engine_pid == engine
    assert not (spied / "seen").exists(), (spied / "seen").read_text()


@pytest.mark.parametrize(
    "does",
    [
        "open({path!r})",
        "import os; os.listdir({folder!r})",
        "import pathlib; list(pathlib.Path({folder!r}).iterdir())",
        "import socket; socket.getaddrinfo({host!r}, 80)",
        "import subprocess; subprocess.run(['true', {path!r}])",
        "import sqlite3; sqlite3.connect({path!r})",
    ],
)
def test_whoever_reached_for_it_would_be_seen(bait: Path, spied: Path, does: str) -> None:
    program = does.format(path=str(bait / "picture.jpg"), folder=str(bait), host=HOST)
    seen = spied / "seen"
    subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(spied), "PATH": os.environ["PATH"], "RES_OPTIONS": "attempts:1"},
        capture_output=True,
        timeout=60 * PATIENCE,
        check=False,
    )
    assert seen.read_text().count("\n") >= 1
    seen.unlink()
