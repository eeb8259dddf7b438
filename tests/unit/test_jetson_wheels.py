"""scripts/jetson-wheels: refuses what is no Jetson, says what it would do, and reads wheels."""

from __future__ import annotations

import importlib.util
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from phid import devices
from rig import ROOT

SCRIPT = ROOT / "scripts" / "jetson-wheels"
PYTHON = sys.version_info[:2]
CP = f"cp{PYTHON[0]}{PYTHON[1]}"
AARCH64, X86_64 = 183, 62
PTX, CUBIN = 1, 2


@pytest.fixture(scope="module")
def reader() -> ModuleType:
    path = ROOT / "scripts" / "_jetson_wheels.py"
    spec = importlib.util.spec_from_file_location("_jetson_wheels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def called(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def library(machine: int, *code: tuple[int, int]) -> bytes:
    """A shared library's first bytes, and a region of device code: kind and architecture each."""
    elf = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack("<HH", 3, machine)
    entries = b"".join(
        struct.pack("<HHIQIIHHI", kind, 0x101, 64, 40, 0, 0, 0, 0, sm).ljust(64, b"\0") + b"c" * 40
        for kind, sm in code
    )
    region = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries
    return elf.ljust(4096, b"\0") + region + b"\0" * 100


def wheel(folder: Path, name: str, version: str, so: bytes, **changed: str) -> Path:
    tag, platform = changed.get("tag", CP), changed.get("platform", "linux_aarch64")
    path = folder / f"{name}-{version}-{tag}-{tag}-{platform}.whl"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    if "needs" in changed:
        metadata += f"Requires-Dist: {changed['needs']}\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}/lib{name}.so", so)
        archive.writestr(f"{name}-{version}.dist-info/METADATA", metadata)
    return path


def pair(
    folder: Path, so: bytes, runtime: str = "1.32.0", needs: str = "onnxruntime-gpu", **changed: str
) -> None:
    wheel(folder, "onnxruntime_genai", "0.18.0", so, needs=f"{needs}>=1.31.0", **changed)
    wheel(folder, "onnxruntime_gpu", runtime, so, **changed)


def test_what_is_no_jetson_is_refused_with_a_sentence(tmp_path: Path) -> None:
    refused = called("--from", str(tmp_path), "--wheelhouse", str(tmp_path / "house"))
    assert refused.returncode == 1
    assert refused.stderr.startswith("this is no Jetson (/etc/nv_tegra_release is not there)")
    assert refused.stdout == ""
    assert not (tmp_path / "house").exists()


def test_it_knows_the_releases_that_the_doctor_knows() -> None:
    text = (ROOT / "scripts/jetson-wheels").read_text()
    cases = re.findall(r"^\s+([\d |]+)\) jetpack=(\d) ;;", text, re.MULTILINE)
    cuda = dict(re.findall(r"^\s+(\d)\) cuda=(\d+) ;;", text, re.MULTILINE))
    of_script = {
        int(release): (jetpack, cuda[jetpack])
        for releases, jetpack in cases
        for release in releases.split("|")
    }
    assert of_script == {
        release: (jetpack, version.partition(".")[0])
        for release, (jetpack, version) in devices._JETPACKS.items()
        if int(jetpack) >= 6
    }


def test_a_dry_run_prints_every_command_and_does_none(tmp_path: Path) -> None:
    house = tmp_path / "house"
    shown = called("--dry-run", "--from", str(tmp_path), "--wheelhouse", str(house))
    assert shown.returncode == 0, shown.stderr
    assert "here it would end: this is no Jetson" in shown.stderr
    commands = [line for line in shown.stdout.splitlines() if line.startswith("+ ")]
    in_order = (
        " check ",
        "mkdir",
        " download ",
        " wheel ",
        "cp --",
        " list ",
        "trial/bin",
        "CUDAExec",
    )
    places = [next(i for i, line in enumerate(commands) if word in line) for word in in_order]
    assert places == sorted(places)
    assert not house.exists()
    script = SCRIPT.read_text()
    assert len(commands) == len(re.findall(r"^run ", script, re.MULTILINE))


@pytest.mark.parametrize("arguments", [[], ["--from", "x"], ["--wheelhouse", "x"], ["--form", "x"]])
def test_a_wrong_command_line_says_what_is_wanted(arguments: list[str]) -> None:
    answer = called(*arguments)
    assert answer.returncode == 1
    assert re.search("--from DIR|what is --form", answer.stderr)


@pytest.mark.parametrize("code", [(CUBIN, 87), (PTX, 80)])
def test_wheels_with_code_for_the_board_are_taken(
    reader: ModuleType, tmp_path: Path, code: tuple[int, int]
) -> None:
    pair(tmp_path, library(AARCH64, (CUBIN, 90), code))
    assert reader.check(tmp_path, 87, PYTHON) == []


def test_code_of_a_relative_is_none(reader: ModuleType, tmp_path: Path) -> None:
    pair(tmp_path, library(AARCH64, (CUBIN, 80), (CUBIN, 89), (PTX, 90)))
    found = reader.check(tmp_path, 87, PYTHON)
    assert len(found) == 2
    assert "has no code for this GPU, sm_87: it has sm_80, sm_89, PTX 90" in found[0]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"tag": "cp310"}, "is for cp310"),
        ({"platform": "linux_x86_64"}, "not for aarch64"),
        ({"runtime": "1.28.0"}, "is 1.28.0, and onnxruntime-gpu>=1.31.0 is wanted"),
        ({"needs": "onnxruntime"}, "asks for onnxruntime>=1.31.0, and pip does not take"),
    ],
)
def test_what_does_not_fit_is_said(
    reader: ModuleType, tmp_path: Path, changed: dict[str, str], says: str
) -> None:
    pair(tmp_path, library(AARCH64, (CUBIN, 87)), **changed)
    found = reader.check(tmp_path, 87, PYTHON)
    assert any(says in problem for problem in found), found


def test_a_library_of_another_machine_is_found(reader: ModuleType, tmp_path: Path) -> None:
    pair(tmp_path, library(X86_64, (CUBIN, 87)))
    assert "is of another machine (ELF 62)" in " ".join(reader.check(tmp_path, 87, PYTHON))


def test_a_missing_wheel_is_said(reader: ModuleType, tmp_path: Path) -> None:
    wheel(tmp_path, "onnxruntime_gpu", "1.32.0", library(AARCH64, (CUBIN, 87)))
    (problem,) = reader.check(tmp_path, 87, PYTHON)
    assert "has 0 wheels of onnxruntime-genai or onnxruntime-genai-cuda" in problem


def test_the_lock_loses_the_runtimes_and_nothing_else(reader: ModuleType) -> None:
    lock = ROOT / "scripts" / "lock" / "run.txt"
    before, after = (
        re.findall(r"^([\w-]+)==", t, re.MULTILINE) for t in (lock.read_text(), reader.rest(lock))
    )
    assert set(before) - set(after) == {"onnxruntime", "onnxruntime-genai"}
    assert reader.rest(lock).count("--hash") > 100


def test_the_requirements_name_each_wheel_but_ours(reader: ModuleType, tmp_path: Path) -> None:
    pair(tmp_path, library(AARCH64, (CUBIN, 87)))
    wheel(tmp_path, "phid", "0.1.0", b"")
    lines = reader.requirements(tmp_path).splitlines()
    assert [line.partition(" --hash=sha256:")[0] for line in lines] == [
        "onnxruntime-genai==0.18.0",
        "onnxruntime-gpu==1.32.0",
    ]
