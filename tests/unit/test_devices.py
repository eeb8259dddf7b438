"""Drivers and boards, by the files that they leave."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from phid import devices

TEGRA = (
    "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64,"
    " DATE: Wed Jan  8 01:49:37 UTC 2025\n# KERNEL_VARIANT: oot\n"
)
DPKG = """\
Package: nvidia-jetpack
Status: install ok installed
Architecture: arm64
Version: 6.2+b77

Package: zlib1g
Version: 1.2
"""


def board(root: Path, tegra: str, model: str) -> Path:
    for name, text in (("etc/nv_tegra_release", tegra), ("proc/device-tree/model", model + "\0")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_another_machine_is_no_jetson(tmp_path: Path) -> None:
    assert devices.jetson(tmp_path) is None


def test_an_orin_and_the_wheel_that_fits_it(tmp_path: Path) -> None:
    found = devices.jetson(board(tmp_path, TEGRA, "NVIDIA Jetson Orin Nano Developer Kit"))
    assert found == devices.Jetson("36.4.3", "6", "12.6", "sm_87")
    assert found.says() == "Jetson: JetPack 6, L4T 36.4.3, CUDA 12.6, GPU sm_87"
    assert "no code for sm_87" in found.wheel()
    assert "JetPack 6 and CUDA 12.6" in found.wheel()


def test_its_packages_know_better(tmp_path: Path) -> None:
    board(tmp_path, TEGRA, "NVIDIA Jetson AGX Thor")
    (tmp_path / "var/lib/dpkg").mkdir(parents=True)
    (tmp_path / "var/lib/dpkg/status").write_text(DPKG)
    (tmp_path / "usr/local/cuda").mkdir(parents=True)
    (tmp_path / "usr/local/cuda/version.json").write_text(
        '{"cuda" : {"name" : "CUDA SDK", "version" : "12.9.1"}}'
    )
    assert devices.jetson(tmp_path) == devices.Jetson("36.4.3", "6.2", "12.9", "sm_110")


def test_a_release_of_another_form_is_a_jetson_all_the_same(tmp_path: Path) -> None:
    found = devices.jetson(board(tmp_path, "new words\n", "a board"))
    assert found == devices.Jetson("", "", "", "")
    assert "this GPU" in found.wheel()


def test_a_new_driver_is_another_driver(tmp_path: Path) -> None:
    before = devices.driver(tmp_path)
    version = tmp_path / "proc/driver/nvidia/version"
    version.parent.mkdir(parents=True)
    version.write_text("NVRM version: 570.1\n")
    assert devices.driver(tmp_path) == before + "\nNVRM version: 570.1"


class Driver:
    """libcuda with so many GPUs, or an error."""

    def __init__(self, status: int, count: int) -> None:
        self._status, self._count = status, count

    def __call__(self, _name: str) -> Driver:
        return self

    def cuInit(self, _flags: int) -> int:  # noqa: N802 - its name in the driver
        return self._status

    def cuDeviceGetCount(self, count: ctypes._Pointer[ctypes.c_int]) -> int:  # noqa: N802
        ctypes.cast(count, ctypes.POINTER(ctypes.c_int))[0] = self._count
        return 0


@pytest.mark.parametrize(
    ("status", "count", "says"),
    [(100, 0, "finds no GPU"), (0, 0, "finds no GPU"), (999, 0, "CUDA error 999"), (0, 1, None)],
)
def test_the_driver_is_asked_for_a_gpu(status: int, count: int, says: str | None) -> None:
    absent = devices.cuda_absent(Driver(status, count))  # type: ignore[arg-type]
    assert (absent is None) == (says is None)
    assert says is None or (absent is not None and says in absent.says and absent.mend)


def test_without_a_driver_there_is_no_gpu() -> None:
    def load(name: str) -> ctypes.CDLL:
        raise OSError(name)

    absent = devices.cuda_absent(load)
    assert absent is not None
    assert "no NVIDIA driver" in absent.says


def test_a_card_has_memory_of_its_own_and_a_jetson_has_not(tmp_path: Path) -> None:
    assert devices.has_own_memory("cuda", tmp_path)
    assert not devices.has_own_memory("cpu", tmp_path)
    orin = board(tmp_path, TEGRA, "NVIDIA Jetson Orin Nano Developer Kit")
    assert not devices.has_own_memory("cuda", orin)
