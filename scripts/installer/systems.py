"""Which system this is, as its own files say, and what that means for phid."""

from __future__ import annotations

import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from installer.acts import Failed
from phid import devices

_MADE_FOR = "Debian 12 and 13, Raspberry Pi OS, Ubuntu 22.04 and 24.04"
_VERSIONS = {"debian": ("12", "13"), "raspbian": ("12", "13"), "ubuntu": ("22.04", "24.04")}
# What onnxruntime-genai has Linux wheels for, as uname names it.
_MACHINES = ("x86_64", "aarch64")
_FIELD = re.compile(r"""^(\w+)=["']?(.*?)["']?$""", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class System:
    """A system by the name that its makers give it; `bits` are those of its programs.

    `known`: it is one that the installer is made for.
    """

    name: str
    machine: str
    bits: int
    known: bool

    @property
    def says(self) -> str:
        """What to tell of it."""
        told = f"System: {self.name}, {self.machine}"
        return told if self.known else f"{told}: not one of {_MADE_FOR}; tried all the same"

    def check(self) -> None:
        """Raises Failed on one that no package of phid's runtime is made for."""
        if self.machine in _MACHINES and self.bits == 64:
            return
        # A Raspberry Pi's 32-bit system runs with a 64-bit kernel, which names itself aarch64.
        raise Failed(
            f"ONNX Runtime has packages for 64-bit {' and '.join(_MACHINES)}; {self.name} is of"
            f" {self.bits} bits, on {self.machine}: install the 64-bit system"
        )


def of(root: Path, machine: str | None = None, bits: int | None = None) -> System:
    """The system whose files stand below root; its processor is this one where none is named."""
    fields = dict(_FIELD.findall(_read(root / "etc/os-release")))
    name = fields.get("PRETTY_NAME") or "a Linux without a name"
    # Its 64-bit os-release is Debian's own.
    if (root / "etc/rpi-issue").exists():
        name = f"Raspberry Pi OS ({name})"
    if jetson := devices.jetson(root):
        name += f", {jetson.says()}"
    known = fields.get("VERSION_ID") in _VERSIONS.get(fields.get("ID", ""), ())
    return System(
        name,
        machine or platform.machine(),
        bits or (64 if sys.maxsize > 1 << 32 else 32),
        known,
    )


def has_memory_controller(root: Path) -> bool:
    """Whether the kernel can hold a service to MemoryHigh and MemoryMax."""
    version_2 = root / "sys/fs/cgroup/cgroup.controllers"
    return "memory" in _read(version_2).split() or (root / "sys/fs/cgroup/memory").is_dir()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
