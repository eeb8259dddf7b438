"""What the hardware asks of an installation: a drop-in for the unit that opens its devices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_JETSON = Path("/etc/nv_tegra_release")
DROP_INS = {
    "cuda": "cuda",
    "tensorrt": "cuda",
    "nvtensorrtrtx": "cuda",
    "qnn": "qnn",
    "openvino": "dri",
    "webgpu": "dri",
}


def provider(findings: Mapping[str, Any]) -> str:
    """The execution provider that the doctor has found the model to run on; else the CPU."""
    told = findings.get("provider")
    actual = told.get("actual") if isinstance(told, dict) else None
    return actual.lower() if isinstance(actual, str) and actual else "cpu"


def drop_in(name: str, jetson: Path = _JETSON) -> str | None:
    """The file in systemd/provider that opens its devices; None where it needs none."""
    found = DROP_INS.get(name)
    return "jetson" if found == "cuda" and jetson.exists() else found
