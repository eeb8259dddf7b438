"""What phid.service and scripts/install promise, tried under a real systemd: see prove-systemd.

Run as root inside a machine made for it: it stops, breaks, upgrades and removes the installation.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT / "tests"))

from wire import BASE, Requester  # noqa: E402 - found by the line above

CONFIG = Path("/etc/phid/phid.toml")
DROP_INS = Path("/etc/systemd/system/phid.service.d")
CREDENTIALS = Path("/etc/phid/credentials")
UNIT = "phid.service"
PORT = 1883


def run(*argv: str | Path, check: bool = True, **options: Any) -> str:
    done = subprocess.run(
        [str(part) for part in argv], capture_output=True, text=True, check=False, **options
    )
    output = done.stdout + done.stderr
    assert not check or done.returncode == 0, f"{argv}: {done.returncode}: {output[-2000:]}"
    return output


def install(*arguments: str | Path, checkout: Path = CHECKOUT) -> tuple[int, str]:
    argv = [checkout / "scripts/install", "--offline", OPTIONS.wheelhouse, *arguments]
    done = subprocess.run([str(part) for part in argv], capture_output=True, text=True, check=False)
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
def requester(session_expiry_s: int = 0) -> Iterator[Requester]:
    with Requester(PORT, device(), session_expiry_s=session_expiry_s) as client:
        client.listen(f"{BASE}/{client.device}/out/status")
        yield client


def online(timeout: float = 60) -> None:
    with requester() as client:
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


# The promises, in the order in which they are tried.


def it_runs_as_its_own_user_without_rights_and_behind_the_filter() -> str:
    user = pwd.getpwnam("phid").pw_uid
    for process in (pid(), engine_pid()):
        status = Path(f"/proc/{process}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert fields["Uid"].split() == [str(user)] * 4, fields["Uid"]
        assert fields["NoNewPrivs"] == "1"
        assert fields["Seccomp"] == "2"
        assert int(fields["CapBnd"], 16) == int(fields["CapEff"], 16) == 0
    assert Path(f"/proc/{engine_pid()}/oom_score_adj").read_text().strip() == "800"
    exposure = run("systemd-analyze", "security", "--no-pager", UNIT).splitlines()[-1]
    return exposure.strip("→ 🙂")


def it_answers() -> str:
    with requester() as client:
        text = client.ask("What is the capital of France?", max_tokens=16)["text"]
    assert "Paris" in text, text
    return repr(text)


def the_journal_has_fields_and_priorities() -> str:
    lines = [json.loads(line) for line in words(0, "-o", "json").splitlines()]
    ours = [line for line in lines if line.get("_COMM") in ("phid", "python")]
    events = {}
    for line in ours:
        content = json.loads(line["MESSAGE"])
        events[content["event"]] = line
        assert line["_SYSTEMD_UNIT"] == UNIT
        assert line["SYSLOG_IDENTIFIER"] == "phid"
    assert {"service_started", "broker_connected", "model_loaded"} <= events.keys(), events.keys()
    assert events["model_loaded"]["PRIORITY"] == "6"
    # Nothing that the runtime complains of: a system call that it missed, say.
    assert "engine_output" not in events, events["engine_output"]["MESSAGE"]
    return f"{len(ours)} lines, {len(events)} kinds of event"


def errors_are_errors_in_the_journal() -> str:
    began = time.time()
    run("systemctl", "stop", "mosquitto")
    run("systemctl", "start", "mosquitto")
    online()
    told = [
        line
        for line in words(began - 1, "-o", "json", "-p", "warning").splitlines()
        if "broker_away" in json.loads(line)["MESSAGE"]
    ]
    assert told
    return "a broker that was away is a warning: journalctl -p warning -u phid"


def a_reload_takes_new_settings_without_a_new_process() -> str:
    before, began = pid(), time.time()
    run("systemctl", "reload", UNIT)
    until(lambda: "settings_reloaded" in words(began - 1), what="the reload")
    assert pid() == before
    return "SIGHUP"


def a_restart_by_command_keeps_the_process() -> str:
    before, restarts = pid(), show("NRestarts")
    with requester() as client:
        client.ctl("restart", what="service")
        client.status("offline")
        client.status("online", 60)
    # Longer than TimeoutStopSec: systemd must not take it for a service that stops.
    time.sleep(65)
    assert (pid(), show("NRestarts"), show("SubState")) == (before, restarts, "running")
    return "and systemd lets it live"


def a_service_that_stands_still_is_killed_and_started_again() -> str:
    before, began, wall = pid(), time.monotonic(), time.time()
    restarts = int(show("NRestarts"))
    os.kill(before, signal.SIGSTOP)
    until(lambda: pid() not in (0, before), 90, "the watchdog's restart")
    took_s = time.monotonic() - began
    online()
    assert int(show("NRestarts")) == restarts + 1
    assert "Watchdog timeout" in words(wall)
    return f"another process after {took_s:.0f} s, then online"


def an_engine_that_is_killed_leaves_the_service_up() -> str:
    before, restarts = pid(), show("NRestarts")
    with requester() as client:
        os.kill(engine_pid(), signal.SIGKILL)
        client.wait(lambda h: '"degraded"' in h.payload.decode(), 20, "degraded")
        client.status("online", 30)
        assert client.ask("Say hello.", max_tokens=4)["type"] == "result"
    assert pid() == before
    assert show("NRestarts") == restarts
    return "the same service, another engine"


def a_kernel_that_ends_the_engine_for_memory_leaves_the_service_up() -> str:
    group = Path("/sys/fs/cgroup" + show("ControlGroup"))
    if not (group / "memory.max").exists():
        return "LEFT OUT: this machine gives its containers no memory controller"
    before, wall = pid(), time.time()
    now = int((group / "memory.current").read_text())
    run("systemctl", "set-property", "--runtime", UNIT, f"MemoryMax={now // 2}", "MemorySwapMax=0")
    try:
        until(lambda: "engine_ended" in words(wall), what="the end of the engine")
    finally:
        run("systemctl", "set-property", "--runtime", UNIT, "MemoryMax=infinity")
    online()
    assert pid() == before
    return "the same service, another engine"


def a_stop_answers_what_was_accepted() -> str:
    with requester() as client:
        client.status("online")
        client.request({"id": "last", "prompt": "Count to one hundred.", "max_tokens": 200})
        client.wait(lambda h: h.topic.endswith("/out/status") and h.json["queue"] >= 0)
        time.sleep(0.3)
        began, wall = time.monotonic(), time.time()
        run("systemctl", "stop", UNIT)
        took_s = time.monotonic() - began
        outcome = client.outcome("last", 5)
        client.status("offline", 5)
    assert outcome["type"] == "result", outcome
    assert show("Result") == "success"
    assert show("ExecMainStatus") == "0"
    assert "service_stopped" in words(wall - 1)
    run("systemctl", "start", UNIT)
    online()
    return f"{outcome['usage']['output_tokens']} tokens, stopped after {took_s:.1f} s"


def wrong_settings_end_it_with_78_and_it_is_not_tried_again() -> str:
    good, wall = CONFIG.read_text(), time.time()
    CONFIG.write_text(good + "\n[mqtt\nhost = ")
    try:
        run("systemctl", "restart", UNIT, check=False)
        until(lambda: show("ActiveState") == "failed", what="the end")
        time.sleep(4)  # twice RestartSec
        assert show("ExecMainStatus") == "78"
        assert show("NRestarts") == "0"
        said = words(wall)
        assert "/etc/phid/phid.toml" in said, said
        assert "Traceback" not in said, said
    finally:
        CONFIG.write_text(good)
    start_anew()
    return re.search(r"phid\[\d+\]: phid: (.*)", said)[1]  # type: ignore[index]


def a_rival_ends_it_with_75_and_it_is_not_tried_again() -> str:
    # Of two, the one with the greater name gives way; it is drawn at each start.
    rival_argv = ["/opt/phid/.venv/bin/phid", "run", "--config", str(CONFIG)]
    state = {"PHID_STATE_DIR": "/tmp/rival", "PHID_MODELS_DIR": "/tmp/none"}  # noqa: S108
    for _ in range(20):
        rival = subprocess.Popen(rival_argv, env=os.environ | state, stderr=subprocess.DEVNULL)
        until(
            lambda rival=rival: rival.poll() is not None or show("ActiveState") == "failed",
            200,  # the pauses between connections grow to a minute
            "one of the two giving way",
        )
        if rival.poll() is None:
            break
        assert rival.returncode == 75
    else:
        raise AssertionError("the rival gave way twenty times")
    time.sleep(4)
    assert show("ExecMainStatus") == "75"
    assert show("ActiveState") == "failed"
    rival.terminate()
    rival.wait(20)
    start_anew()
    return "the rival stayed"


def a_credential_reaches_it_and_a_missing_one_is_named() -> str:
    secret = CREDENTIALS / "mqtt-password"
    secret.write_text("of no use to this broker\n")
    secret.chmod(0o600)
    status, said = install()
    assert status == 0, said
    (loaded,) = Path("/run/credentials").glob(f"{UNIT}/mqtt-password")
    assert loaded.read_text() == secret.read_text()
    wall = time.time()
    secret.unlink()
    status, said = install("--upgrade")
    assert status == 1
    assert f"the credential {secret} is gone: put it back" in said, said
    run("systemctl", "restart", UNIT, check=False)
    assert show("ActiveState") != "active"
    assert f"AssertPathExists={secret}" in run("systemctl", "status", UNIT, check=False) + words(
        wall
    )
    (DROP_INS / "70-credentials.conf").unlink()
    run("systemctl", "daemon-reload")
    start_anew()
    return said.strip().splitlines()[-1].removeprefix("scripts/install: ")


def a_read_only_disk_is_told() -> str:
    wall = time.time()
    with drop_in("[Service]\nReadOnlyPaths=/var/lib/phid\n"), requester() as client:
        run("systemctl", "restart", UNIT)
        client.status("degraded", 30)
        reason = client.status("degraded")["reason"]
        assert "Traceback" not in words(wall)
    start_anew()
    return str(reason)


def a_read_only_var_is_told_by_the_installer() -> str:
    wheels = OPTIONS.wheelhouse
    argv = f"mount -o bind,ro /var /var && {CHECKOUT}/scripts/install --offline {wheels}"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f"mount --bind /var /var && {argv}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "/var/lib/phid cannot be written: Read-only file system" in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1].removeprefix("scripts/install: ")


def a_disk_without_room_is_told_and_changes_nothing() -> str:
    before = pid()
    other = _another("0.1.7")
    wheels = OPTIONS.wheelhouse
    script = (
        "cp -a /opt/phid /tmp/kept && mount -t tmpfs -o size=60M tmpfs /opt/phid/venvs &&"
        f" {other}/scripts/install --offline {wheels}"
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False
    )
    shutil.rmtree("/tmp/kept")  # noqa: S108
    assert done.returncode == 1, done.stderr
    assert "MiB free" in done.stderr, done.stderr
    assert pid() == before
    return done.stderr.strip().splitlines()[-1].removeprefix("scripts/install: ")


def run_again_it_changes_nothing() -> str:
    before, began = pid(), time.monotonic()
    status, said = install()
    assert status == 0, said
    assert pid() == before
    acts = [line for line in said.splitlines() if line.startswith("+ ")]
    changing = [act for act in acts if re.match(r"\+ (write|link|remove|copy|.*restart)", act)]
    assert not changing, changing
    return f"{time.monotonic() - began:.1f} s"


def limits_of_memory_come_from_the_settings() -> str:
    good = CONFIG.read_text()
    CONFIG.write_text(good.replace("#memory_mb = 0", "memory_mb = 1000"))
    try:
        status, said = install()
        assert status == 0, said
        high, most = int(show("MemoryHigh")) >> 20, int(show("MemoryMax")) >> 20
        assert 1000 < high < most < 2000, (high, most)
    finally:
        CONFIG.write_text(good)
    status, said = install()
    assert status == 0, said
    assert show("MemoryMax") == "infinity"
    return f"engine.memory_mb = 1000: MemoryHigh {high} MiB, MemoryMax {most} MiB"


def changed_defaults_are_put_beside_the_settings() -> str:
    other = _another("0.1.1")
    defaults = other / "config/phid.toml"
    defaults.write_text(defaults.read_text() + "# new\n")
    CONFIG.write_text(CONFIG.read_text() + "# mine\n")
    mine = CONFIG.read_text()
    status, said = install("--upgrade", checkout=other)
    assert status == 0, said
    assert CONFIG.read_text() == mine
    assert CONFIG.with_name("phid.toml.new").read_text().endswith("# new\n")
    return "phid.toml.new"


def an_upgrade_loses_no_request() -> str:
    other = _another("0.1.2")
    asked: list[str] = []
    over = threading.Event()
    with requester(session_expiry_s=3600) as client:
        client.status("online")
        began = time.monotonic()
        for _ in range(3):
            client.ask("Say hello.", max_tokens=4)
        every_s = time.monotonic() - began  # a third of what it can do, however busy the machine

        def keep_asking() -> None:
            while not over.is_set():
                asked.append(f"r{len(asked)}")
                client.request({"id": asked[-1], "prompt": "Say hello.", "max_tokens": 4})
                over.wait(every_s)

        asking = threading.Thread(target=keep_asking)
        asking.start()
        time.sleep(2)
        status, said = install("--upgrade", checkout=other)
        time.sleep(2)
        over.set()
        asking.join()
        assert status == 0, said
        outcomes = Counter(_kind(client.outcome(one, 60)) for one in asked)
        several = [one for one in asked if len(client.outcomes(one)) != 1]
        states = [h for h in client.heard if h.topic.endswith("/out/status")]
    assert not several, several
    away = next(h for h in states if h.json["state"] in ("draining", "offline"))
    gone = next(h for h in states if h.json["state"] == "offline")
    back = next(h for h in states if h.json["state"] == "online" and h.at > gone.at)
    assert back.json["version"] == "0.1.2", back.json
    down_s, load_s = back.at - away.at, _load_ms() / 1000
    assert down_s <= load_s + 3, (down_s, load_s)
    counts = ", ".join(f"{n} {kind}" for kind, n in outcomes.most_common())
    return (
        f"{len(asked)} requests, each with one outcome: {counts}; no new ones taken for"
        f" {down_s:.2f} s: {gone.at - away.at:.2f} drain, {load_s:.2f} load"
    )


def a_version_that_does_not_become_well_is_rolled_back() -> str:
    link, unit = Path("/opt/phid/.venv"), Path("/etc/systemd/system/phid.service")
    in_use, unit_text, told = link.readlink(), unit.read_text(), []
    start = "    def _start(self) -> None:\n"
    faults = {
        "it ends at its start": (
            "service.py",
            lambda t: t.replace(start, f"{start}        1 / 0\n"),
        ),
        "it has no runtime": (
            "runtime.py",
            lambda t: t.replace("import onnxruntime_genai", "import no_such_runtime"),
        ),
    }
    for what, (name, fault) in faults.items():
        other = _another("0.1.3")
        module = other / "daemon/phid" / name
        sound = module.read_text()
        module.write_text(fault(sound))
        assert module.read_text() != sound
        (other / "systemd/phid.service").write_text(unit_text + f"# {what}\n")
        began = time.monotonic()
        status, said = install("--upgrade", checkout=other)
        assert status == 1, said
        assert "rolled back: it is online" in said, said
        assert link.readlink() == in_use
        assert unit.read_text() == unit_text
        told.append(f"{what}: back after {time.monotonic() - began:.0f} s")
    with requester() as client:
        assert client.ask("Say hello.", max_tokens=4)["type"] == "result"
        assert client.ctl("ping")["data"]["version"] == "0.1.2"
    return "; ".join(told)


def settings_cut_off_in_the_middle_stop_an_upgrade_before_it_does_anything() -> str:
    before, good = pid(), CONFIG.read_text()
    CONFIG.write_text(good[: len(good) // 2] + '\n[mqtt]\nhost = "bro')
    try:
        status, said = install("--upgrade", checkout=_another("0.1.4"))
    finally:
        CONFIG.write_text(good)
    assert status == 1
    assert "/etc/phid/phid.toml cannot be used; mend it and run this again" in said, said
    assert pid() == before
    return said.strip().splitlines()[-1]


def uninstalled_it_keeps_what_is_not_its_own() -> str:
    status, said = install("--uninstall")
    assert status == 0, said
    assert CONFIG.exists()
    assert Path("/var/lib/phid/journal.db").exists()
    left = [path for path in ("/opt/phid", "/usr/local/bin/phid", DROP_INS) if Path(path).exists()]
    assert not left, left
    assert "could not be found" in run("systemctl", "status", UNIT, check=False)
    return "settings, state and models are kept"


def installed_again_it_finds_its_state_and_purged_it_leaves_nothing() -> str:
    began = time.monotonic()
    status, said = install()
    assert status == 0, said
    again_s = time.monotonic() - began
    status, said = install("--uninstall", "--purge")
    assert status == 0, said
    left = [path for path in ("/etc/phid", "/var/lib/phid", "/opt/phid") if Path(path).exists()]
    assert not left, left
    assert "phid:" not in Path("/etc/passwd").read_text()
    return f"online again after {again_s:.0f} s"


def _kind(outcome: dict[str, Any]) -> str:
    return outcome["type"] if outcome["type"] == "result" else f"error {outcome['code']}"


def _load_ms() -> int:
    lines = [json.loads(line)["MESSAGE"] for line in words(0, "-o", "json").splitlines()]
    loads = [json.loads(line) for line in lines if '"model_loaded"' in line]
    return int(loads[-1]["ms"])


def _another(version: str) -> Path:
    """This checkout, as another version."""
    folder = Path("/root/other") / version / "phid"
    shutil.rmtree(folder.parent, ignore_errors=True)
    shutil.copytree(CHECKOUT, folder, ignore=shutil.ignore_patterns(".git", ".venv"))
    about = folder / "daemon/phid/__init__.py"
    about.write_text(re.sub('__version__ = ".*"', f'__version__ = "{version}"', about.read_text()))
    return folder


PROMISES: tuple[Callable[[], str], ...] = (
    it_runs_as_its_own_user_without_rights_and_behind_the_filter,
    it_answers,
    the_journal_has_fields_and_priorities,
    errors_are_errors_in_the_journal,
    a_reload_takes_new_settings_without_a_new_process,
    a_restart_by_command_keeps_the_process,
    a_service_that_stands_still_is_killed_and_started_again,
    an_engine_that_is_killed_leaves_the_service_up,
    a_kernel_that_ends_the_engine_for_memory_leaves_the_service_up,
    a_stop_answers_what_was_accepted,
    wrong_settings_end_it_with_78_and_it_is_not_tried_again,
    a_rival_ends_it_with_75_and_it_is_not_tried_again,
    a_credential_reaches_it_and_a_missing_one_is_named,
    a_read_only_disk_is_told,
    a_read_only_var_is_told_by_the_installer,
    a_disk_without_room_is_told_and_changes_nothing,
    run_again_it_changes_nothing,
    limits_of_memory_come_from_the_settings,
    changed_defaults_are_put_beside_the_settings,
    an_upgrade_loses_no_request,
    a_version_that_does_not_become_well_is_rolled_back,
    settings_cut_off_in_the_middle_stop_an_upgrade_before_it_does_anything,
    uninstalled_it_keeps_what_is_not_its_own,
    installed_again_it_finds_its_state_and_purged_it_leaves_nothing,
)


def main() -> int:
    broken = 0
    for promise in PROMISES:
        name, began = promise.__name__.replace("_", " "), time.monotonic()
        if OPTIONS.only and not re.search(OPTIONS.only, name):
            continue
        try:
            verdict, says = "ok ", promise()
        except Exception as error:  # noqa: BLE001 - the others are tried too
            verdict, says = (
                "BAD",
                f"{type(error).__name__}: {error}\n{words(time.time() - 60)[-3000:]}",
            )
            broken += 1
        print(f"{verdict} {name} ({time.monotonic() - began:.0f} s)\n      {says}", flush=True)
    print(f"{broken} of {len(PROMISES)} promises are broken" if broken else "all promises are kept")
    return int(broken > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheelhouse", type=Path, required=True)
    parser.add_argument("--only", metavar="REGEX", help="just the promises whose name has this")
    OPTIONS = parser.parse_args()
    sys.exit(main())
