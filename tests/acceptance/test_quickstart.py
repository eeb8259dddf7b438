"""The quickstart as a user runs it: once through, and left running until told to stop."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phid import demo
from rig import ROOT, free_port, until, wait_for_port
from wire import PATIENCE, Requester

MODELS = ROOT / "tests" / "models"
COMMAND = [sys.executable, "-m", "phid.quickstart"]

pytestmark = pytest.mark.model


@pytest.fixture
def environment(models_dir: Path, tmp_path: Path) -> dict[str, str]:
    """A home of its own that has the demo model already."""
    cache = tmp_path / "cache"
    (cache / "phid").mkdir(parents=True)
    (cache / "phid" / "models").symlink_to(models_dir)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PHID_")}
    return clean | {"PYTHONPATH": str(ROOT / "daemon"), "XDG_CACHE_HOME": str(cache)}


@pytest.fixture
def port() -> int:
    return free_port()


def left_over(port: int) -> list[str]:
    """Processes that still name the port."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if f"--port {port}" in command:
            found.append(command)
    return found


def test_it_answers_in_words_and_about_a_picture_and_leaves_nothing_behind(
    environment: dict[str, str], port: int
) -> None:
    picture = [
        "--picture-model",
        str(MODELS / "tiny-phi3v"),
        "--picture",
        str(MODELS / "scene.jpg"),
    ]
    began = time.monotonic()
    done = subprocess.run(
        [*COMMAND, "--port", str(port), *picture],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"\bsky\b.*\bblue\b", done.stdout)
    assert "a green triangle, a yellow square and a lit lamp" in done.stdout
    assert re.search(r"\d+ tokens in, \d+ out; first after \d+ ms", done.stderr)
    assert "health: jobs_ok_total 1," in done.stderr
    assert time.monotonic() - began < 60
    assert not left_over(port)


@pytest.fixture
def serving(environment: dict[str, str], port: int) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*COMMAND, "--serve", "--port", str(port), "--device", "porch"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_left_running_it_answers_until_it_is_told_to_stop(
    serving: subprocess.Popen[str], port: int, number: int
) -> None:
    assert serving.stdout is not None
    said = ""
    while not said.endswith("ready\n"):
        line = serving.stdout.readline()
        assert line, said
        said += line
    assert f"--port {port} --device porch" in said
    with Requester(port, "porch") as asker:
        assert asker.ask("What is the capital of France?", max_tokens=16)["type"] == "result"
    serving.send_signal(number)
    assert serving.wait(20 * PATIENCE) == 0
    until(lambda: not left_over(port), 5, "the end of all it started")


@pytest.mark.parametrize(
    ("stored", "variable", "folder"),
    [
        (True, "XDG_CACHE_HOME", "phid/models"),
        (True, "PHID_MODELS_DIR", ""),
        (False, "XDG_CACHE_HOME", "phid/models"),
    ],
    ids=["in the models folder", "in the one that is set", "brought along"],
)
def test_left_running_it_looks_at_pictures(
    environment: dict[str, str],
    models_dir: Path,
    tmp_path: Path,
    port: int,
    variable: str,
    folder: str,
    *,
    stored: bool,
) -> None:
    own = tmp_path / "own"
    models = own / folder
    models.mkdir(parents=True)
    (models / demo.NAME).symlink_to(models_dir / demo.NAME)
    command = [*COMMAND, "--serve", "--port", str(port)]
    if stored:
        shutil.copytree(MODELS / "tiny-phi3v", models / "eyes")
    else:
        command += ["--picture-model", str(MODELS / "tiny-phi3v")]
    process = subprocess.Popen(
        command,
        env=environment | {variable: str(own)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = "".join(iter(process.stdout.readline, "ready\n"))
        line = next(line for line in said.splitlines() if "--image" in line)
        look = [part if part != "FILE" else str(MODELS / "scene.jpg") for part in shlex.split(line)]
        done = subprocess.run(
            [sys.executable, "-m", "phid", *look[1:]],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60 * PATIENCE,
            check=False,
        )
        assert "a green triangle, a yellow square and a lit lamp" in done.stdout, done.stderr
        assert f": {'eyes' if stored else 'tiny-phi3v'} on cpu" in done.stderr
    finally:
        process.terminate()
        process.communicate(timeout=20 * PATIENCE)


def test_a_port_that_is_taken_is_told_with_the_brokers_own_words(
    environment: dict[str, str], port: int
) -> None:
    broker = subprocess.Popen(
        [sys.executable, "-m", "phid", "broker", "--port", str(port)], env=environment
    )
    try:
        wait_for_port(port)
        done = subprocess.run(
            [*COMMAND, "--port", str(port)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60 * PATIENCE,
            check=False,
        )
        assert done.returncode == 1
        assert "broker ended with status 1" in done.stderr
        assert "Address already in use" in done.stderr
    finally:
        broker.terminate()
        assert broker.wait(10 * PATIENCE) == 0
