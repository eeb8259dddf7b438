"""What the installer does to the machine: each act is told, and in a dry run only told."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

_LAST_LINES = 12
# Whose folder it is started in is anybody's guess: `python -m` would import from it.
_ELSEWHERE = "/"


class Failed(Exception):  # noqa: N818 - it reads as what it says
    """Something could not be done; the message says what, why, and what mends it."""


class Acts:
    """Does what it is asked to and says so; `dry`: only says so.

    Remembers what each file held before, for `restore`.
    """

    def __init__(self, *, dry: bool = False) -> None:
        self.dry = dry
        self._before: dict[Path, bytes | str | None] = {}

    def say(self, text: str) -> None:
        """A line for whoever watches, on stderr; if their terminal has gone, for nobody."""
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)

    def run(
        self, *argv: str | Path, env: Mapping[str, str] | None = None, long: bool = False
    ) -> None:
        """Run a command to its end. Raises Failed with the end of what it printed.

        One that takes `long` shows its progress, if there is a terminal to show it on.
        """
        command = [str(part) for part in argv]
        if self._only_told("run", " ".join(command)):
            return
        self.say(f"+ {' '.join(command)}")
        try:
            done = subprocess.run(
                command,
                cwd=_ELSEWHERE,
                env=environment(env),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=None if long and sys.stderr.isatty() else subprocess.STDOUT,
                text=True,
                errors="replace",
                check=False,
            )
        except OSError as error:
            raise Failed(f"{command[0]}: {error.strerror}") from None
        if done.returncode:
            tail = "\n".join(f"    {line}" for line in done.stdout.splitlines()[-_LAST_LINES:])
            raise Failed(f"{' '.join(command)} ended with status {done.returncode}:\n{tail}")

    def write(self, path: Path, text: str, mode: int = 0o644) -> bool:
        """Have a file hold this text, whole or not at all: True if it did not already."""
        self.remember(path)
        if self._before[path] == text.encode():
            return False
        if self._only_told("write", str(path)):
            return True
        self.say(f"+ write {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.part")
        with new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        new.replace(path)
        return True

    def link(self, path: Path, target: str) -> bool:
        """Have a symbolic link point there, changed in one step: True if it did not already."""
        self.remember(path)
        if self._before[path] == target:
            return False
        if self._only_told("link", f"{path} -> {target}"):
            return True
        self.say(f"+ link {path} -> {target}")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._link(path, target)
        return True

    def remove(self, path: Path) -> None:
        """Have no file, link or folder there."""
        if not path.exists() and not path.is_symlink():
            return
        if self._only_told("remove", str(path)):
            return
        self.say(f"+ remove {path}")
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            self.remember(path)
            path.unlink()

    def remember(self, path: Path) -> None:
        """Keep what is there now for `restore`, if it is the first time."""
        if path in self._before:
            return
        if path.is_symlink():
            self._before[path] = os.readlink(path)  # noqa: PTH115 - the text, not a path
        elif path.is_file():
            self._before[path] = path.read_bytes()
        else:
            self._before[path] = None

    def restore(self) -> None:
        """Put every file and link back as it was before the first act."""
        for path, before in self._before.items():
            if before is None:
                path.unlink(missing_ok=True)
            elif isinstance(before, str):
                self._link(path, before)
            elif not path.is_file() or path.read_bytes() != before:
                path.write_bytes(before)

    @staticmethod
    def _link(path: Path, target: str) -> None:
        new = path.with_name(f".{path.name}.part")
        new.unlink(missing_ok=True)
        new.symlink_to(target)
        new.replace(path)

    def _only_told(self, verb: str, what: str) -> bool:
        if self.dry:
            print(f"would {verb} {what}", flush=True)
        return self.dry


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours for a command, without what would lead another Python astray."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("PYTHON", "PHID_"))}
    return kept | dict(more or {})


def answer(*argv: str | Path, env: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """A command's status, output and errors, of one that changes nothing; 127 if there is none."""
    command = [str(part) for part in argv]
    try:
        done = subprocess.run(
            command,
            cwd=_ELSEWHERE,
            env=environment(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        return 127, "", f"{command[0]}: {error.strerror}"
    return done.returncode, done.stdout, done.stderr
