"""The sensors: how hot the processor is, and what a Raspberry Pi's firmware says of it."""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import psutil

from phid.thermal import Heat

_SYS = Path("/sys")
# What the kernel calls the thermometers of a CPU or SoC: of PCs, of boards, and last of a Jetson
# and an RK3588. A GPU counts where it is a zone of the SoC; a card's has its driver's name.
_OF_A_PROCESSOR = re.compile(
    r"coretemp|k8temp|k10temp|zenpower\d?|via-cputemp|x86-pkg-temp"
    r"|[bm]?cpu.*|soc.*|scpi-sensors"
    r"|(tj|gpu|cv|npu|center|bigcore|littlecore)\d*-therm.*"
)
# Raspberry Pi OS has not had this file since March 2025 (kernel 6.12); before, a Pi 5's was below
# soc@107c000000, others' below soc.
_THROTTLED = (
    "devices/platform/soc*/soc*:firmware/get_throttled",
    "devices/platform/soc*:firmware/get_throttled",
)
_NAMES = "class/hwmon/hwmon*/name"


def heat(root: Path = _SYS) -> Heat:
    """How hot the processor is, and whether its firmware slows it down or lacks power for it."""
    readings = _chips()
    if not any(map(_is_a_processors, readings)):
        # psutil looks at zones only where no chip has a thermometer, and an SSD has one.
        readings |= _zones(root)
    throttled = None
    with contextlib.suppress(OSError, ValueError):
        file, bits = _firmware(root)
        throttled = bool(int(file.read_text(), 16) & bits)
    return Heat(hottest_c(readings), throttled)


def hottest_c(readings: Mapping[str, Sequence[float]]) -> float | None:
    """The hottest of a CPU's or SoC's thermometers, by chip or zone; of all where none is known."""
    sound = {name: [c for c in heats if 0 < c < 150] for name, heats in readings.items()}
    own = [c for name, heats in sound.items() if _is_a_processors(name) for c in heats]
    heats = own or [c for heats in sound.values() for c in heats]
    return round(max(heats), 1) if heats else None


def _is_a_processors(name: str) -> bool:
    # A zone's hyphens are underscores where it is told as a chip.
    return _OF_A_PROCESSOR.fullmatch(name.lower().replace("_", "-")) is not None


def _chips() -> dict[str, list[float]]:
    try:
        chips = psutil.sensors_temperatures()
    except (AttributeError, OSError):  # not on this platform
        return {}
    return {name: [sensor.current for sensor in chip] for name, chip in chips.items()}


def _zones(root: Path) -> dict[str, list[float]]:
    found = defaultdict(list)
    for zone in root.glob("class/thermal/thermal_zone*"):
        with contextlib.suppress(OSError, ValueError):  # one that is switched off says nothing
            name = (zone / "type").read_text().strip()
            found[name].append(int((zone / "temp").read_text()) / 1000)
    return dict(found)


@cache
def _firmware(root: Path) -> tuple[Path, int]:
    """The file a Raspberry Pi's firmware speaks through, and its bits that hold now.

    Raises OSError while there is none: a driver may come later.
    """
    for pattern in _THROTTLED:
        for path in root.glob(pattern):
            return path, 0xF  # what has happened since boot is in bits 16-19
    for name in root.glob(_NAMES):
        if name.read_text().strip() == "rpi_volt":
            # It tells of a lack of power alone: no file of the newer kernels tells of heat.
            return name.with_name("in0_lcrit_alarm"), 1
    raise FileNotFoundError("no firmware of a Raspberry Pi speaks here")
