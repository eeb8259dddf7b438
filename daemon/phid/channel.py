"""The line between the service and a child process: spawn a child on it, or be one."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from multiprocessing.connection import Pipe
from typing import TYPE_CHECKING, Any

from phid import programs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

if sys.platform == "win32":
    from multiprocessing.connection import PipeConnection as Connection
else:
    from multiprocessing.connection import Connection

__all__ = [
    "AT_ONCE_BYTES",
    "ENGINE",
    "PROVER",
    "TRIAL",
    "Connection",
    "arrival",
    "close",
    "inherited",
    "room",
    "spawn",
]

ENGINE = programs.command("phid.engine")
"""The command of an engine."""
PROVER = programs.command("phid.prover")
"""The command of a prover, which takes an engine's place."""
TRIAL = programs.command("phid.trial")
"""The command of a trial, which a prover starts."""

AT_ONCE_BYTES = 32_768
"""The most that a line with `room` takes at once: well below three quarters of its buffer."""

_VARIABLE = "PHID_CHANNEL"


def spawn(command: Sequence[str]) -> tuple[subprocess.Popen[bytes], Connection]:
    """Start `command` with a connection to it; the child takes its end by `inherited()`.

    The caller reads the child's stderr (a pipe: what native libraries print) and keeps the Popen:
    closing its stdin, or dying, ends the child, whatever it is doing. The child has a process group
    of its own, so a Ctrl-C in the terminal reaches only the caller.
    """
    ours, theirs = Pipe()
    # The line goes to this child only: a copy in another child would hide that its end is gone.
    handle = theirs.fileno()
    options: dict[str, Any]
    if sys.platform == "win32":
        # Written from the documentation, never run: the handle list limits what is inherited.
        os.set_handle_inheritable(handle, True)
        options = {
            "startupinfo": subprocess.STARTUPINFO(lpAttributeList={"handle_list": [handle]}),
            "creationflags": subprocess.CREATE_NEW_PROCESS_GROUP,
        }
    else:
        options = {"pass_fds": (handle,), "process_group": 0}
    try:
        child = subprocess.Popen(  # noqa: S603 - the command is our own
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=programs.environment() | {_VARIABLE: str(handle)},
            **options,
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return child, ours


def close(child: subprocess.Popen[bytes], connection: Connection) -> None:
    """Close every descriptor that a child which has ended leaves here."""
    connection.close()
    for pipe in (child.stdin, child.stderr):
        if pipe is not None:
            pipe.close()


def inherited() -> Connection:
    """Take this child's end of the line; from here on the process ends with its parent."""
    handle = os.environ.pop(_VARIABLE, None)
    if handle is None:
        sys.exit("this program is started by the phid service and needs its connection")
    _end_with_parent()
    if sys.platform != "win32":
        os.set_inheritable(int(handle), False)
    return Connection(int(handle))


def arrival(connection: Connection) -> Callable[[], bool]:
    """Build a cheap test whether something (or the end) can be read from the connection now.

    `Connection.poll` builds a selector each time, which is too much to do per token.
    """
    if sys.platform == "win32":
        return connection.poll
    waiting = select.poll()
    waiting.register(connection.fileno(), select.POLLIN)
    return lambda: bool(waiting.poll(0))


def room(connection: Connection) -> Callable[[], bool]:
    """Build a test whether a message of up to AT_ONCE_BYTES can be sent now without waiting.

    Always False where that cannot be known.
    """
    if sys.platform != "linux":
        return lambda: False
    waiting = select.poll()
    waiting.register(connection.fileno(), select.POLLOUT)
    # Linux gives POLLOUT while three quarters of the buffer are free (unix_writable in af_unix.c).
    return lambda: any(events == select.POLLOUT for _, events in waiting.poll(0))


def _end_with_parent() -> None:
    """Have the kernel kill this process once the parent's end of stdin is gone.

    A native call can hold the GIL for a minute, during which no code of ours would see that the
    connection has ended. Nothing is ever written to stdin, so the only signal is its end.
    """
    if sys.platform == "linux":
        import fcntl  # noqa: PLC0415 - not on Windows
        import signal  # noqa: PLC0415

        with contextlib.suppress(OSError):
            fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
            fcntl.fcntl(0, fcntl.F_SETSIG, signal.SIGKILL)
            fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
            # The parent may have gone before this was armed.
            if select.select([0], [], [], 0)[0]:
                sys.exit("the parent process is gone")
