"""A child of the service: an engine or a prover, and the three threads that move its bytes."""

from __future__ import annotations

import contextlib
import queue
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler

from phid import channel, log
from phid.jobs import Command, Event
from phid.proofs import Prove, Proved

_TAIL_LINES = 20
_log = log.get("child")


class Child:
    """The process of `command`, from its start to its end. Owner thread only; never waits.

    Raises OSError or RuntimeError where the machine has no room for it, and leaves nothing behind.
    `said` gets each value that it sends, and `ended` at last its exit status and the end of what it
    printed; both are called on threads of the child's own.
    """

    def __init__(
        self,
        command: Sequence[str],
        said: Callable[[Event | Proved], None],
        ended: Callable[[int, tuple[str, ...]], None],
    ) -> None:
        self._said = said
        self._ended = ended
        self._process, self._connection = channel.spawn(command)
        self._room = channel.room(self._connection)
        self._unsent: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._left = self._written = 0
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        # The owner must not wait for an engine that does not read, nor for its end.
        self._threads = [
            threading.Thread(target=target, name=f"engine-{name}", daemon=True)
            for name, target in (
                ("in", self._write),
                ("out", self._read),
                ("err", self._read_output),
            )
        ]
        # The reader starts last: if the engine ends at once, it joins the thread of its stderr.
        try:
            for thread in (*self._threads[::2], self._threads[1]):
                thread.start()
        except RuntimeError:  # no room for another thread
            self._process.kill()
            self._process.wait()
            self._unsent.put(None)
            channel.close(self._process, self._connection)
            raise

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def send(self, command: Command | Prove) -> None:
        """Send it a command, at once or soon; never waits for a child that does not read."""
        message = bytes(ForkingPickler.dumps(command))
        if self._left == self._written and len(message) <= channel.AT_ONCE_BYTES and self._room():
            # The child has ended: the reader tells, and may close the line meanwhile.
            with contextlib.suppress(OSError, TypeError):
                self._connection.send_bytes(message)
            return
        self._left += 1
        self._unsent.put(message)

    def kill(self) -> None:
        """End it by SIGKILL; `ended` follows."""
        self._process.kill()

    def wait(self, timeout_s: float) -> None:
        """Wait for its end; kill it when time is up."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _write(self) -> None:
        try:
            while (message := self._unsent.get()) is not None:
                self._connection.send_bytes(message)
                self._written += 1
        except (OSError, TypeError):
            pass  # as above

    def _read(self) -> None:
        try:
            while True:
                self._said(self._connection.recv())
        except (EOFError, OSError):
            pass
        except Exception as error:  # noqa: BLE001 - whichever: it cannot be understood any more
            _log.error("engine_not_understood", pid=self.pid, fault=log.fault(error))
            self._process.kill()
        returncode = self._process.wait()
        self._unsent.put(None)
        self._threads[2].join(1.0)  # for its last words
        channel.close(self._process, self._connection)
        self._ended(returncode, tuple(self._tail))

    def _read_output(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            text = line.decode("utf-8", "replace").rstrip()[:500]
            self._tail.append(text)
            _log.info("engine_output", pid=self.pid, text=text)
