"""What scripts/install promises: limits, upgrades and the way back."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from systemd_proof.machine import (
    CHECKOUT,
    CONFIG,
    DROP_INS,
    UNIT,
    WHEELHOUSE,
    MemoryGroup,
    install,
    pid,
    requester,
    run,
    show,
    words,
)

LINK = Path("/opt/phid/.venv")
"""What of /opt/phid/venvs is in use."""


def a_wheel_that_was_changed_is_not_installed() -> str:
    before, in_use, there = pid(), LINK.readlink(), _environments()
    house = Path("/root/changed")
    shutil.copytree(WHEELHOUSE, house)
    (wheel,) = house.glob("structlog-*.whl")
    content = wheel.read_bytes()
    wheel.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    status, said = install("--upgrade", "--offline", house, checkout=_another("0.1.5"))
    assert status == 1, said
    assert "DO NOT MATCH THE HASHES" in said, said
    assert "structlog" in said, said
    assert (pid(), LINK.readlink(), _environments()) == (before, in_use, there)
    wheel.write_bytes(content)
    status, said = install("--upgrade", "--offline", house, checkout=_another("0.1.5"))
    assert status == 0, said
    shutil.rmtree(house)
    return "a bit of structlog's wheel turned, and the upgrade ends; turned back, it is made"


def a_read_only_var_is_told_by_the_installer() -> str:
    wheels = WHEELHOUSE
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
    wheels = WHEELHOUSE
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
        # A limit that the kernel cannot keep is told.
        assert ("holds nothing back" in said) != MemoryGroup().there, said
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
    assert outcomes.keys() <= {"result", "error draining"}, outcomes
    assert outcomes["result"] > len(asked) * 0.8, outcomes
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
    unit, before = Path("/etc/systemd/system/phid.service"), _running_version()
    in_use, unit_text, told = LINK.readlink(), unit.read_text(), []
    start, loading = "    def _start(self) -> None:\n", "    began_s = time.monotonic()\n"
    faults = {
        "it ends at its start": ("service.py", start, f"{start}        1 / 0\n"),
        "it has no runtime": (
            *("native.py", "import onnxruntime_genai", "import no_such_runtime"),
        ),
        "it loads for ever": ("runtime.py", loading, f"{loading}    time.sleep(3600)\n"),
    }
    limit_s = 25
    for what, (name, sound, fault) in faults.items():
        other = _another("0.1.3")
        module = other / "daemon/phid" / name
        text = module.read_text()
        assert text.count(sound) == 1
        module.write_text(text.replace(sound, fault))
        (other / "systemd/phid.service").write_text(unit_text + f"# {what}\n")
        began, wall = time.monotonic(), time.time()
        status, said = install("--upgrade", "--limit", str(limit_s), checkout=other)
        assert status == 1, said
        assert "rolled back: it is online" in said, said
        if what == "it loads for ever":
            assert "this does not work: it is loading" in said, said
            tried_s = _seconds_between_starts(wall)
            assert limit_s <= tried_s < limit_s + 15, tried_s
        assert LINK.readlink() == in_use
        assert unit.read_text() == unit_text
        told.append(f"{what}: back after {time.monotonic() - began:.0f} s")
    with requester() as client:
        assert client.ask("Say hello.", max_tokens=4)["type"] == "result"
    assert _running_version() == before
    return "; ".join(told) + f" (of which {limit_s} s are its limit)"


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


def _running_version() -> str:
    with requester() as client:
        return str(client.ctl("ping")["data"]["version"])


def _environments() -> set[str]:
    return {path.name for path in Path("/opt/phid/venvs").iterdir()}


def _seconds_between_starts(since: float) -> float:
    """From one start of the service to the next, both after `since`."""
    lines = [json.loads(line) for line in words(since, "-o", "json").splitlines()]
    starts = [
        int(line["__REALTIME_TIMESTAMP"]) for line in lines if "service_started" in line["MESSAGE"]
    ]
    assert len(starts) == 2, starts
    return (starts[1] - starts[0]) / 1e6


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
