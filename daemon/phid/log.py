"""Log lines: one event a line, as JSON for journals or as text for people; on stderr."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Literal, TextIO

import structlog

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
# Priorities of syslog(3): journald takes them off the line's head (sd-daemon(3)).
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3}


def configure(level: str = "info", style: Literal["auto", "json", "text"] = "auto") -> None:
    """Log at this level from now on; may be called again to change it."""
    text = style == "text" or (style == "auto" and sys.stderr.isatty())
    lines = _Lines(in_journal=not text and _is_journal(sys.stderr))
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), sort_keys=False)
        if text
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=lambda *_: lines,
        cache_logger_on_first_use=False,
    )


class _Lines:
    """Writes to stderr. A line that cannot be written, to a full disk say, is dropped."""

    def __init__(self, *, in_journal: bool) -> None:
        self._in_journal = in_journal

    def debug(self, line: str) -> None:
        self._write(line, "debug")

    def info(self, line: str) -> None:
        self._write(line, "info")

    def warning(self, line: str) -> None:
        self._write(line, "warning")

    def error(self, line: str) -> None:
        self._write(line, "error")

    log = msg = info
    critical = exception = error

    def _write(self, line: str, level: str) -> None:
        head = f"<{_PRIORITIES[level]}>" if self._in_journal else ""
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"{head}{line}\n")
            sys.stderr.flush()


def _is_journal(stream: TextIO) -> bool:
    """Whether journald reads what is written there; see $JOURNAL_STREAM in systemd.exec(5)."""
    told = os.environ.get("JOURNAL_STREAM", "")
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return told == f"{status.st_dev}:{status.st_ino}"


def get(name: str) -> structlog.typing.FilteringBoundLogger:
    """A logger whose lines carry the part's name."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(part=name)
    return logger


def fault(error: Exception) -> str:
    """What an exception is and where it was raised; not its words, which may be a message's."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
