"""Log lines: one event a line, as JSON for journals or as text for people; on stderr."""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import Literal

import structlog

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


def configure(level: str = "info", style: Literal["auto", "json", "text"] = "auto") -> None:
    """Log at this level from now on; may be called again to change it."""
    text = style == "text" or (style == "auto" and sys.stderr.isatty())
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), sort_keys=False)
        if text
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=lambda *_: _Lines(),
        cache_logger_on_first_use=False,
    )


class _Lines:
    """Writes to stderr. A line that cannot be written, to a full disk say, is nobody's trouble."""

    def msg(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    log = debug = info = warning = error = critical = exception = msg


def get(name: str) -> structlog.typing.FilteringBoundLogger:
    """A logger whose lines carry the part's name."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(part=name)
    return logger
