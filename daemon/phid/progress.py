"""The progress of long work, shown to people on stderr."""

from __future__ import annotations

import sys


def show(stage: str, fraction: float | None) -> None:
    """Say what is being done: one line rewritten on a terminal, else a line a stage."""
    share = "" if fraction is None else f" {fraction:4.0%}"
    if sys.stderr.isatty():
        end = "\n" if fraction == 1 else ""
        print(f"\r\x1b[K{stage}{share}", end=end, file=sys.stderr, flush=True)
    elif fraction in (None, 0, 1):
        print(f"{stage}{share}", file=sys.stderr, flush=True)
