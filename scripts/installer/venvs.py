"""The environments: one for each build, made whole beside the one in use, then switched to."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from installer.acts import Acts, Failed, answer
from installer.layout import Layout

_WHOLE = ".whole"
_ROOM_MB, _ROOM_WITH_CUDA_MB = 700, 4600
# A package that each brings.
_OF_EXTRAS = {
    "hub": "huggingface_hub",
    "demo": "iotcore",
    "cuda": "onnxruntime_gpu",
    "qnn": "onnxruntime_qnn",
    "openvino": "onnxruntime_ep_openvino",
}
CPU, CUDA = "cpu", "cuda"
PROVIDERS = (CPU, CUDA, "openvino", "qnn")
# What CUDA's packages write over.
_CPUS = ("onnxruntime", "onnxruntime-genai")


def name(layout: Layout, locks: Sequence[Path]) -> str:
    """What the checkout's build is called: its version, and a hash of all that goes into it."""
    package = layout.checkout / "daemon/phid"
    digest = hashlib.sha256(sys.version.encode())
    for path in [*locks, layout.checkout / "pyproject.toml", *sorted(_sources(package))]:
        digest.update(os.path.relpath(path, layout.checkout).encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return f"{version(layout)}-{digest.hexdigest()[:12]}"


def version(layout: Layout) -> str:
    """The checkout's version of phid."""
    text = (layout.checkout / "daemon/phid/__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    assert found is not None
    return found[1]


def locks_of(layout: Layout, extras: Iterable[str], wheelhouse: Path | None = None) -> list[Path]:
    """The lock files with what every device needs, and with the packages of extras.

    In their place the list of a wheelhouse that has one, such as scripts/jetson-wheels makes: of
    runtimes that no index has.
    """
    if wheelhouse is not None and (own := wheelhouse / "requirements.txt").is_file():
        return [own]
    return [layout.checkout / "scripts/lock" / f"{extra}.txt" for extra in ("run", *extras)]


def brings(wheelhouse: Path, extra: str) -> bool:
    """Whether a wheelhouse was filled for this extra; one that we do not know of it has to have."""
    package = _OF_EXTRAS.get(extra)
    return package is None or any(wheelhouse.glob(f"{package}-*"))


def extras_of(folder: Path) -> list[str]:
    """The extras that an environment was made with."""
    try:
        return (folder / _WHOLE).read_text(encoding="utf-8").split()
    except OSError:
        return []


def build(acts: Acts, layout: Layout, extras: Sequence[str], wheelhouse: Path | None) -> Path:
    """The environment of the checkout's build, made if it is not there whole.

    Raises Failed; what is in use is not touched.
    """
    locks = locks_of(layout, extras, wheelhouse)
    folder = layout.venvs / name(layout, locks)
    if (folder / _WHOLE).exists():
        acts.say(f"{folder} is there already")
        return folder
    in_place = [lock for lock in locks if lock.stem == CUDA]
    if not acts.dry:
        _check_room(layout, _ROOM_WITH_CUDA_MB if in_place else _ROOM_MB)
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off
    try:
        pip = _make(acts, layout, folder, wheelhouse)
        source = ("--no-index", "--find-links", wheelhouse) if wheelhouse else ()
        options = ("--disable-pip-version-check", "--no-input", "--progress-bar", "off")
        acts.run(
            *pip, "install", *options, *source, "--require-hashes", "--only-binary", ":all:",
            *(part for lock in locks if lock not in in_place for part in ("-r", lock)),
        )  # fmt: skip
        for lock in in_place:
            acts.run(*pip, "uninstall", *options[:2], "--yes", *_CPUS)
            acts.run(
                *pip, "install", *options, *source, "--require-hashes", "--no-deps",
                "--only-binary", ":all:", "-r", lock,
            )  # fmt: skip
        # The build's own tools are locked too, and in this environment.
        acts.run(
            *pip, "install", *options, "--no-index", "--no-deps", "--no-build-isolation",
            layout.checkout,
        )  # fmt: skip
        acts.write(folder / _WHOLE, " ".join(extras))
    except Failed:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def current(layout: Layout) -> Path | None:
    """The environment in use; None where there is none."""
    if not layout.venv.is_symlink():
        return None
    folder = layout.venv.parent / os.readlink(layout.venv)  # noqa: PTH115 - it is relative
    return folder if folder.is_dir() else None


def adopt(acts: Acts, layout: Layout) -> None:
    """Take an environment that was made by hand in the link's place among ours: to come back to."""
    if acts.dry or layout.venv.is_symlink() or not layout.venv.is_dir():
        return
    layout.venvs.mkdir(exist_ok=True)
    layout.venv.rename(layout.venvs / "made-by-hand")
    layout.venv.symlink_to("venvs/made-by-hand")


def switch(acts: Acts, layout: Layout, folder: Path) -> bool:
    """Have phid.service's next start use this environment: True if it did not already."""
    if not acts.dry:
        os.sync()  # a power cut after the switch must find what it switched to
    return acts.link(layout.venv, f"venvs/{folder.name}")


def prune(acts: Acts, layout: Layout, keep: set[Path]) -> None:
    """Remove every other environment."""
    for folder in sorted(layout.venvs.glob("*")):
        if folder not in keep:
            acts.remove(folder)


def _sources(package: Path) -> Iterator[Path]:
    """All that a build puts into the environment."""
    for path in package.rglob("*"):
        if path.is_file() and path.parent.name != "__pycache__":
            yield path


def _make(
    acts: Acts, layout: Layout, folder: Path, wheelhouse: Path | None
) -> tuple[str | Path, ...]:
    """An empty environment: its pip, as a command."""
    python = folder / "bin/python"
    if _has_ensurepip():
        acts.run(sys.executable, "-m", "venv", folder)
        return (python, "-m", "pip")
    if wheelhouse is not None:
        wheel = _pip_in(wheelhouse, layout.checkout / "scripts/lock/pip.txt")
        acts.run(sys.executable, "-m", "venv", "--without-pip", folder)
        return (python, wheel / "pip")
    if shutil.which("apt-get") is None:
        raise Failed(f"{sys.executable} has no ensurepip: install the package that brings it")
    package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
    acts.say(f"{sys.executable} has no ensurepip: {package} brings it")
    acts.run("apt-get", "-qq", "update")
    acts.run(
        "apt-get", "-qq", "install", "--no-install-recommends", "-y", package,
        env={"DEBIAN_FRONTEND": "noninteractive"},
    )  # fmt: skip
    acts.run(sys.executable, "-m", "venv", folder)
    return (python, "-m", "pip")


def _pip_in(wheelhouse: Path, lock: Path) -> Path:
    """The wheelhouse's wheel of pip, which is run from it: one that the lock names by its hash."""
    wheels = sorted(wheelhouse.glob("pip-*.whl"))
    named = lock.read_text(encoding="utf-8")
    for wheel in wheels:
        if hashlib.sha256(wheel.read_bytes()).hexdigest() in named:
            return wheel
    has = f"a {wheels[-1].name} that {lock} does not name" if wheels else "no pip"
    raise Failed(
        f"{sys.executable} has no ensurepip, and {wheelhouse} {has}:"
        f" pip download --require-hashes --dest {wheelhouse} -r {lock}"
    )


def _has_ensurepip() -> bool:
    # Debian's python3 has the module, without the wheels that it needs.
    return answer(sys.executable, "-c", "import ensurepip; ensurepip.version()")[0] == 0


def _check_room(layout: Layout, room_mb: int) -> None:
    layout.venvs.mkdir(parents=True, exist_ok=True)
    free_mb = shutil.disk_usage(layout.venvs).free >> 20
    if free_mb < room_mb:
        raise Failed(
            f"{layout.venvs} has {free_mb} MiB free, an environment takes {room_mb}:"
            f" make room (du -xh / | sort -h | tail)"
        )
