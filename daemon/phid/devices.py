"""The hardware that providers need: drivers and devices, found without their runtimes."""

from __future__ import annotations

import ctypes
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from phid.providers import PROVIDERS

_DRIVERS = (
    "/proc/driver/nvidia/version",
    "/etc/nv_tegra_release",
    "/sys/module/intel_vpu/version",
    "/sys/module/amdxdna/version",
    "/sys/module/fastrpc/version",
)
_TEGRA = Path("/etc/nv_tegra_release")
_DPKG = Path("/var/lib/dpkg/status")
_CUDA = Path("/usr/local/cuda/version.json")
_PACKAGE = re.compile(r"^Package: nvidia-jetpack\n(?:.+\n)*?Version: ([\d.]+)", re.MULTILINE)
_RELEASE = re.compile(r"R(\d+) \(release\), REVISION: ([\d.]+)")
# L4T's major release: JetPack, CUDA, and the GPUs it runs on.
_JETPACKS = {35: ("5", "11.4"), 36: ("6", "12.6"), 38: ("7", "13.0"), 39: ("7", "13.2")}
_BOARDS = ((r"thor", "sm_110"), (r"orin", "sm_87"), (r"xavier", "sm_72"), (r"nano|tx1", "sm_53"))
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


@dataclass(frozen=True, slots=True)
class Absent:
    """A device is not there: in a user's words, with the line that helps."""

    says: str
    mend: str


@dataclass(frozen=True, slots=True)
class Jetson:
    """A Jetson board: its release of L4T, and what goes with that. Empty: not known."""

    l4t: str
    jetpack: str
    cuda: str
    gpu: str

    def says(self) -> str:
        """The board in words."""
        known = (
            ("JetPack", self.jetpack),
            ("L4T", self.l4t),
            ("CUDA", self.cuda),
            ("GPU", self.gpu),
        )
        return "Jetson: " + ", ".join(f"{name} {value}" for name, value in known if value)

    def wheel(self) -> str:
        """Which wheel runs on this GPU, and which does not."""
        return (
            "PyPI's onnxruntime-gpu for aarch64 is made for CUDA 13 and carries no code for"
            f" {self.gpu or 'this GPU'}: install wheels of onnxruntime-gpu and"
            f" onnxruntime-genai-cuda built for JetPack {self.jetpack or 'of this board'} and CUDA"
            f" {self.cuda or 'of this board'}, as jetson-containers builds them"
        )


def driver(root: Path = Path("/")) -> str:
    """The drivers' versions and the kernel's: when they change, proofs no longer hold."""
    found = [platform.release()]
    for name in _DRIVERS:
        try:
            found.append((root / name.lstrip("/")).read_text(encoding="utf-8").strip())
        except (OSError, UnicodeDecodeError):
            continue
    return "\n".join(found)


def has_own_memory(provider: str, root: Path = Path("/")) -> bool:
    """Whether this provider's device has memory of its own, apart from the machine's.

    A Jetson's GPU has none.
    """
    return PROVIDERS[provider].own_memory and jetson(root) is None


def jetson(root: Path = Path("/")) -> Jetson | None:
    """The Jetson this is; None on any other machine."""
    release = _read(root / _TEGRA.relative_to("/"))
    if not release:
        return None
    found = _RELEASE.search(release)
    major = int(found[1]) if found else 0
    l4t = f"{found[1]}.{found[2]}" if found else ""
    jetpack, cuda = _JETPACKS.get(major, ("", ""))
    status = _read(root / _DPKG.relative_to("/"))
    if package := _PACKAGE.search(status):
        jetpack = package[1]
    if own := re.search(
        r'"cuda"\s*:\s*{[^}]*"version"\s*:\s*"(\d+\.\d+)', _read(root / _CUDA.relative_to("/"))
    ):
        cuda = own[1]
    model = _read(root / "proc/device-tree/model").strip("\0\n ")
    gpu = next((sm for pattern, sm in _BOARDS if re.search(pattern, model, re.IGNORECASE)), "")
    return Jetson(l4t, jetpack, cuda, gpu)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def cuda_absent(load: Callable[[str], ctypes.CDLL] = ctypes.CDLL) -> Absent | None:
    """Why there is no NVIDIA GPU to run on, by the driver's own word; None: there is one.

    May hang or die with a broken driver: call it only in a process that may.
    """
    name = "nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1"
    try:
        cuda = load(name)
    except OSError:
        says = f"no NVIDIA driver: {name} is not on this machine"
        return Absent(says, "apt-get install nvidia-driver (a Jetson: flash it with JetPack)")
    count = ctypes.c_int()
    status = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    if status == _NO_DEVICE or (status == 0 and count.value == 0):
        says = "the NVIDIA driver is there, and finds no GPU that this user may open"
        return Absent(says, "nvidia-smi (does it list one?); usermod -aG video,render phid")
    if status:
        says = f"the NVIDIA driver does not start: CUDA error {status}"
        return Absent(says, "nvidia-smi; after an update of the driver: reboot")
    return None
