"""What hardware asks of an installation: a drop-in for the unit that opens its devices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from installer.acts import Failed

_JETSON = "etc/nv_tegra_release"
_AUTO = "auto"
# For each provider, in the order in which `auto` tries them: devices that it runs on, of which one
# will do, and the file in systemd/provider that opens them.
_DEVICES = {
    "cuda": ((_JETSON, "dev/nvidia[0-9]*"), "cuda"),
    "qnn": (("dev/fastrpc-*", "dev/adsprpc-smd"), "qnn"),
    "openvino": (("dev/dri/renderD*",), "dri"),
}
DROP_INS = frozenset({"jetson", *(name for _, name in _DEVICES.values())})


def check(provider: str, root: Path = Path("/")) -> None:
    """Raises Failed for packages that have no code for this machine's device."""
    if provider == "cuda" and (root / _JETSON).exists():
        raise Failed(
            "the package index has no CUDA build for a Jetson's GPU: in place of --provider,"
            " --offline WHEELHOUSE with wheels made for it (README, On a Jetson)"
        )


def hint(installed: frozenset[str], root: Path = Path("/")) -> str | None:
    """What could be installed for a card that is here and is not used; None: nothing."""
    card = any(root.glob("dev/nvidia[0-9]*")) and not (root / _JETSON).exists()
    if not card or not installed or "cuda" in installed:
        return None
    return "there is an NVIDIA card: --provider cuda brings what runs models on it (2.5 GB more)"


def installed(findings: Mapping[str, Any]) -> frozenset[str]:
    """The providers whose packages the doctor has found in its environment."""
    told = findings.get("provider")
    names = told.get("installed") if isinstance(told, dict) else None
    return frozenset(names) if isinstance(names, list) else frozenset()


def drop_in(wanted: Iterable[str], installed: frozenset[str], root: Path = Path("/")) -> str | None:
    """The file that opens the devices of the first provider that can be tried here.

    It must be wanted by the settings, have its packages in the environment, and a device on this
    machine. Whether it then runs there is proven by the daemon, behind the unit's walls: until
    these let it through it cannot be.
    """
    names = [name for word in wanted for name in (_DEVICES if word == _AUTO else [word])]
    for name in names:
        devices, opens = _DEVICES.get(name, ((), ""))
        if name in installed and any(any(root.glob(device)) for device in devices):
            return "jetson" if opens == "cuda" and (root / _JETSON).exists() else opens
    return None
