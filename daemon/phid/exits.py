"""How a process ends: the statuses of our own commands, and any other's end in words."""

from __future__ import annotations

import signal

OK = 0
ERROR = 1
USAGE = 2  # argparse's own
UNREACHABLE = 3
NO_ANSWER = 4
CANCELLED = 5
DEADLINE = 6
BUSY = 7
TAKEN_OVER = 75  # EX_TEMPFAIL: another client uses our id; systemd does not restart us
CONFIG = 78  # EX_CONFIG of sysexits.h: systemd shows it by name
INTERRUPTED = 130

_HINTS = {
    "SIGKILL": " (out of memory, or killed by hand)",
    "SIGILL": " (this build needs instructions this CPU does not have)",
    "SIGSEGV": " (a fault in native code)",
    "SIGABRT": " (native code gave up)",
}


def describe_exit(returncode: int) -> str:
    """How a process ended, in words: for people who read a status line."""
    if returncode >= 0:
        return f"ended with status {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    return f"was ended by {name}{_HINTS.get(name, '')}"
