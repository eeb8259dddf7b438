"""A small JSON file of ours: read if we understand it, else set aside; replaced as a whole."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phid import log

_log = log.get("statefile")


def read(path: Path, schema: int) -> dict[str, Any]:
    """What it says; nothing if it is not there.

    One that is damaged, or that a later version has written, is never guessed at: it is kept
    beside under another name, with an error in the log, for whoever wants it back.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        _log.error("state_unreadable", path=str(path), reason=str(error))
        return {}
    except (ValueError, RecursionError) as error:
        return _refuse(path, f"it is damaged: {error}")
    found = content.get("schema") if isinstance(content, dict) else None
    if not isinstance(found, int) or isinstance(found, bool):
        return _refuse(path, "it is none of ours: it names no schema")
    if found > schema:
        says = f"written by a later version of phid: its schema is {found}, ours {schema}"
        return _refuse(path, says)
    return dict(content)


def write(path: Path, schema: int, content: dict[str, Any]) -> None:
    """Replace what it says; a power cut leaves the old or the new. Waits for the disk.

    Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Provers of two models may write at once.
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    page = json.dumps({"schema": schema} | content, ensure_ascii=False, indent=1)
    try:
        fresh.unlink(missing_ok=True)
        # Never through a link: root may write here, in a folder that is another's.
        with fresh.open("x", encoding="utf-8") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        flush(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise


def flush(path: Path) -> None:
    """Have a file, or a folder's names, on the disk itself."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def set_aside(path: Path, suffixes: Sequence[str] = ()) -> Path:
    """Move a file that cannot be used aside, for whoever wants to look into it: its new path.

    Files of its name with one of the `suffixes` go with it. Of those set aside before only the last
    is kept: a disk that fails must not be filled with them.
    """
    found = path.parent.glob(f"{path.name}.[0-9]*.bad")
    before = sorted(found, key=lambda bad: (len(bad.name), bad.name))  # by their times
    aside = path.with_name(f"{path.name}.{time.time_ns() // 1_000_000}.bad")
    for suffix in ("", *suffixes):
        with contextlib.suppress(OSError):
            _beside(path, suffix).replace(_beside(aside, suffix))
        for old in before[:-1]:
            with contextlib.suppress(OSError):
                _beside(old, suffix).unlink()
    return aside


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _refuse(path: Path, reason: str) -> dict[str, Any]:
    aside = set_aside(path)
    _log.error("state_set_aside", path=str(path), reason=reason, kept=str(aside))
    return {}
