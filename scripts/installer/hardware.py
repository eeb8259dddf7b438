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
    """The execution provider that the doctor would have; the CPU where it has none to name."""
    report = findings.get("provider")
    chosen = report.get("chosen") if isinstance(report, dict) else None
    return chosen.lower() if isinstance(chosen, str) and chosen else "cpu"


def drop_in(name: str, jetson: Path = _JETSON) -> str | None:
    """The file in systemd/provider that opens its devices; None where it needs none."""
    found = DROP_INS.get(name)
    return "jetson" if found == "cuda" and jetson.exists() else found
