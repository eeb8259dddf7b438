"""How a process ended, in words."""

from __future__ import annotations

import signal

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
