"""The progress of long work, shown to people on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def _going_on() -> Iterator[None]:
    """A terminal that has gone is no reason to stop, nor to end with another status."""
    try:
        yield
    except OSError:
        # What is left to be written would fail again when the program ends: then it is 120.
        gone = os.open(os.devnull, os.O_WRONLY)
        os.dup2(gone, sys.stderr.fileno())
        os.close(gone)


class Progress:
    """Say what is being done: one line rewritten on a terminal, elsewhere a line as it begins."""

    def __init__(self) -> None:
        self._stage = ""

    def __call__(self, stage: str, fraction: float | None) -> None:
        """Show the stage, and the share done where it is known."""
        with _going_on():
            if sys.stderr.isatty():
                share = "" if fraction is None else f" {fraction:4.0%}"
                end = "\n" if fraction == 1 else ""
                print(f"\r\x1b[K{stage}{share}", end=end, file=sys.stderr, flush=True)
            elif stage != self._stage:
                print(stage, file=sys.stderr, flush=True)
        self._stage = stage

    def end(self) -> None:
        """Leave the line, if there is one: what comes next is an answer."""
        with _going_on():
            if self._stage and sys.stderr.isatty():
                print(file=sys.stderr, flush=True)
        self._stage = ""
