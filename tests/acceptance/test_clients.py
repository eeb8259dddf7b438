"""What people type: a client that nobody here wrote, and our own commands."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phid import exits
from rig import ROOT, Daemon, free_port, serving, until
from wire import BASE, PATIENCE, Requester

pytestmark = pytest.mark.mosquitto


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("clients")
    with serving(folder, health__discover_spread_s=0.1) as daemon:
        yield daemon


@pytest.fixture
def asker(daemon: Daemon) -> Iterator[Requester]:
    with Requester(daemon.port) as client:
        yield client


def start(port: int, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """`python -m phid` with these arguments."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PHID_")}
    return subprocess.Popen(
        [sys.executable, "-m", "phid", *arguments],
        env=clean
        | {
            "PYTHONPATH": str(ROOT / "daemon"),
            "PHID_MQTT__HOST": "127.0.0.1",
            "PHID_MQTT__PORT": str(port),
            "PHID_DEVICE": "dut",
        }
        | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def phid(
    port: int, *arguments: str, stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    process = start(port, *arguments, **environment)
    out, err = process.communicate(stdin, timeout=40 * PATIENCE)
    assert "Traceback" not in err, err
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def script(**directives: Any) -> str:
    return "@script " + json.dumps(directives)


# A client that nobody here wrote.


def test_mosquitto_rr_prints_the_result(daemon: Daemon) -> None:
    command = ["mosquitto_rr", "-p", str(daemon.port), "-V", "5"]
    command += ["-t", f"{BASE}/dut/in/text/me", "-e", f"{BASE}/client/me/rx"]
    answered = subprocess.run(
        [*command, "-m", '{"prompt": "one two three"}'],
        capture_output=True,
        timeout=20 * PATIENCE,
        check=True,
    )
    result = json.loads(answered.stdout)
    assert result["type"] == "result"
    assert result["text"] == "one two three"


# phid ask.


def test_the_readmes_program_prints_the_answer(daemon: Daemon) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for said, here in (('"localhost", 1883', f'"127.0.0.1", {daemon.port}'), ("/demo/", "/dut/")):
        assert program.count(said) == 1
        program = program.replace(said, here)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        timeout=20 * PATIENCE,
    )  # fmt: skip
    assert done.stdout == "What is the capital of France?\n"


def test_ask_prints_the_answer_and_says_how_it_went(daemon: Daemon) -> None:
    asked = phid(daemon.port, "ask", "one two three")
    assert (asked.returncode, asked.stdout) == (exits.OK, "one two three\n")
    assert "3 tokens in, 3 out" in asked.stderr
    assert "finish: stop" in asked.stderr


def test_ask_prints_json_by_the_schema_of_a_file(daemon: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "day.json"
    day = {"type": "object", "properties": {"day": {"enum": ["mon", "tue"]}}, "required": ["day"]}
    file.write_text(json.dumps(day))
    asked = phid(daemon.port, "ask", "--schema", str(file), "Which day?")
    assert (asked.returncode, json.loads(asked.stdout)) == (exits.OK, {"day": "mon"})
    for content, says in (
        ("{", "day.json: no JSON"),
        ('{"pattern": "x"}', "the keyword 'pattern' is not supported"),
        ("3", "must be an object, not a number"),
    ):
        file.write_text(content)
        asked = phid(daemon.port, "ask", "--schema", str(file), "Which day?")
        assert asked.returncode == exits.USAGE
        assert says in asked.stderr
    asked = phid(daemon.port, "ask", "--schema", str(tmp_path / "none.json"), "Which day?")
    assert asked.returncode == exits.USAGE


def test_ask_prints_the_answer_as_it_comes(daemon: Daemon) -> None:
    process = start(daemon.port, "ask", script(tokens=100, token_ms=30))
    assert process.stdout is not None
    assert process.stdout.read(3) == "t1 "
    assert process.poll() is None, "the rest is yet to come"
    rest, _ = process.communicate(timeout=40 * PATIENCE)
    assert "t1 " + rest == "".join(f"t{n} " for n in range(1, 101)) + "\n"
    assert process.returncode == exits.OK


def test_ask_reads_the_prompt_from_a_pipe(daemon: Daemon) -> None:
    assert phid(daemon.port, "ask", "-", stdin="from a pipe").stdout == "from a pipe\n"


def test_ask_prints_one_json_object(daemon: Daemon) -> None:
    asked = phid(daemon.port, "ask", "--json", "one two")
    assert json.loads(asked.stdout)["text"] == "one two"
    assert asked.stderr == ""


def test_ask_sends_the_system_turn_and_the_length(daemon: Daemon) -> None:
    arguments = ("ask", "--json", "--max-tokens", "2", "--system", "a b c d", "one two three")
    result = json.loads(phid(daemon.port, *arguments).stdout)
    assert result["text"] == "one two "
    assert result["finish"] == "length"
    assert result["usage"]["prompt_tokens"] == 7


def test_ask_tells_an_error_by_code_and_status(daemon: Daemon) -> None:
    asked = phid(daemon.port, "ask", "-", stdin="w " * 5000)
    assert asked.returncode == exits.ERROR
    assert asked.stdout == ""
    assert "too_large" in asked.stderr
    asked = phid(daemon.port, "ask", "--json", "-", stdin="w " * 5000)
    assert asked.returncode == exits.ERROR
    assert json.loads(asked.stdout)["code"] == "too_large"


def test_ask_that_loses_its_engine_keeps_what_it_has_printed(daemon: Daemon) -> None:
    process = start(daemon.port, "ask", script(tokens=500, token_ms=10))
    assert process.stdout is not None
    assert process.stdout.read(3) == "t1 "
    os.kill(daemon.engine_pid, signal.SIGKILL)
    _, err = process.communicate(timeout=40 * PATIENCE)
    assert process.returncode == exits.ERROR
    assert "engine_lost" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("ask",),
        ("ask", "--max-tokens", "0", "x"),
        ("ask", "--max-tokens", "many", "x"),
        ("ask", "--temperature", "9", "x"),
        ("ask", " "),
        ("ask", "x", "--loud"),
        *(("ask", "x", "--timeout", "0"), ("ask", "x", "--timeout", "inf")),
        *(("fleet", "--wait", "-1"), ("fleet", "--wait", "0"), ("fleet", "--every", "nan")),
        *(("fleet", "--every", "1e300"), ("doctor", "--wait", "-1")),
        ("models", "fit", "--context", "0"),
        ("tell",),
        (),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, tuple) else "",
)
def test_wrong_usage_is_told_and_ends_with_2(daemon: Daemon, arguments: tuple[str, ...]) -> None:
    asked = phid(daemon.port, *arguments)
    assert asked.returncode == 2
    assert asked.stdout == ""
    assert asked.stderr


@pytest.mark.parametrize("port", ["99999", "0", "-1", "x", ""])
@pytest.mark.parametrize(
    "command", ["run", "ask x", "fleet", "doctor", "broker", "config show", "quickstart"]
)
def test_a_port_that_is_none_is_told_with_what_is_one(command: str, port: str) -> None:
    module = ["phid.quickstart"] if command == "quickstart" else ["phid", *command.split()]
    done = subprocess.run(
        [sys.executable, "-m", *module, f"--port={port}"],
        env=os.environ | {"PYTHONPATH": str(ROOT / "daemon")},
        capture_output=True,
        text=True,
        timeout=20 * PATIENCE,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.endswith("error: argument --port: must be a port, 1 to 65535\n")


def test_what_is_wrong_with_a_question_is_told_as_a_device_would(daemon: Daemon) -> None:
    asked = phid(daemon.port, "ask", "x", "--temperature", "9")
    assert asked.stderr == "phid ask: temperature: must be 2 or less\n"


def test_ask_says_that_there_is_no_broker() -> None:
    port = free_port()
    asked = phid(port, "ask", "--timeout", "1", "x")
    assert asked.returncode == exits.UNREACHABLE
    assert str(port) in asked.stderr


def test_ask_says_that_nobody_answers(daemon: Daemon) -> None:
    asked = phid(daemon.port, "ask", "--device", "nobody", "--timeout", "1", "x")
    assert asked.returncode == exits.NO_ANSWER
    assert "nobody" in asked.stderr
    assert "phid fleet" in asked.stderr


def test_ask_says_that_the_device_takes_nothing_now_and_waits_where_it_may(
    daemon: Daemon, asker: Requester
) -> None:
    asker.ctl("pause")
    try:
        asked = phid(daemon.port, "ask", "x")
        waiting = start(daemon.port, "ask", "--wait", "patience")
        until(lambda: asker.ctl("ping")["ok"])
    finally:
        asker.ctl("resume")
    assert asked.returncode == exits.BUSY
    assert "paused" in asked.stderr
    out, _ = waiting.communicate(timeout=40 * PATIENCE)
    assert (waiting.returncode, out) == (exits.OK, "patience\n")


def test_ask_hears_a_refusal_of_what_was_too_large_to_have_its_id_read(daemon: Daemon) -> None:
    asked = phid(daemon.port, "ask", "-", stdin="x" * 1_100_000)
    assert asked.returncode == 1
    assert asked.stderr.startswith("phid: too_large: ")


def test_ask_whose_time_is_up_prints_what_there_is(daemon: Daemon) -> None:
    asked = phid(daemon.port, "ask", "--timeout", "2", script(tokens=2000, token_ms=20))
    assert asked.returncode == 6
    assert asked.stdout.startswith("t1 t2 ")
    assert "finish: deadline" in asked.stderr


def test_ask_that_is_interrupted_cancels_its_request(daemon: Daemon, asker: Requester) -> None:
    asker.listen(f"{BASE}/dut/out/event")
    process = start(daemon.port, "ask", script(tokens=250, token_ms=50))
    assert process.stdout is not None
    process.stdout.read(3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=40 * PATIENCE)
    assert process.returncode == exits.INTERRUPTED
    event = asker.wait(lambda h: h.topic.endswith("/event") and h.json.get("type") == "job")
    assert event.json["outcome"] == "cancelled"


# phid chat.


def turns_kept(daemon: Daemon, client: str, session: str) -> int:
    with Requester(daemon.port, name=client) as asker:
        return int(asker.ask("x", session=session)["session_turns"])


def test_chat_goes_on_from_line_to_line_and_leaves_nothing(
    daemon: Daemon, asker: Requester
) -> None:
    said = f"hello\n\n{script(recall=True)}\n"
    asker.listen(f"{BASE}/dut/in/#")
    told = phid(daemon.port, "chat", "--system", "Be brief.", "--client", "talker", stdin=said)
    assert told.returncode == 0
    shown = [["system", "Be brief."], ["user", "hello"], ["assistant", "hello"]]
    assert told.stdout == f"hello\n{json.dumps(shown)}\n"
    assert [line.rpartition("; ")[2] for line in told.stderr.splitlines()] == [
        "after 0 turns",
        "after 2 turns",
    ]
    forgotten = asker.wait(lambda h: "/in/cancel/talker" in h.topic).json["session"]
    assert turns_kept(daemon, "talker", forgotten) == 0


def test_chat_keeps_a_session_that_has_a_name(daemon: Daemon) -> None:
    mine = ("chat", "--client", "me", "--session", "hall")
    phid(daemon.port, *mine, stdin="one\n")
    assert phid(daemon.port, *mine, stdin="two\n").stderr.endswith("; after 2 turns\n")
    assert turns_kept(daemon, "me", "hall") == 4
    assert phid(daemon.port, "chat", "--session", "hall").returncode == exits.USAGE


def test_chat_ends_where_nobody_is_and_tells_what_is_wrong(daemon: Daemon) -> None:
    assert phid(free_port(), "chat", stdin="x\n").returncode == exits.UNREACHABLE
    nobody = phid(daemon.port, "chat", stdin="x\ny\n", PHID_DEVICE="nobody")
    assert (nobody.returncode, nobody.stderr.count("nobody")) == (exits.NO_ANSWER, 1)
    wrong = phid(daemon.port, "chat", "--temperature", "9", stdin="x\n")
    assert (wrong.returncode, "temperature" in wrong.stderr) == (exits.USAGE, True)
    failed = phid(daemon.port, "chat", stdin=f"{script(fail_at=1)}\nand on\n")
    assert (failed.returncode, "internal" in failed.stderr) == (exits.ERROR, True)
    assert failed.stdout == "and on\n"
    name = phid(daemon.port, "chat", "--client", "a+", stdin="x\n")
    assert (name.returncode, "client" in name.stderr) == (exits.USAGE, True)
    nul = phid(daemon.port, "chat", stdin="a\0b\n")
    assert (nul.returncode, "NUL" in nul.stderr) == (exits.USAGE, True)


def test_chat_with_what_is_no_text_says_so(daemon: Daemon) -> None:
    command = [sys.executable, "-m", "phid", "chat", "--port", str(daemon.port), "--device", "dut"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "daemon")}
    for said in (b"caf\xe9\n", b"good\ncaf\xe9\n"):
        told = subprocess.run(
            command, input=said, env=environment, capture_output=True, timeout=60, check=False
        )
        assert (told.returncode, b"Traceback" in told.stderr) == (exits.USAGE, False), told.stderr
    closed = subprocess.run(
        ["sh", "-c", f"exec {' '.join(command)} <&-"], env=environment, timeout=60, check=False
    )
    assert closed.returncode == 0


def test_ctrl_c_ends_an_answer_and_ctrl_d_the_chat(daemon: Daemon) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "phid", "chat", "--port", str(daemon.port), "--device", "dut"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "daemon"), "TERM": "dumb"}
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    ) as process:
        os.close(theirs)
        seen = b""

        def wait_for(word: bytes) -> None:
            nonlocal seen
            while word not in seen:
                seen += os.read(ours, 4096)
            seen = seen.partition(word)[2]

        wait_for(b"> ")
        os.write(ours, script(tokens=500, token_ms=20).encode() + b"\n")
        wait_for(b"t3 ")
        process.send_signal(signal.SIGINT)
        wait_for(b"cancelled")
        wait_for(b"> ")
        os.write(ours, b"and now?\n")
        wait_for(b"after 2 turns")
        wait_for(b"> ")
        os.write(ours, b"\x04")
        assert process.wait(20 * PATIENCE) == 0
    os.close(ours)


# phid fleet.


def test_fleet_shows_who_is_there(daemon: Daemon, asker: Requester) -> None:
    asker.ask("one two three")
    shown = phid(daemon.port, "fleet", "--once", "--wait", "1")
    assert shown.returncode == 0
    header, line = shown.stdout.splitlines()
    assert header.split()[:3] == ["device", "state", "model"]
    assert line.split()[:5] == ["dut", "online", "scripted", "cpu", "0"]
    (row,) = json.loads(phid(daemon.port, "fleet", "--once", "--json", "--wait", "1").stdout)
    assert row["state"] == "online"
    assert row["queue"] == 0
    assert row["tokens_per_s"] > 0
    assert "temp_c" in row


def test_fleet_shows_the_dead_too(daemon: Daemon, tmp_path: Path, asker: Requester) -> None:
    other = Daemon(daemon.port, tmp_path, "gone")
    other.start()
    with Requester(daemon.port, "gone") as watcher:
        watcher.listen(f"{BASE}/gone/out/status")
        watcher.status("online")
        other.stop(signal.SIGKILL)
        watcher.status("offline")
    rows = json.loads(phid(daemon.port, "fleet", "--once", "--json", "--wait", "1").stdout)
    assert {row["device"]: row["state"] for row in rows} == {"dut": "online", "gone": "offline"}
    for what in ("status", "info"):
        asker.publish(f"{BASE}/gone/out/{what}", b"", retain=True)


def test_fleet_without_devices_says_so(daemon: Daemon) -> None:
    shown = phid(daemon.port, "fleet", "--once", "--wait", "0.2", PHID_MQTT__BASE="no/where")
    assert shown.returncode == exits.NO_ANSWER
    assert "no/where" in shown.stderr
    shown = phid(
        daemon.port, "fleet", "--once", "--json", "--wait", "0.2", PHID_MQTT__BASE="no/where"
    )
    assert json.loads(shown.stdout) == []


def test_fleet_goes_on_until_ctrl_c_which_is_its_end(daemon: Daemon) -> None:
    process = start(daemon.port, "fleet", "--json", "--wait", "0.5", "--every", "0.1")
    assert process.stdout is not None
    for _ in range(2):
        (row,) = json.loads(process.stdout.readline())
        assert row["device"] == "dut"
    assert interrupted(process) == (exits.OK, "")


# Ctrl-C while there is no answer yet.


def interrupted(process: subprocess.Popen[str]) -> tuple[int, str]:
    """How a command ends on Ctrl-C: its status, and what it says."""
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=40 * PATIENCE)
    return process.returncode, said.strip()


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (("ask", "hello"), exits.INTERRUPTED),
        (("ask", "hello", "--wait"), exits.INTERRUPTED),
        (("fleet", "--once"), exits.INTERRUPTED),
        (("fleet",), exits.OK),
        (("doctor",), exits.INTERRUPTED),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, tuple) else "",
)
def test_ctrl_c_while_connecting_ends_it_without_a_traceback(
    command: tuple[str, ...], status: int, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        process = start(silent.getsockname()[1], *command, PHID_MODELS_DIR=str(tmp_path))
        silent.settimeout(20 * PATIENCE)
        with silent.accept()[0]:
            assert interrupted(process) == (status, "")


# phid models, --help.


def test_models_lists_what_is_there(tmp_path: Path) -> None:
    nothing = phid(1, "models", PHID_MODELS_DIR=str(tmp_path))
    assert nothing.returncode == 0
    assert "`phid models fit` says which to pull" in nothing.stdout
    (tmp_path / "tiny").mkdir()
    config = {"model": {"type": "phi3", "context_length": 4096}}
    (tmp_path / "tiny" / "genai_config.json").write_text(json.dumps(config))
    (tmp_path / "no-model").mkdir()
    assert "tiny" in phid(1, "models", PHID_MODELS_DIR=str(tmp_path)).stdout
    (row,) = json.loads(phid(1, "models", "--json", PHID_MODELS_DIR=str(tmp_path)).stdout)
    assert (row["name"], row["type"], row["context"]) == ("tiny", "phi3", 4096)


@pytest.mark.model
def test_models_lists_the_demo_model(models_dir: Path) -> None:
    assert "smollm2-135m-instruct" in phid(1, "models", PHID_MODELS_DIR=str(models_dir)).stdout


@pytest.mark.parametrize("command", ["", "run", "ask", "chat", "fleet", "models", "broker"])
def test_help_is_given(command: str) -> None:
    shown = phid(1, *filter(None, [command]), "--help")
    assert shown.returncode == 0
    assert shown.stdout.startswith("usage: phid")
    words = {"": "phid ask", "ask": "exit status", "run": "--device", "broker": "MQTT 5"}
    assert words.get(command, command) in shown.stdout


def test_a_wrong_setting_is_told_in_a_line() -> None:
    for command in (("run",), ("ask", "x"), ("fleet", "--once"), ("models",)):
        shown = phid(1, *command, PHID_MQTT__PROT="1")
        assert shown.returncode == 78
        assert "PHID_MQTT__PORT" in shown.stderr
