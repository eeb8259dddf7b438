from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from phid import memory
from phid.errors import Code, Refused

MIB = 1 << 20


def group(root: Path, path: str, limit: str, current: int, inactive: int = 0) -> None:
    folder = root / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\nslab 2\n")


def room(tmp_path: Path, membership: str = "0::/system.slice/phid.service\n") -> int | None:
    (tmp_path / "cgroup").write_text(membership)
    return memory._cgroup_room(tmp_path / "cgroup", tmp_path / "fs")


def test_the_tightest_limit_counts_and_what_the_kernel_gives_back_does_not(tmp_path: Path) -> None:
    group(tmp_path / "fs", "system.slice/phid.service", "max", 500)
    assert room(tmp_path) is None
    group(tmp_path / "fs", "system.slice", "1000", 700, inactive=50)
    assert room(tmp_path) == 350
    group(tmp_path / "fs", "system.slice/phid.service", "600", 500)
    assert room(tmp_path) == 100


@pytest.mark.parametrize("membership", ["", "0::/\n", "0::/gone/with/it\n", "4:memory:/old\n"])
def test_no_limit_is_found_where_there_is_none(tmp_path: Path, membership: str) -> None:
    (tmp_path / "fs").mkdir()
    assert room(tmp_path, membership) is None


def test_what_is_not_there_is_no_memory() -> None:
    memory.check(MIB, 0)
    with pytest.raises(Refused) as raised:
        memory.check(memory.available_bytes() + MIB, 0)
    assert raised.value.failure.code is Code.NO_MEMORY
    taken = psutil.Process().memory_info().rss
    memory.check(10 * MIB, taken + 40 * MIB)
    with pytest.raises(Refused, match=r"it needs 40 MiB of memory and \d+ are free"):
        memory.check(40 * MIB, taken + 30 * MIB)
    with pytest.raises(Refused, match="and 0 are free"):
        memory.check(MIB, 10 * MIB)


@pytest.mark.parametrize(
    ("files_mib", "block", "loaded_mib"),
    [(2646.6, 32, 3317), (2313.8, 128, 2316), (120.4, 32, 254)],
    ids=["Phi-3.5-mini's geometry, block 32", "the same, block 128", "SmolLM2"],
)
def test_the_reckoning_is_within_a_tenth_of_what_was_measured(
    files_mib: float, block: int, loaded_mib: int
) -> None:
    reckoned = memory.model_bytes(round(files_mib * MIB), block, "text")
    assert reckoned / MIB == pytest.approx(loaded_mib, rel=0.1)


def test_what_a_process_takes_is_told_and_nothing_of_one_that_is_gone() -> None:
    own, now = memory.own_bytes(os.getpid()), memory.resident_bytes(os.getpid())
    most = memory.most_bytes(os.getpid())
    assert own is not None
    assert now is not None
    assert most is not None
    assert 0 < own < now <= most + MIB
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for read in (memory.own_bytes, memory.resident_bytes, memory.most_bytes):
        assert read(gone.pid) is None
