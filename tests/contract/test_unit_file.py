"""phid.service as systemd reads it: sound, and exposed no more than we say."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from rig import ROOT

SYSTEMD = ROOT / "systemd"
PROVIDERS = sorted(path.stem for path in (SYSTEMD / "provider").glob("*.conf"))
# What a device in /dev costs: PrivateDevices is given up, and for some the map of users, too.
MOST_EXPOSED = {"cpu": 1.5, "cuda": 1.7, "dri": 1.5, "jetson": 1.7, "qnn": 1.7}


def installed(folder: Path, provider: str) -> Path:
    """The unit as scripts/install would have it, with a program that is there."""
    unit = folder / "phid.service"
    text = (SYSTEMD / "phid.service").read_text()
    unit.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.MULTILINE))
    if provider != "cpu":
        drop_in = folder / "phid.service.d/50-provider.conf"
        drop_in.parent.mkdir()
        drop_in.write_text((SYSTEMD / "provider" / f"{provider}.conf").read_text())
    return unit


def exposure(unit: Path) -> float:
    argv = ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(unit)]
    said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    found = re.search(r"exposure level for phid.service: ([0-9.]+)", said)
    assert found is not None, said
    return float(found[1])


@pytest.mark.parametrize("provider", ["cpu", *PROVIDERS])
def test_systemd_finds_no_fault_in_it(provider: str, tmp_path: Path) -> None:
    unit = installed(tmp_path, provider)
    argv = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_a_fault_would_be_found(tmp_path: Path) -> None:
    unit = installed(tmp_path, "cpu")
    unit.write_text(unit.read_text().replace("WatchdogSec=30", "WatchdogSec=often\nWatchDog=30"))
    argv = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert "often" in done.stderr
    assert "WatchDog" in done.stderr


@pytest.mark.parametrize("provider", ["cpu", *PROVIDERS])
def test_it_is_exposed_no_more_than_we_say(provider: str, tmp_path: Path) -> None:
    assert exposure(installed(tmp_path, provider)) <= MOST_EXPOSED[provider]


def test_what_is_given_up_would_be_seen(tmp_path: Path) -> None:
    unit = installed(tmp_path, "cpu")
    before = exposure(unit)
    unit.write_text(re.sub(r"^SystemCallFilter=.*\n", "", unit.read_text(), flags=re.MULTILINE))
    assert exposure(unit) > before + 0.5


def test_every_drop_in_has_its_measure() -> None:
    assert set(PROVIDERS) == MOST_EXPOSED.keys() - {"cpu"}


def test_a_device_is_let_in_by_its_drop_in(tmp_path: Path) -> None:
    """Were drop-ins not read at all, none of them would be found at fault."""
    levels = {}
    for provider in ("cpu", *PROVIDERS):
        folder = tmp_path / provider
        folder.mkdir()
        levels[provider] = exposure(installed(folder, provider))
    assert all(levels[provider] > levels["cpu"] for provider in PROVIDERS), levels


@pytest.mark.parametrize(
    "line",
    [
        *("Type=notify", "Restart=on-failure", "StartLimitIntervalSec=300", "StartLimitBurst=10"),
        *("RestartPreventExitStatus=75 78", "OOMPolicy=continue", "CPUWeight=50", "IOWeight=50"),
        *("Nice=5", "WatchdogSec=30", "Wants=network-online.target", "StateDirectory=phid"),
        "After=network-online.target time-sync.target mosquitto.service",
    ],
)
def test_what_it_promises_beside_its_walls_stands_there(line: str) -> None:
    assert f"\n{line}\n" in (SYSTEMD / "phid.service").read_text()


def test_systemd_makes_the_user_and_the_folders(tmp_path: Path) -> None:
    for kind in ("sysusers", "tmpfiles"):
        (tmp_path / f"etc/{kind}.d").mkdir(parents=True)
        text = (SYSTEMD / f"phid.{kind}").read_text()
        (tmp_path / f"etc/{kind}.d/phid.conf").write_text(text)
    root = f"--root={tmp_path}"
    subprocess.run(["systemd-sysusers", root, "phid.conf"], check=True)
    assert re.search(
        r"^phid:x:\d+:\d+:phid inference daemon:/var/lib/phid:/usr/sbin/nologin$",
        (tmp_path / "etc/passwd").read_text(),
        re.MULTILINE,
    )
    subprocess.run(["systemd-tmpfiles", root, "--create", "phid.conf"], check=True)
    modes = {
        path: oct((tmp_path / path).stat().st_mode & 0o777)
        for path in ("etc/phid", "etc/phid/credentials", "var/lib/phid", "var/lib/phid/models")
    }
    assert list(modes.values()) == ["0o755", "0o750", "0o750", "0o750"]
