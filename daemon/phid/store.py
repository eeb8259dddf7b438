"""The models on this machine: folders that the runtime can load, each with its manifest."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from phid import lockfile, manifest, soundness, statefile
from phid.manifest import Kept, Manifest

Progress = Callable[[str, float | None], None]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RECORDS = ".known"
_OLD = ".old"
# Kept free on a disk: a full one stops more than a pull.
RESERVE_BYTES = 64 << 20


class StoreError(Exception):
    """The store cannot do it; the message says why and how to mend it, in one line."""


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A folder with a genai_config.json; `context` in tokens, `size_bytes` of all its files."""

    name: str
    path: Path
    type: str
    context: int
    size_bytes: int
    kind: Literal["text", "vision"] = "text"


def models(models_dir: Path) -> list[StoredModel]:
    """What is in the models folder, by name; folders that are no models are passed over.

    Raises OSError where this user may not look.
    """
    if not models_dir.is_dir():
        return []
    found = [read(path) for path in sorted(models_dir.iterdir()) if not path.name.startswith(".")]
    return [model for model in found if model is not None]


def read(path: Path) -> StoredModel | None:
    """The model in a folder; None if there is none that can be read."""
    try:
        model = soundness.config(path)
        size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    except (OSError, soundness.NoModel):
        return None
    kind: Literal["text", "vision"] = "vision" if "vision" in model else "text"
    context = int(model["context_length"])
    return StoredModel(path.name, path, str(model["type"]), context, size, kind)


def resolve(wanted: str, models_dir: Path) -> tuple[str, Path] | None:
    """The name and folder of the model to run; the folder need not be there.

    `wanted` is a name in the models folder, or a path; empty means the only model there, and
    None comes back when there is not exactly one.
    """
    if not wanted:
        present = models(models_dir)
        return (present[0].name, present[0].path) if len(present) == 1 else None
    path = Path(wanted).expanduser()
    if path.is_absolute() or len(path.parts) > 1:
        return path.name, path
    return wanted, models_dir / wanted


def find(name: str, models_dir: Path) -> StoredModel:
    """The model of this name. Raises StoreError."""
    found = read(models_dir / name) if is_name(name) else None
    if found is None:
        names = ", ".join(model.name for model in models(models_dir)) or "none"
        raise StoreError(f"there is no model {name} in {models_dir} (there: {names})")
    return found


def is_name(name: str) -> bool:
    """True if a model may be called so: it is a folder's name, and stands in messages."""
    return _NAME.fullmatch(name) is not None


@contextmanager
def changing(models_dir: Path, name: str, progress: Progress) -> Iterator[None]:
    """Nobody else changes this model meanwhile; a second process waits, and says so.

    Raises StoreError where the store cannot be written.
    """
    waiting = partial(progress, f"waiting for another process that works on {name}", None)
    try:
        models_dir.mkdir(parents=True, exist_ok=True)
        with lockfile.alone(_lock(models_dir / name), waiting):
            _put_back(models_dir / name)
            yield
    except OSError as error:
        raise StoreError(cannot_write(models_dir, error)) from error


def put_back(models_dir: Path) -> None:
    """Put back every model that was moved aside by a change whose process was then killed.

    One that another process works on, or that this user may not change, stays where it is.
    """
    with suppress(OSError):
        for old in models_dir.glob(f".*{_OLD}"):
            folder = models_dir / old.name[1 : -len(_OLD)]
            with suppress(OSError), lockfile.alone(_lock(folder), _give_up):
                _put_back(folder)


def _give_up() -> None:
    raise BlockingIOError


def _put_back(folder: Path) -> None:
    """Undo the first of the two renames of `publish`, if the second has not followed."""
    if not folder.exists() and read(old := _aside(folder)) is not None:
        old.rename(folder)


def _lock(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{_OLD}")


def cannot_write(models_dir: Path, error: OSError) -> str:
    """Why a change to the store failed, and what mends it."""
    # Where a call has two files it is the second that could not be written.
    file = error.filename2 or error.filename
    why = f"{file}: {error.strerror}" if file and error.strerror else str(error)
    return (
        f"cannot write to {models_dir} ({why}): give this user the right to,"
        " or set another models_dir (PHID_MODELS_DIR)"
    )


def cannot_read(where: Path, error: OSError) -> str:
    """Why a file or folder (`where`, if the error names none) could not be read; what mends it."""
    mend = "check the disk it is on"
    if isinstance(error, PermissionError):
        mend = "give this user the right to, or use sudo"
    return f"cannot read {error.filename or where} ({error.strerror or error}): {mend}"


def check_room(models_dir: Path, needed: int, what: str) -> None:
    """Raises StoreError if so many bytes more do not fit on the disk."""
    free = shutil.disk_usage(models_dir).free
    if needed + RESERVE_BYTES > free:
        short = (needed + RESERVE_BYTES - free) / 1e6
        raise StoreError(
            f"{what} needs {needed / 1e6:.0f} MB more and {models_dir} has {free / 1e6:.0f} MB"
            f" free: make room for {short:.0f} MB, or set another models_dir"
        )


def publish(work: Path, folder: Path, made: Manifest) -> None:
    """Make a whole folder the model of its name, at once. Raises OSError."""
    path = work / manifest.NAME
    path.write_text(made.text(), encoding="utf-8")
    statefile.flush(path)
    old = _aside(folder)
    shutil.rmtree(old, ignore_errors=True)  # a killed run left it
    statefile.flush(work)
    if folder.exists():
        folder.rename(old)  # a process killed here leaves the rest to put_back
    work.rename(folder)
    statefile.flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def now() -> str:
    """The time, as a manifest has it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def copy_in(
    source: Path,
    models_dir: Path,
    name: str,
    progress: Progress,
    *,
    link: bool = False,
    replace: bool = False,
) -> tuple[Path, Manifest]:
    """Copy a model's folder into the store, or hard-link its files: its new place and manifest.

    With `replace` it takes the place of one of that name, which stays until the copy is whole; one
    with the same bytes is kept. Raises StoreError where the source is no whole model, or the name
    is taken or cannot be one.
    """
    if not is_name(name):
        raise StoreError(f"{name!r} cannot be a model's name: give one of letters with --name")
    files = _files(source)
    folder = models_dir / name
    with changing(models_dir, name, progress):
        if folder.exists():
            if not replace:
                raise StoreError(f"{name} is there already: --replace it, or give another --name")
            if (there := _same(folder, source, files)) is not None:
                return folder, there
        total = sum(files.values())
        if not link:
            check_room(models_dir, total, name)
        work = folder.with_name(f".{name}.import")
        shutil.rmtree(work, ignore_errors=True)  # a killed run left it
        kept, done = {}, 0
        try:
            for file, size in files.items():
                progress(f"importing {name} ({total / 1e6:.0f} MB)", done / max(1, total))
                target = work / file
                target.parent.mkdir(parents=True, exist_ok=True)
                put(source / file, target, link=link)
                kept[file.as_posix()] = Kept(size, manifest.hash_file(target))
                done += size
            progress(f"importing {name} ({total / 1e6:.0f} MB)", 1.0)
            made = Manifest(kept, _whence(source), _license(source), now())
            publish(work, folder, made)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder, made


def _same(folder: Path, source: Path, files: dict[Path, int]) -> Manifest | None:
    """The manifest of a model in the store that has the same bytes as these files."""
    try:
        there = manifest.read(folder)
    except (manifest.Newer, manifest.Damaged):
        return None
    if there is None or manifest.differences(folder, there):
        return None
    names = {file.as_posix(): size for file, size in files.items()}
    if names != {name: kept.bytes for name, kept in there.files.items()}:
        return None
    try:
        same = all(manifest.hash_file(source / n) == kept.sha256 for n, kept in there.files.items())
    except OSError as error:
        raise StoreError(cannot_read(source, error)) from error
    return there if same else None


def _files(source: Path) -> dict[Path, int]:
    """The files of a whole model, by their names in its folder. Raises StoreError."""
    try:
        faults = list(soundness.faults(source))
        files = {
            path.relative_to(source): path.stat().st_size
            for path in sorted(source.rglob("*"))
            if path.is_file()
            and path.name != manifest.NAME
            and not any(part.startswith(".") for part in path.relative_to(source).parts)
        }
    except soundness.NoModel as error:
        raise StoreError(str(error)) from None
    except OSError as error:
        raise StoreError(cannot_read(source, error)) from error
    if faults:
        raise StoreError(f"{source} is no whole model: {'; '.join(faults[:3])}")
    return files


def put(source: Path, target: Path, *, link: bool) -> None:
    """Copy a file, and see it on the disk; with `link` hard-link it where that can be.

    Raises OSError, or StoreError where it is the source that cannot be read.
    """
    if link:
        try:
            os.link(source.resolve(), target)
        except OSError:  # another disk, or one that knows no links
            pass
        else:
            return
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        if error.filename == str(source) and error.filename2 is None:
            raise StoreError(cannot_read(source, error)) from error
        raise
    statefile.flush(target)


def _whence(source: Path) -> dict[str, Any]:
    return {"imported": str(source.resolve())}


def _license(source: Path) -> str:
    try:
        before = manifest.read(source)
    except (manifest.Newer, manifest.Damaged):
        before = None
    return before.license if before else "unknown"


def verify(model: StoredModel, progress: Progress) -> tuple[Manifest | None, list[str]]:
    """The model's manifest, and in words all that is wrong; reads every byte.

    Raises StoreError where the manifest is of a later phid.
    """
    try:
        faults = list(soundness.faults(model.path))
        made = manifest.read(model.path)
    except manifest.Newer as error:
        raise StoreError(str(error)) from None
    except (manifest.Damaged, soundness.NoModel) as error:
        return None, [str(error)]
    if made is None:
        return None, faults
    total = sum(kept.bytes for kept in made.files.values())
    done = 0

    def read_on(size: int) -> None:
        nonlocal done
        done += size
        progress(f"verifying {model.name} ({total / 1e6:.0f} MB)", min(1.0, done / max(1, total)))

    changed = manifest.differences(model.path, made, read_on)
    # A file that is missing or cut off is told once.
    return made, changed or faults


def remove(models_dir: Path, name: str, progress: Progress, *, forget: bool) -> int:
    """Remove a model, and what an interrupted pull of it has left: the bytes that this frees.

    What was recorded of its files is kept, so that another pull gets the same ones; `forget`
    drops that too. Raises StoreError.
    """
    if not is_name(name):
        raise StoreError(f"{name!r} is no model's name: `phid models list` has those that are here")
    folder = models_dir / name
    leftovers = [models_dir / f".{name}{end}" for end in (".part", _OLD, ".import")]
    record = record_path(models_dir, name)
    drops = (folder, *leftovers, record) if forget else (folder, *leftovers)
    if not any(path.exists() for path in drops):
        find(name, models_dir)  # says what there is
    with changing(models_dir, name, progress):
        freed = 0
        for path in (folder, *leftovers):
            if path.is_symlink():
                path.unlink()
            elif path.exists():
                freed += sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
                shutil.rmtree(path)
        if forget:
            record.unlink(missing_ok=True)
    return freed


def record_path(models_dir: Path, name: str) -> Path:
    """Where the record of what a model's first pull brought is kept."""
    return models_dir / _RECORDS / f"{name}.json"
