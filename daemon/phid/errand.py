"""An errand: one task for a process of its own, which is followed to its answer or its end."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from phid import channel
from phid.channel import Connection
from phid.exits import describe_exit
from phid.jobs import Loading

_TAIL_LINES = 20
# How long a process may take to end after it has left the line, and after it was killed.
_LEFT_S, _KILLED_S = 5.0, 5.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of an errand. `answer` is its first message that is no stage; None: there was none.

    `stage` is the last stage it reported, `died` how it ended by itself (empty: it had to be
    ended), and `printed` the end of what native code wrote.
    """

    answer: Any
    stage: str
    died: str
    printed: str


def run(
    command: Sequence[str],
    task: object,
    limit_s: float,
    report: Callable[[Loading], None] = lambda _: None,
) -> Outcome:
    """Give the task to a process of `command`, for so long at most; it is gone afterwards.

    `report` gets its stages, and ends the errand by what it raises.
    """
    process, line = channel.spawn(command)
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    # Without a reader, a process that prints more than a pipe holds would wait for ever.
    reader = threading.Thread(target=_read, args=(process, tail), daemon=True)
    reader.start()
    try:
        answer, stage, left = _follow(line, task, limit_s, report)
        died = _end_of(process, reader) if left else ""
        return Outcome(answer, stage, died, "\n".join(tuple(tail)))
    finally:
        process.kill()
        line.close()
        # A process that waits inside a broken driver cannot even be killed: it is left to itself.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_KILLED_S)
            reader.join(1.0)
            channel.close(process, line)


def _follow(
    line: Connection, task: object, limit_s: float, report: Callable[[Loading], None]
) -> tuple[Any, str, bool]:
    """Its answer, if one came in time; its last stage; whether it has left the line."""
    late = time.monotonic() + limit_s
    stage = "starting"
    try:
        line.send(task)
    except OSError:
        return None, stage, True
    while True:
        try:
            if not line.poll(max(0.0, late - time.monotonic())):
                return None, stage, False
            said = line.recv()
        except (EOFError, OSError):
            return None, stage, True
        if not isinstance(said, Loading):
            return said, stage, False
        stage = said.stage
        report(Loading(stage))


def _end_of(process: subprocess.Popen[bytes], reader: threading.Thread) -> str:
    """How a process that has left the line has ended, in words."""
    try:
        process.wait(_LEFT_S)
    except subprocess.TimeoutExpired:
        return "left its line and did not end"
    reader.join(1.0)  # for its last words
    return describe_exit(process.returncode)


def _read(process: subprocess.Popen[bytes], tail: deque[str]) -> None:
    assert process.stderr is not None
    with contextlib.suppress(ValueError, OSError):
        for printed in process.stderr:
            tail.append(printed.decode("utf-8", "replace").rstrip()[:500])
