"""scripts/install where python3 is too old, as on Ubuntu 22.04: what it finds, brings and says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rig import ROOT

TOOLS = ("bash", "dirname", "env", "ln", "mkdir", "readlink")
TOO_OLD = '#!/bin/sh\n[ "$1" = --version ] && echo Python 3.10.12 && exit\nexit 1\n'
OURS = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
HERE = "phid needs Python 3.11, 3.12 or 3.13; here is Python 3.10.12: bringing one"
# What each distribution's archive has.
ARCHIVES = {
    "Ubuntu 22.04": "python3.11",
    "Debian 12": "python3.11",
    "Ubuntu 24.04": "python3.12",
    "Debian 13": "python3.13",
}
# With this the installer's own Python is found, told and run, and has nothing to do.
NOTHING = ("--purge",)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where all commands are, with a python3 that is too old."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).symlink_to(shutil.which(tool) or tool)
    command(folder / "python3", TOO_OLD)
    command(folder / "id", "#!/bin/sh\necho 0\n")  # nothing here needs more than the word
    return folder


def command(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


def archive(path: Path, has: str) -> None:
    """apt-get and apt-cache of a distribution whose archive has this one Python."""
    command(path / "apt-cache", f'#!/bin/sh\n[ "$2" = {has} ] || exit 100\n')
    command(path / "ready", OURS)
    command(
        path / "apt-get",
        f'#!/bin/sh\ncase "$*" in *" install "*" {has} {has}-venv") ln {path}/ready {path}/{has};;'
        ' *" update") ;; *) exit 100;; esac\n',
    )


def install(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "scripts/install"), *arguments],
        capture_output=True, text=True, check=False, env={"PATH": str(path)},
    )  # fmt: skip


def test_a_newer_one_beside_it_is_found(path: Path) -> None:
    command(path / "python3.12", OURS)
    done = install(path, *NOTHING)
    assert f"Python: {path}/python3.12, Python {sys.version_info[0]}." in done.stderr
    assert "bringing" not in done.stderr


def test_one_in_somebodys_home_is_not_taken(path: Path) -> None:
    # The service sees nobody's home. /root and /home are such; this one is not there at all.
    (path / "python3.12").symlink_to("/root/.local/python3.12")
    assert HERE in install(path, "--dry-run").stderr


@pytest.mark.parametrize("system", ARCHIVES)
def test_the_distributions_own_is_brought(system: str, path: Path) -> None:
    has = ARCHIVES[system]
    archive(path, has)
    done = install(path, *NOTHING)
    assert HERE in done.stderr
    act = (
        f"+ env DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends -y {has}"
    )
    assert f"{act} {has}-venv\n" in done.stderr
    assert re.search(rf"^Python: {path}/{has}, Python 3\.1[123]\.\d+$", done.stderr, re.MULTILINE)
    assert done.returncode == 2  # of the installer itself: wrong use


def test_a_dry_run_says_what_it_would_bring_and_brings_nothing(path: Path) -> None:
    archive(path, "python3.11")
    done = install(path, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "would run apt-get -qq update" in done.stderr
    assert re.search(r"would run env .* -y python3\.11 python3\.11-venv", done.stderr)
    assert not (path / "python3.11").exists()


def test_uvs_own_build_goes_before_the_distributions(path: Path, tmp_path: Path) -> None:
    archive(path, "python3.11")
    brought = tmp_path / "brought/bin/python3"
    command(
        path / "uv",
        f"""#!/bin/sh
[ $1 = --version ] && exit
[ $UV_PYTHON_INSTALL_DIR = /opt/phid/python ] || exit 9
case "$*" in
"python install --quiet 3.12") mkdir -p {brought.parent}; ln {path}/ready {brought};;
"python find --managed-python 3.12") echo {brought};;
*) exit 9;;
esac
""",
    )
    done = install(path, *NOTHING)
    assert f"Python: {brought}, Python 3." in done.stderr, done.stderr
    assert "apt-get" not in done.stderr


@pytest.mark.parametrize("archive_has", [None, "python3.10"])
def test_where_there_is_none_it_says_how_to_get_one(archive_has: str | None, path: Path) -> None:
    if archive_has:
        archive(path, archive_has)
    done = install(path, *NOTHING)
    assert done.returncode == 1
    assert HERE in done.stderr
    assert "neither uv nor an apt package python3.11, 3.12 or 3.13" in done.stderr
    assert "UV_INSTALL_DIR=/usr/local/bin" in done.stderr


def test_without_a_network_it_brings_none(path: Path, tmp_path: Path) -> None:
    archive(path, "python3.11")
    done = install(path, "--offline", str(tmp_path))
    assert done.returncode == 1
    assert "which --offline cannot bring; here is Python 3.10.12" in done.stderr
    assert not (path / "python3.11").exists()


@pytest.mark.namespace
def test_what_was_brought_before_is_found_again(path: Path) -> None:
    script = (
        "mount -t tmpfs tmpfs /opt && mkdir -p /opt/phid/python/cpython-3.12/bin &&"
        f" cp {path}/ready /opt/phid/python/cpython-3.12/bin/python3 &&"
        f" PATH={path} exec {ROOT}/scripts/install --purge"
    )
    command(path / "ready", OURS)
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    argv = ["unshare", *as_root, "--mount", "sh", "-c", script]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert "Python: /opt/phid/python/cpython-3.12/bin/python3, Python 3." in done.stderr
