"""CUDA's libraries where pip puts them."""

from __future__ import annotations

import ctypes.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rig import ROOT

SAYS = (
    "from phid import nvidia\n"
    "from pathlib import Path\n"
    "print([path.name for path in nvidia.preload()])\n"
    "maps = Path('/proc/self/maps').read_text()\n"
    "print([name for name in ('libcudart.so.13', 'libcublas.so.13') if name in maps])\n"
)


def library() -> Path:
    """Any that is on this machine and in no Python yet: it stands for CUDA's."""
    name = ctypes.util.find_library("crypt") or ctypes.util.find_library("anl")
    assert name is not None
    folders = Path("/lib"), Path("/usr/lib")
    return next(path for folder in folders for path in folder.rglob(name))


def preloaded(site: Path) -> list[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'daemon'}:{site}"}
    done = subprocess.run(
        [sys.executable, "-c", SAYS], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_pip_has_brought_is_in_the_process_afterwards(tmp_path: Path) -> None:
    new, old = tmp_path / "nvidia/cu13/lib", tmp_path / "nvidia/cublas/lib"
    for folder in (new, old):
        folder.mkdir(parents=True)
    shutil.copy(library(), new / "libcudart.so.13")
    shutil.copy(library(), old / "libcublas.so.13")
    (new / "libcufft.so.12").write_text("half a download")
    found = "['libcudart.so.13', 'libcublas.so.13']"
    assert preloaded(tmp_path) == [found, found]


def test_without_these_packages_nothing_is_done(tmp_path: Path) -> None:
    assert preloaded(tmp_path) == ["[]", "[]"]
