"""installer.systems: the systems that the installer is made for, told by their own files."""

from __future__ import annotations

from pathlib import Path

import pytest

from installer import systems
from installer.acts import Failed

# As they are on the systems.
UBUNTU = """\
PRETTY_NAME="Ubuntu {full} LTS"
NAME="Ubuntu"
VERSION_ID="{version}"
VERSION="{full} LTS ({words})"
VERSION_CODENAME={codename}
ID=ubuntu
ID_LIKE=debian
HOME_URL="https://www.ubuntu.com/"
SUPPORT_URL="https://help.ubuntu.com/"
UBUNTU_CODENAME={codename}
"""
JAMMY = UBUNTU.format(
    full="22.04.5", version="22.04", words="Jammy Jellyfish", codename="jammy"
)  # fmt: skip
NOBLE = UBUNTU.format(
    full="24.04.3", version="24.04", words="Noble Numbat", codename="noble"
)  # fmt: skip
DEBIAN = """\
PRETTY_NAME="{name} GNU/Linux {version} ({codename})"
NAME="{name} GNU/Linux"
VERSION_ID="{version}"
VERSION="{version} ({codename})"
VERSION_CODENAME={codename}
ID={id}
HOME_URL="https://www.debian.org/"
"""
BOOKWORM = DEBIAN.format(name="Debian", version="12", codename="bookworm", id="debian")
TRIXIE = DEBIAN.format(name="Debian", version="13", codename="trixie", id="debian")
RASPBIAN = DEBIAN.format(name="Raspbian", version="12", codename="bookworm", id="raspbian")
PI = {"etc/rpi-issue": "Raspberry Pi reference 2025-05-13\nGenerated using pi-gen\n"}
JETPACK = {
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic,"
    " EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025\n"
}


def system(
    root: Path,
    os_release: str,
    more: dict[str, str] | None = None,
    machine: str = "aarch64",
    bits: int = 64,
) -> systems.System:
    for name, text in {"etc/os-release": os_release, **(more or {})}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return systems.of(root, machine, bits)


@pytest.mark.parametrize(
    ("os_release", "more", "says"),
    [
        (BOOKWORM, {}, "Debian GNU/Linux 12 (bookworm), aarch64"),
        (TRIXIE, {}, "Debian GNU/Linux 13 (trixie), aarch64"),
        (JAMMY, {}, "Ubuntu 22.04.5 LTS, aarch64"),
        (NOBLE, {}, "Ubuntu 24.04.3 LTS, aarch64"),
        (BOOKWORM, PI, "Raspberry Pi OS (Debian GNU/Linux 12 (bookworm)), aarch64"),
        (
            JAMMY,
            JETPACK,
            "Ubuntu 22.04.5 LTS, Jetson: JetPack 6, L4T 36.4.3, CUDA 12.6, aarch64",
        ),
    ],
    ids=["bookworm", "trixie", "jammy", "noble", "raspberry", "jetpack"],
)
def test_what_it_is_made_for_is_told_as_what_it_is(
    os_release: str, more: dict[str, str], says: str, tmp_path: Path
) -> None:
    found = system(tmp_path, os_release, more)
    assert found.says == f"System: {says}"
    found.check()


@pytest.mark.parametrize(
    "os_release",
    [
        JAMMY.replace("22.04", "20.04"),
        BOOKWORM.replace("12", "11"),
        'ID="fedora"\nVERSION_ID=43\nPRETTY_NAME="Fedora Linux 43"\n',
        "ID=arch\n",
        "",
    ],
)
def test_another_system_is_tried_and_told(os_release: str, tmp_path: Path) -> None:
    found = system(tmp_path, os_release)
    assert "not one of Debian 12 and 13" in found.says
    found.check()


@pytest.mark.parametrize(
    ("machine", "bits"),
    # A Pi's 32-bit system runs with a 64-bit kernel, too.
    [("armv7l", 32), ("aarch64", 32), ("i686", 32), ("riscv64", 64)],
)
def test_a_processor_that_the_runtime_is_not_made_for_is_refused(
    machine: str, bits: int, tmp_path: Path
) -> None:
    found = system(tmp_path, RASPBIAN, PI, machine, bits)
    with pytest.raises(
        Failed,
        match=rf"64-bit x86_64 and aarch64; Raspberry Pi OS \(Raspbian GNU/Linux 12 \(bookworm\)\)"
        rf" is of {bits} bits, on {machine}: install the 64-bit system",
    ):
        found.check()


def test_a_kernel_without_a_memory_controller_is_seen(tmp_path: Path) -> None:
    assert not systems.has_memory_controller(tmp_path)
    groups = tmp_path / "sys/fs/cgroup"
    groups.mkdir(parents=True)
    (groups / "cgroup.controllers").write_text("cpuset cpu io pids\n")
    assert not systems.has_memory_controller(tmp_path)
    (groups / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    assert systems.has_memory_controller(tmp_path)
    (groups / "cgroup.controllers").unlink()
    (groups / "memory").mkdir()
    assert systems.has_memory_controller(tmp_path)
