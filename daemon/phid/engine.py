"""The engine program: one loaded model, jobs in and events out over the connection it was given."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import time
from collections import deque
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

from phid import channel
from phid.errors import Code, Refused
from phid.generation import coalesce, describe, generate
from phid.jobs import (
    Cancel,
    Command,
    Event,
    Failed,
    Finish,
    Finished,
    Gate,
    Job,
    Load,
    LoadFailed,
    Loading,
    Ready,
    Stop,
    Unchanged,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from phid.channel import Connection
    from phid.gate import ChangeGate
    from phid.generation import Runtime

_NICE = 5


class Engine:
    """Takes Load, then jobs one at a time in the order they came, in one thread.

    The runtime holds the GIL for a whole step, so commands are looked at between two steps.
    """

    def __init__(self, connection: Connection, clock: Callable[[], float] = time.monotonic) -> None:
        self._connection = connection
        self._arrived = channel.arrival(connection)
        self._clock = clock
        self._queue: deque[tuple[Job, float]] = deque()
        self._running: str | None = None
        self._cancelled = False
        self._stopping = False
        self._gate: ChangeGate | None = None
        self._loop_tokens = self._memory_bytes = 0

    def run(self) -> int:
        """Serve until Stop: the exit status. Raises EOFError or OSError when the line ends."""
        load = self._connection.recv()
        if isinstance(load, Stop):
            return 0
        self._loop_tokens, self._memory_bytes = load.loop_tokens, load.memory_bytes
        runtime = self._load(load)
        if runtime is None:
            return 1
        with closing(runtime):
            self._send(Ready(runtime.facts))
            while not self._stopping:
                if self._queue:
                    self._serve(runtime)
                else:
                    self._take(self._connection.recv())
                self._take_arrived()
        for job, _ in self._queue:
            self._send(Failed(job.id, Code.CANCELLED, "the engine was stopped"))
        return 0

    def _load(self, load: Load) -> Runtime | None:
        try:
            return load_runtime(load, self._send)
        except Refused as refused:
            self._send(LoadFailed(refused.failure.code, refused.failure.message))
        except Exception as error:  # noqa: BLE001 - the service is told, whatever it was
            self._send(LoadFailed(*describe(error, quote=True)))
        return None

    def _serve(self, runtime: Runtime) -> None:
        job, received_s = self._queue.popleft()
        if job.gate is not None and not self._passes(job, job.gate):
            return
        self._running = job.id
        self._cancelled = False
        events = generate(
            job,
            runtime,
            received_s=received_s,
            cancelled=self._is_cancelled,
            clock=self._clock,
            loop_tokens=self._loop_tokens,
        )
        with closing(events):
            for event in coalesce(events, job.gather_s, self._clock):
                if self._gate and job.gate and _is_answer(event):
                    self._gate.answered()
                self._send(event)
        self._running = None

    def _passes(self, job: Job, gate: Gate) -> bool:
        """True if the job is to be run; else it has been ended."""
        # Imported only where needed: it brings OpenCV with it.
        from phid.gate import ChangeGate  # noqa: PLC0415

        self._gate = self._gate or ChangeGate(self._memory_bytes)
        try:
            change_pct = self._gate.change_pct(gate, job.images[-1])
        except Refused as refused:
            failure = refused.failure
            self._send(Failed(job.id, failure.code, failure.message, failure.field))
            return False
        except Exception as error:  # noqa: BLE001 - as in generate: the engine lives on
            self._send(Failed(job.id, *describe(error, quote=False)))
            return False
        if change_pct is None or change_pct >= gate.min_change_pct:
            return True
        self._send(Unchanged(job.id, round(change_pct, 2)))
        return False

    def _is_cancelled(self) -> bool:
        self._take_arrived()
        return self._cancelled

    def _take_arrived(self) -> None:
        while self._arrived():
            self._take(self._connection.recv())

    def _take(self, command: Command) -> None:
        match command:
            case Job():
                self._queue.append((command, self._clock()))
            case Cancel():
                self._cancel(command.job_id)
            case Stop():
                # Whatever runs ends as cancelled at its next token: every job gets its outcome.
                self._stopping = self._cancelled = True
            case Load():
                raise TypeError("an engine loads one model: a second Load came")
            case _:
                assert_never(command)

    def _cancel(self, job_id: str) -> None:
        if job_id == self._running:
            self._cancelled = True
            return
        for entry in self._queue:
            if entry[0].id == job_id:
                self._queue.remove(entry)
                self._send(Failed(job_id, Code.CANCELLED, "cancelled before it started"))
                return

    def _send(self, event: Event) -> None:
        self._connection.send(event)


def _is_answer(event: Event) -> bool:
    return isinstance(event, Finished) and event.finish in (Finish.STOP, Finish.LENGTH)


def load_runtime(load: Load, report: Callable[[Loading], None]) -> Runtime:
    """Load the model into the runtime `load` names; raises Refused with what a person can do.

    A runtime is imported when it is asked for: the native ones take memory, and can be missing
    or die on a CPU they were not built for.
    """
    if load.runtime == "scripted":
        from phid import scripted  # noqa: PLC0415

        return scripted.load(load, report)
    from phid import runtime  # noqa: PLC0415

    return runtime.load(load, report)


def main() -> int:
    """Run one engine on the connection this process was started with."""
    # The service ends an engine, by Stop or by ending the connection. What a terminal or a
    # service manager sends to the whole group must not cut off the answer it is draining.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # Native libraries print to stdout as they like; the service reads one stream.
    os.dup2(2, 1)
    faulthandler.enable()
    # The engine is the one to go when memory runs out: its jobs are answered and it comes back.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("800", encoding="ascii")
    # Its threads fill every core: without this, the service's threads would wait for a scheduler's
    # slice of one that computes, and messages with them. What other services get is their cgroup's
    # affair. Where a sandbox forbids it, the engine does without.
    if sys.platform != "win32":
        with contextlib.suppress(OSError):
            os.nice(_NICE)
    connection = channel.inherited()
    with contextlib.suppress(EOFError, ConnectionError), connection:
        return Engine(connection).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
