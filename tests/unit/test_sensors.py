"""How hot the processor is, by the names that real machines give their thermometers."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from phid import sensors
from phid.sensors import hottest_c

BOARDS: dict[str, tuple[dict[str, list[float]], float]] = {
    "Raspberry Pi 4": ({"cpu_thermal": [61.3]}, 61.3),
    "Raspberry Pi 5 with an SSD": (
        {"cpu_thermal": [58.4], "rp1_adc": [62.1], "nvme": [74.9, 74.9]},
        58.4,
    ),
    "Intel mini PC": (
        {
            "acpitz": [27.8],
            "coretemp": [55.0, 51.0, 55.0],
            "iwlwifi_1": [66.0],
            # Inputs with nothing on them float.
            "nct6798": [34.0, 39.5, 121.0, 127.5, 103.0],
            "nvme": [44.9, 71.9],
            "pch_cannonlake": [71.0],
        },
        55.0,
    ),
    "AMD mini PC": (
        {
            "acpitz": [20.0],
            "amdgpu": [49.0],
            "k10temp": [63.6, 57.2],
            "nvme": [80.9],
            "r8169": [55],
        },
        63.6,
    ),
    "RK3588": (
        {
            "soc_thermal": [44.4],
            "bigcore0_thermal": [46.2],
            "bigcore1_thermal": [45.3],
            "littlecore_thermal": [44.4],
            "center_thermal": [43.5],
            "gpu_thermal": [43.5],
            "npu_thermal": [43.5],
            "nvme": [60.9],
        },
        46.2,
    ),
}


@pytest.mark.parametrize(("readings", "hottest"), BOARDS.values(), ids=BOARDS.keys())
def test_a_hot_disk_or_an_open_input_is_no_hot_processor(
    readings: dict[str, list[float]], hottest: float
) -> None:
    assert hottest_c(readings) == hottest


@pytest.mark.parametrize(
    ("readings", "hottest"),
    [
        ({"acpitz": [48.0], "nvme": [51.9]}, 51.9),
        ({"CPU-therm": [0.0, -256.0], "thermal-fan-est": [33.0]}, 33.0),
        ({"nct6798": [255.0]}, None),
        ({}, None),
    ],
)
def test_where_no_processor_is_known_the_hottest_of_all_counts(
    readings: dict[str, list[float]], hottest: float | None
) -> None:
    assert hottest_c(readings) == hottest


class Machine:
    """A folder for /sys, and the chips that psutil finds."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self._monkeypatch = monkeypatch
        self.has()

    def has(self, **chips: float) -> None:
        found = {name: [psutil._ntp.shwtemp("", c, None, None)] for name, c in chips.items()}
        self._monkeypatch.setattr(psutil, "sensors_temperatures", lambda: found)

    def put(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def zone(self, number: int, name: str, temp: str) -> None:
        self.put(f"class/thermal/thermal_zone{number}/type", f"{name}\n")
        self.put(f"class/thermal/thermal_zone{number}/temp", f"{temp}\n")

    @property
    def temp_c(self) -> float | None:
        return sensors.heat(self.root).temp_c

    @property
    def throttled(self) -> bool | None:
        return sensors.heat(self.root).throttled


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_a_jetson_orin_with_an_ssd_tells_the_heat_of_its_zones(machine: Machine) -> None:
    machine.has(nvme=68.9)
    zones = ("cpu", "gpu", "cv0", "cv1", "cv2", "soc0", "soc1", "soc2", "tj")
    for number, name in enumerate(zones):
        machine.zone(number, f"{name}-thermal", str(47_000 + 250 * number))
    machine.zone(2, "cv0-thermal", "")  # switched off
    assert machine.temp_c == 49.0


def test_a_jetson_nano_is_not_as_hot_as_its_pmic_says_for_ever(machine: Machine) -> None:
    machine.has(**{"thermal-fan-est": 32.5})
    zones = {"AO-therm": 40500, "CPU-therm": 34500, "GPU-therm": 35000, "PLL-therm": 33000}
    for number, (name, temp) in enumerate((zones | {"PMIC-Die": 100000}).items()):
        machine.zone(number, name, str(temp))
    assert machine.temp_c == 35.0


def test_a_machine_without_sensors_says_nothing(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (machine.temp_c, machine.throttled) == (None, None)
    monkeypatch.delattr(psutil, "sensors_temperatures")  # as on Windows
    assert machine.temp_c is None


# A Raspberry Pi's firmware.


@pytest.mark.parametrize(
    "folder",
    [
        "soc/soc:firmware",
        "soc@107c000000/soc@107c000000:firmware",
        "soc@107c000000:firmware",
        "soc:firmware",
    ],
)
def test_throttling_is_told_on_every_board_whose_kernel_tells(
    folder: str, machine: Machine
) -> None:
    machine.put(f"devices/platform/{folder}/get_throttled", "50000\n")
    assert machine.throttled is False, "what has happened since boot"
    machine.put(f"devices/platform/{folder}/get_throttled", "50008\n")
    assert machine.throttled is True


def test_where_only_the_supply_is_told_of_that_is_told(machine: Machine) -> None:
    machine.put("class/hwmon/hwmon0/name", "cpu_thermal\n")
    machine.put("class/hwmon/hwmon3/name", "rpi_volt\n")
    machine.put("class/hwmon/hwmon3/in0_lcrit_alarm", "0\n")
    assert machine.throttled is False
    machine.put("class/hwmon/hwmon3/in0_lcrit_alarm", "1\n")
    assert machine.throttled is True


def test_a_driver_that_is_loaded_late_is_found(machine: Machine) -> None:
    assert machine.throttled is None
    machine.put("class/hwmon/hwmon0/name", "rpi_volt\n")
    machine.put("class/hwmon/hwmon0/in0_lcrit_alarm", "1\n")
    assert machine.throttled is True


def test_another_boards_alarm_is_not_ours(machine: Machine) -> None:
    machine.put("class/hwmon/hwmon0/name", "nct6798\n")
    machine.put("class/hwmon/hwmon0/in0_lcrit_alarm", "1\n")
    assert machine.throttled is None
