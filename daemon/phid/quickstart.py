"""scripts/quickstart once phid is installed: broker, daemon, one question, all stopped."""

from __future__ import annotations

import argparse
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from phid import amounts, catalog, demo, fit, fleet, memory, programs, progress, store
from phid import settings as settings_module
from phid.client import Unreachable
from phid.sections import Mqtt

_PROMPT = "Why is the sky blue? Answer in two sentences."
_PICTURE_PROMPT = "Describe the scene."
_READY_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 15.0
_ANSWER_TIMEOUT_S = 900  # 96 tokens of a board that makes one in several seconds
_LOOPBACK = "127.0.0.1"
_SHOWN = (
    *("jobs_ok_total", "ttft_ms_p50", "tokens_per_s_p50"),
    *("cpu_pct", "service_rss_mb", "engine_rss_mb", "temp_c"),
)


class Failed(Exception):  # noqa: N818 - it reads as what it says
    """A part did not do what it should; the message says which, with its last words."""


class Stopped(BaseException):
    """The user wants it to end."""


class Part:
    """One phid command as a child process, its output in a file of its own."""

    def __init__(self, name: str, arguments: list[str], folder: Path, **settings: str) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        environment = programs.environment() | settings
        with self._log.open("wb") as log:
            # In a session of its own: a Ctrl-C reaches only us, and we end the parts in order.
            self._process = subprocess.Popen(  # noqa: S603 - our own command
                [*programs.command("phid"), *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def check(self) -> None:
        """Raise Failed with its last words if it has ended."""
        if self._process.poll() is not None:
            tail = "\n".join(self._log.read_text("utf-8", "replace").splitlines()[-8:])
            raise Failed(f"{self.name} ended with status {self._process.returncode}:\n{tail}")

    def stop(self) -> None:
        """End it, politely at first."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main(arguments: list[str] | None = None) -> int:
    """Run the quickstart: its exit status."""
    options = _parser().parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    parts: list[Part] = []
    try:
        with tempfile.TemporaryDirectory(prefix="phid-quickstart-") as folder:
            try:
                return _run(options, parts, Path(folder))
            finally:
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_IGN)
                for part in reversed(parts):
                    part.stop()
    except Stopped:
        _say("stopped")
        return 0
    except (Failed, demo.DemoError, Unreachable, settings_module.SettingsError) as error:
        _say(f"quickstart: {error}")
        return 1


def _run(options: argparse.Namespace, parts: list[Part], folder: Path) -> int:
    began = time.monotonic()
    config = folder / "phid.toml"
    config.touch()
    # From the environment alone, as the daemon's will be. The file of an installed daemon does not
    # count: its models are kept where this user may not write.
    models_dir = settings_module.load(config).models_dir
    demo.prepare(models_dir, progress.Progress())
    port = options.port or free_port()
    mqtt = Mqtt(host=_LOOPBACK, port=port)
    _say(f"starting a broker on {_LOOPBACK}:{port}, and phid as device {options.device}")
    where = ["--host", _LOOPBACK, "--port", str(port)]
    parts.append(Part("broker", ["broker", *where], folder))
    run = ["run", "--config", str(config), "--device", options.device, *where]
    models = {"PHID_MODELS_DIR": str(models_dir), "PHID_STATE_DIR": str(folder)}
    sees = _frame_model(models_dir, options.picture_model) if options.serve else ""
    engine = {"PHID_ENGINE__MODEL": demo.NAME, "PHID_ENGINE__FRAME_MODEL": sees}
    parts.append(Part("daemon", run, folder, **engine, **models))
    _wait_until_online(mqtt, options.device, parts)
    ask = [*programs.command("phid"), "ask", *where, "--device", options.device]
    ask += ["--timeout", str(_ANSWER_TIMEOUT_S)]
    if options.serve:
        return _serve(options, port, parts, sees)
    _say(f"\n> {_PROMPT}")
    status = _ask([*ask, "--max-tokens", "96", _PROMPT], parts)
    if status == 0:
        _say(_health_line(mqtt, options.device))
    if status == 0 and options.picture_model is not None:
        _say(f"\nthe same with a tiny vision model, and {options.picture}")
        parts.pop().stop()
        model = str(options.picture_model.resolve())
        parts.append(Part("daemon", run, folder, PHID_ENGINE__MODEL=model, **models))
        _wait_until_online(mqtt, options.device, parts)
        _say(f"\n> {_PICTURE_PROMPT}")
        looking = ["--image", str(options.picture), "--detail", "low"]
        status = _ask([*ask, *looking, _PICTURE_PROMPT], parts)
    if status == 0:
        _say(f"\nall in {time.monotonic() - began:.1f} s. Next: scripts/quickstart --serve")
    return status


def _ask(command: list[str], parts: list[Part]) -> int:
    status = subprocess.run(command, check=False).returncode  # noqa: S603 - our own command
    for part in parts:
        part.check()
    return status


def _frame_model(models_dir: Path, otherwise: Path | None) -> str:
    """The vision model to serve: the best stored one that memory holds, else `otherwise`.

    Empty where there is none at all.
    """
    stored = [model for model in store.models(models_dir) if model.kind == "vision"]
    this = fit.Machine(memory.total_bytes(), memory.available_bytes())
    if best := fit.preferred(stored, catalog.shipped(), this):
        return best.name
    return str(otherwise.resolve()) if otherwise else ""


def _serve(options: argparse.Namespace, port: int, parts: list[Part], sees: str) -> int:
    phid = "phid" if Path(sys.prefix) != _venv() else ".venv/bin/phid"
    topic = f"phid/v1/{options.device}/in/text/me"
    look = ""
    if sees:
        ask = f"  {phid} ask --port {port} --device {options.device}"
        look = f'{ask} --image {options.picture or "FILE"} "{_PICTURE_PROMPT}"\n'
    _say(
        f"""
next, in another terminal:
  {phid} ask --port {port} --device {options.device} "What is the capital of France?"
{look}  {phid} fleet --once --port {port}
  mosquitto_rr -V 5 -p {port} -t {topic} -e phid/v1/client/me/rx -m '{{"prompt":"Say hello."}}'
Ctrl-C stops both."""
    )
    print("ready", flush=True)
    while True:
        for part in parts:
            part.check()
        time.sleep(0.5)


def _wait_until_online(mqtt: Mqtt, device: str, parts: list[Part]) -> None:
    late = time.monotonic() + _READY_TIMEOUT_S
    while time.monotonic() < late:
        for part in parts:
            part.check()
        try:
            seen = fleet.look(mqtt, wait_s=0.5, connect_s=2.0)
        except Unreachable:
            continue
        if any(s.device == device and s.status.get("state") == "online" for s in seen.devices()):
            return
    raise Failed(f"the daemon was not online within {_READY_TIMEOUT_S:.0f} s")


def _health_line(mqtt: Mqtt, device: str) -> str:
    for seen in fleet.look(mqtt, wait_s=3.0).devices():
        if seen.device == device and seen.health:
            return "health: " + ", ".join(
                f"{k} {seen.health[k]}" for k in _SHOWN if k in seen.health
            )
    raise Failed("no health message came")


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _venv() -> Path:
    return Path(__file__).parents[2] / ".venv"


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise Stopped


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/quickstart",
        description="Install phid into .venv, and see a small real model answer over MQTT.",
        epilog="Settings are those of the environment, such as PHID_MODELS_DIR; no file is read.",
    )
    parser.add_argument("--serve", action="store_true", help="leave broker and daemon running")
    parser.add_argument("--port", type=amounts.port, help="the broker's port (default: a free one)")
    parser.add_argument("--device", default="demo", help="the device's name (default: demo)")
    parser.add_argument("--picture-model", type=Path, metavar="DIR", help="a vision model to show")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="what to show it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
