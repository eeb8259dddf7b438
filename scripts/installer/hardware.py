"""What hardware asks of an installation: a drop-in for the unit that opens its devices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

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
