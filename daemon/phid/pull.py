"""A model pulled from the Hub: resumed after a kill, checked, and visible only when it is whole."""

from __future__ import annotations

import errno
import shutil
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from phid import hub, manifest, soundness, statefile, store, unfinished
from phid.catalog import Build
from phid.endurance import Endurance, Tries
from phid.hub import Changed, HubError, Interrupted, RemoteFile, Snapshot
from phid.manifest import Kept, Manifest
from phid.store import Progress, StoreError
from phid.unfinished import Digest, Unfinished, size

_PARTIAL = ".partial"
_TELL_S = 0.1  # between two reports of progress
# What a folder in a repository has that no model needs.
_LEFT_OUT = frozenset({".gitattributes", ".gitignore", manifest.NAME})


@dataclass(slots=True)
class Pulled:
    """What a pull came to; `fetched` are the bytes that crossed the network for it."""

    folder: Path
    commit: str
    size_bytes: int
    fetched: int = 0
    known: int = 0
    recorded: int = 0
    new: bool = True


def pull(
    build: Build,
    models_dir: Path,
    progress: Progress,
    *,
    latest: bool = False,
    endurance: Endurance | None = None,
) -> Pulled:
    """Have the build in the store. Interrupted at any point, the next call goes on from there.

    A branch is followed once: later pulls get the commit that the first one found, and the same
    bytes, unless `latest` asks for a new one. Raises StoreError or HubError.
    """
    if (present := _present(build, models_dir, latest=latest)) is not None:
        return present
    if hub.offline():
        raise HubError(
            f"HF_HUB_OFFLINE is set, and {build.name} is not in {models_dir}: unset it, or bring"
            " the folder here by other means and `phid models import` it"
        )
    with store.changing(models_dir, build.name, progress):
        # It may have come while we waited.
        if (present := _present(build, models_dir, latest=latest)) is not None:
            return present
        try:
            return _Pull(build, models_dir, progress, endurance or Endurance()).run(latest=latest)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise StoreError(
                    f"the disk of {models_dir} is full: make room, then the same command goes on"
                    " where it stopped"
                ) from None
            raise


def _present(build: Build, models_dir: Path, *, latest: bool) -> Pulled | None:
    """What is there already, by its manifest and sizes; None if it is to be fetched."""
    folder = models_dir / build.name
    try:
        made = manifest.read(folder)
    except manifest.Newer as error:
        raise StoreError(str(error)) from None
    except manifest.Damaged:
        return None
    if made is None or "commit" not in made.source:
        if folder.exists():
            raise StoreError(
                f"{folder} is there, and was not pulled: `phid models rm {build.name}` first, or"
                " keep it"
            )
        return None
    whole = all(
        (folder / name).is_file() and (folder / name).stat().st_size == kept.bytes
        for name, kept in made.files.items()
    )
    if latest or not whole or (build.pinned and made.source.get("commit") != build.revision):
        return None
    total = sum(kept.bytes for kept in made.files.values())
    return Pulled(folder, str(made.source.get("commit", "")), total, new=False)


class _Pull:
    """One pull, with the store's lock held."""

    def __init__(
        self, build: Build, models_dir: Path, progress: Progress, endurance: Endurance
    ) -> None:
        self._build = build
        self._models_dir = models_dir
        self._folder = models_dir / build.name
        self._work = models_dir / f".{build.name}.part"
        self._progress = progress
        self._endurance = endurance
        self._record = _read_record(models_dir, build)
        self._title = f"pulling {build.name}"
        self._total = self._here = self._fetched = 0
        self._told = 0.0

    def run(self, *, latest: bool) -> Pulled:
        """Fetch what is missing, check all, and publish it."""
        build, record = self._build, self._record
        revision = build.revision
        if not build.pinned and record is not None and not latest:
            revision = str(record.source["commit"])
        self._progress(f"{self._title}: asking {hub.endpoint()}", None)
        snapshot = self._look(revision)
        files = _wanted(snapshot, build)
        expected = self._expected(files, snapshot.commit)
        same = _present(build, self._models_dir, latest=False) if latest else None
        if same is not None and same.commit == snapshot.commit:
            return same
        state = Unfinished.of(self._work, snapshot.commit)
        self._total = sum(file.bytes for file in files.values())
        self._title += f" ({self._total / 1e6:.0f} MB)"
        parts = {name: size(self._work / f"{name}{_PARTIAL}") for name in files}
        self._here = sum(
            files[name].bytes if name in state.done else min(part, files[name].bytes)
            for name, part in parts.items()
        )
        self._reuse(files, expected, state)
        store.check_room(self._models_dir, self._total - self._here, build.name)
        for name, file in files.items():
            if name not in state.done:
                state.done[name] = self._whole(snapshot, name, file, expected.get(name), state)
                state.write()
        return self._publish(snapshot, state.done, expected)

    def _reuse(
        self, files: dict[str, RemoteFile], expected: dict[str, str], state: Unfinished
    ) -> None:
        """Take what an older commit, or a damaged model, has of the same content."""
        try:
            made = manifest.read(self._folder)
        except manifest.Damaged:
            return
        for name, kept in (made.files if made else {}).items():
            file, path = files.get(name), self._folder / name
            if (
                file is None
                or name in state.done
                or kept.sha256 != (expected.get(name) or file.sha256)
                or size(path) != file.bytes
                or manifest.hash_file(path) != kept.sha256
            ):
                continue
            target = self._work / name
            target.parent.mkdir(parents=True, exist_ok=True)
            store.put(path, target, link=True)
            partial = self._work / f"{name}{_PARTIAL}"
            self._here += file.bytes - size(partial)
            partial.unlink(missing_ok=True)
            state.done[name] = kept
            state.write()

    def _look(self, revision: str) -> Snapshot:
        tries = Tries(self._endurance)
        while True:
            try:
                return hub.look(self._build.repo, revision, timeout_s=self._endurance.timeout_s)
            except Interrupted as error:
                self._pause(tries, error)

    def _expected(self, files: dict[str, RemoteFile], commit: str) -> dict[str, str]:
        """The hashes known before the Hub was asked; raises HubError where it contradicts them."""
        known = dict(self._build.sha256)
        if self._record is not None and self._record.source.get("commit") == commit:
            known |= {name: kept.sha256 for name, kept in self._record.files.items()}
        for name, sha256 in known.items():
            if name not in files:
                raise HubError(f"{self._build.repo} has no {name} at {commit}, and it had one")
            told = files[name].sha256
            if told is not None and told != sha256:
                raise HubError(
                    f"{self._build.repo} offers other bytes for {name} than are known"
                    f" (sha256 {told}, known {sha256}): nothing was pulled"
                )
        return known

    def _whole(
        self,
        snapshot: Snapshot,
        name: str,
        file: RemoteFile,
        expected: str | None,
        state: Unfinished,
    ) -> Kept:
        """Fetch one file; twice, if it was joined from parts and is not what it should be."""
        for last in (False, True):
            target = self._work / name
            digest, joined = self._fetch(snapshot, name, file, state)
            faults = digest.faults((expected, file.sha256), file.blob)
            partial = target.with_name(f"{target.name}{_PARTIAL}")
            if not faults:
                statefile.flush(partial)
                partial.rename(target)
                return Kept(file.bytes, digest.sha256.hexdigest())
            partial.unlink()
            self._here -= digest.size
            if last or not joined:
                break
        raise HubError(
            f"{name} came with another content than it must have ({faults}): it was not kept."
            " Pull again; if it stays so, do not trust the endpoint"
        )

    def _fetch(
        self, snapshot: Snapshot, name: str, file: RemoteFile, state: Unfinished
    ) -> tuple[Digest, bool]:
        """Fetch the rest of a file: the digest of the whole, and if it was joined from parts."""
        partial = self._work / f"{name}{_PARTIAL}"
        partial.parent.mkdir(parents=True, exist_ok=True)
        digest, joined = Digest(file.bytes), False
        with partial.open("ab+") as out:
            if out.tell() > file.bytes:
                self._here -= file.bytes
                out.truncate(0)
            out.seek(0)
            digest.take_all(out)
            tries = Tries(self._endurance)
            while digest.size < file.bytes:
                before = digest.size
                joined |= before > 0
                try:
                    self._stream(snapshot, name, file, out, digest, state)
                except Interrupted as error:
                    if digest.size - before >= self._endurance.least_bytes:
                        tries = Tries(self._endurance)
                    self._pause(tries, error)
                except Changed as error:
                    self._start_over(out, digest, file)
                    joined = False
                    state.etags.pop(name, None)
                    self._pause(tries, Interrupted(str(error), 0.0))
        return digest, joined

    def _start_over(self, out: BinaryIO, digest: Digest, file: RemoteFile) -> None:
        self._here -= digest.size
        out.truncate(0)
        digest.restart(file.bytes)

    def _stream(
        self,
        snapshot: Snapshot,
        name: str,
        file: RemoteFile,
        out: BinaryIO,
        digest: Digest,
        state: Unfinished,
    ) -> None:
        """Write what comes of one connection. Raises Interrupted, Changed or HubError."""
        endurance = self._endurance
        with hub.bytes_from(
            snapshot, file, digest.size, state.etags.get(name), timeout_s=endurance.timeout_s
        ) as (etag, pieces):
            if etag is not None and state.etags.get(name) != etag:
                state.etags[name] = etag
                state.write()
            since, brought = time.monotonic(), 0
            for piece in pieces:
                if digest.size + len(piece) > file.bytes:
                    raise Changed(f"{name} is longer than the {file.bytes} bytes it should have")
                out.write(piece)
                out.flush()  # so that a kill loses nothing that has come
                digest.take(piece)
                self._here += len(piece)
                self._fetched += len(piece)
                self._tell()
                brought += len(piece)
                if (now := time.monotonic()) - since >= endurance.window_s:
                    if brought < endurance.least_bytes:
                        raise Interrupted(f"{name}: hardly a byte comes any more")
                    since, brought = now, 0
        if digest.size < file.bytes:
            raise Interrupted(f"{name}: the connection ended after {digest.size} bytes")

    def _tell(self) -> None:
        if (now := time.monotonic()) >= self._told + _TELL_S:
            self._told = now
            self._progress(self._title, min(1.0, self._here / max(1, self._total)))

    def _pause(self, tries: Tries, error: Interrupted) -> None:
        """Wait as long as is right; raises HubError after too many tries in a row."""
        pause_s = tries.pause_s(error.wait_s)
        if pause_s is None:
            raise HubError(
                f"{error} (tried {self._endurance.attempts} times): check the network; the same"
                " command goes on where it stopped"
            ) from None
        if pause_s > 1:
            self._progress(f"{error}: again in {pause_s:.0f} s", None)
        time.sleep(pause_s)

    def _publish(
        self, snapshot: Snapshot, files: dict[str, Kept], expected: dict[str, str]
    ) -> Pulled:
        build = self._build
        try:
            faults = list(soundness.faults(self._work))
        except soundness.NoModel as error:
            faults = [str(error)]
        if faults:
            shutil.rmtree(self._work, ignore_errors=True)
            says = "; ".join(faults[:3])
            raise HubError(f"what {build.repo} has in {build.folder or '/'} is no model: {says}")
        source = {
            "endpoint": hub.endpoint(),
            "repo": build.repo,
            "revision": build.revision,
            "commit": snapshot.commit,
            "folder": build.folder,
        }
        made = Manifest(files, source, build.license, store.now())
        _write_record(self._models_dir, build, made)
        (self._work / unfinished.NAME).unlink(missing_ok=True)
        store.publish(self._work, self._folder, made)
        self._progress(self._title, 1.0)
        known = len(expected.keys() & files.keys())
        return Pulled(
            self._folder, snapshot.commit, self._total, self._fetched, known, len(files) - known
        )


def _wanted(snapshot: Snapshot, build: Build) -> dict[str, RemoteFile]:
    """The build's files, by their name in its folder. Raises HubError."""
    prefix = f"{build.folder.strip('/')}/" if build.folder else ""
    files = {
        file.path.removeprefix(prefix): file
        for file in snapshot.files
        if file.path.startswith(prefix) and PurePosixPath(file.path).name not in _LEFT_OUT
    }
    if not files:
        there = sorted({str(PurePosixPath(file.path).parent) for file in snapshot.files})
        raise HubError(
            f"{build.repo} has no folder {build.folder or '/'} at {snapshot.commit}:"
            f" it has {', '.join(there[:8]) or 'nothing'}"
        )
    for name in files:
        parts = PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts or "\\" in name or name == unfinished.NAME:
            raise HubError(f"{build.repo} has a file {name!r}, which no model has: not pulled")
    # The small ones first: what is wrong with them is seen before gigabytes have come.
    return dict(sorted(files.items(), key=lambda item: (item[1].bytes, item[0])))


def _read_record(models_dir: Path, build: Build) -> Manifest | None:
    """What the first pull brought, if it was of this very build."""
    path = store.record_path(models_dir, build.name)
    try:
        record = manifest.read(path.parent, path.name)
    except (manifest.Newer, manifest.Damaged) as error:
        raise StoreError(f"{error}; or `phid models rm --forget {build.name}`") from None
    same = record is not None and all(
        record.source.get(key) == value
        for key, value in (("repo", build.repo), ("folder", build.folder))
    )
    return record if same else None


def _write_record(models_dir: Path, build: Build, made: Manifest) -> None:
    path = store.record_path(models_dir, build.name)
    path.parent.mkdir(exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(made.text(), encoding="utf-8")
    statefile.flush(fresh)
    fresh.rename(path)
