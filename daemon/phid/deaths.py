"""Threads that die of an unforeseen exception: nobody else does their work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from phid import log

_log = log.get("deaths")


@dataclass(frozen=True, slots=True)
class ThreadDied:
    """A thread was ended by an exception that nothing had foreseen."""

    name: str
    fault: str


@contextmanager
def told(post: Callable[[ThreadDied], None]) -> Iterator[None]:
    """Post each such death while this context lasts, on the thread that dies."""

    def tell(death: threading.ExceptHookArgs) -> None:
        name = death.thread.name if death.thread else "unknown"
        error = death.exc_value
        fault = log.fault(error) if isinstance(error, Exception) else death.exc_type.__name__
        try:
            _log.error("thread_died", thread=name, fault=fault)
        finally:
            post(ThreadDied(name, fault))

    former, threading.excepthook = threading.excepthook, tell
    try:
        yield
    finally:
        threading.excepthook = former
