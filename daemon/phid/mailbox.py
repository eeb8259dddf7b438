"""A thread's mailbox: many put in, one takes out, and to wake it costs one system call."""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """A queue with one reader, which is woken through a socket.

    A thread that wakes another by `queue.SimpleQueue` holds the GIL. Where an engine fills every
    processor, the woken thread takes its waker's place, finds the GIL taken, and both wait some
    3 ms for the engine's time slice to end. send(2) is called without the GIL.
    """

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._reader_waits = False
        self._bell, self._rope = socket.socketpair()
        self._rope.setblocking(False)

    def put(self, item: T) -> None:
        """Add an item; from any thread, and in a signal handler; never waits."""
        self._items.append(item)
        if self._reader_waits:
            # Full: it has been rung already. Closed: nobody is there any more.
            with contextlib.suppress(OSError):
                self._rope.send(b"\0")

    def get(self, timeout_s: float) -> T | None:
        """The oldest item; None when there is none within that time. The reader's thread only."""
        if not self._items and timeout_s > 0:
            self._reader_waits = True
            try:
                if not self._items:  # what was put before the flag was set rang no bell
                    self._bell.settimeout(timeout_s)
                    self._bell.recv(4096)
            except TimeoutError:
                pass
            finally:
                self._reader_waits = False
        return self._items.popleft() if self._items else None

    def close(self) -> None:
        """Give the sockets back: what is put in from now on is never read."""
        self._bell.close()
        self._rope.close()
