"""What is installed is named and hashed beforehand: each lock file, whole, for what needs it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rig import ROOT

LOCKS = sorted((ROOT / "scripts" / "lock").glob("*.txt"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NEEDED = {
    "run": [*PROJECT["project"]["dependencies"], *PROJECT["dependency-groups"]["build"]],
    "demo": PROJECT["project"]["optional-dependencies"]["demo"],
    "hub": PROJECT["project"]["optional-dependencies"]["hub"],
    "dev": PROJECT["dependency-groups"]["dev"],
}
NEEDED["demo"] = NEEDED["demo"] + NEEDED["run"]
NEEDED["dev"] = NEEDED["dev"] + NEEDED["demo"]
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})\Z")


def pinned(lock: Path) -> dict[str, list[tuple[Requirement, list[str]]]]:
    """Each requirement of a lock file, once for each platform, with its hashes."""
    found: dict[str, list[tuple[Requirement, list[str]]]] = {}
    lines = lock.read_text().replace("\\\n", " ").splitlines()
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        text, *options = re.split(r"\s+(?=--)", line.strip())
        requirement = Requirement(text)
        hashes = [m[1] for option in options if (m := _HASH.match(option))]
        assert len(hashes) == len(options), f"{lock.name}: {line}"
        found.setdefault(canonicalize_name(requirement.name), []).append((requirement, hashes))
    return found


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_everything_has_one_version_and_its_hashes(lock: Path) -> None:
    everything = pinned(lock)
    assert everything
    for name, entries in everything.items():
        for requirement, hashes in entries:
            assert hashes, f"{lock.name}: {name} has no hash"
            assert requirement.url is None
            assert [s.operator for s in requirement.specifier] == ["=="], f"{lock.name}: {name}"


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_nothing_in_it_says_where_to_fetch_it(lock: Path) -> None:
    unwanted = r"https?://|-index|find-links|trusted-host|^-"
    assert not re.search(unwanted, lock.read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", NEEDED)
def test_what_the_project_asks_for_is_locked_in_a_version_it_takes(name: str) -> None:
    everything = pinned(ROOT / "scripts" / "lock" / f"{name}.txt")
    for text in NEEDED[name]:
        wanted = Requirement(text)
        entries = everything.get(canonicalize_name(wanted.name))
        assert entries, f"{name}.txt lacks {wanted.name}"
        for requirement, _ in entries:
            (version,) = (s.version for s in requirement.specifier)
            assert wanted.specifier.contains(version), f"{name}.txt: {requirement} is not {wanted}"


def test_the_scripts_install_only_with_hashes() -> None:
    text = (ROOT / "scripts" / "_venv.sh").read_text()
    joined = text.replace("\\\n", " ")
    installs = [
        line for line in joined.splitlines() if re.search(r"\b(install|sync)\b.*(-r |\$lock)", line)
    ]
    assert len(installs) >= 3
    assert all("--require-hashes" in line for line in installs), installs


def test_the_installer_installs_packages_only_with_hashes() -> None:
    """The one install without them is of the checkout itself, and has no index to look at."""
    text = (ROOT / "scripts" / "installer" / "venvs.py").read_text()
    installs = re.findall(r'\*pip, "install".*?\)  # fmt', text, re.DOTALL)
    assert len(installs) == 3
    assert all(
        '"--require-hashes"' in one or '"--no-index", "--no-deps"' in one for one in installs
    )
