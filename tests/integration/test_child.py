"""What an engine is told: in order, and without waiting for one that does not read."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from phid import channel
from phid.child import Child
from phid.jobs import Cancel, Event, Failed, Image, Job, Sampling, Stop, Turn
from phid.proofs import Proved
from wire import PATIENCE

# Says what it was told, in order, when it is told to stop.
ECHO = """\
from phid import channel
from phid.errors import Code
from phid.jobs import Failed, Stop
line = channel.inherited()
while not isinstance(told := line.recv(), Stop):
    line.send(Failed(getattr(told, "job_id", None) or told.id, Code.INTERNAL, ""))
"""
SAYS_IT = """\
from phid import channel
line = channel.inherited()
"""


class Listener:
    """A child that tells what it was told, or runs another program."""

    def __init__(self, program: str = ECHO) -> None:
        self._said: queue.SimpleQueue[Event | Proved] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.child = Child(
            (sys.executable, "-c", program), self._said.put, lambda rc, _tail: self._ended.put(rc)
        )

    def heard(self, count: int) -> list[str]:
        events = [self._said.get(timeout=10 * PATIENCE) for _ in range(count)]
        return [event.job_id for event in events if isinstance(event, Failed)]

    def end(self) -> int:
        self.child.send(Stop())
        return self.wait()

    def wait(self) -> int:
        return self._ended.get(timeout=10 * PATIENCE)


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.child.kill()
    listener.child.wait(PATIENCE)


def job(name: str, size: int = 0) -> Job:
    return Job(name, (Turn("user", "?"),), Sampling(), images=(Image(bytes(size)),) if size else ())


def test_it_is_told_in_order_whatever_the_sizes(listener: Listener) -> None:
    sizes = [0, 5_000_000, 0, channel.AT_ONCE_BYTES, 0, 1_000_000, 0, 0] * 5
    for n, size in enumerate(sizes):
        listener.child.send(job(str(n), size))
        listener.child.send(Cancel(f"after {n}"))
    expected = [name for n in range(len(sizes)) for name in (str(n), f"after {n}")]
    assert listener.heard(len(expected)) == expected
    assert listener.end() == 0


def test_one_that_does_not_read_is_not_waited_for(listener: Listener) -> None:
    listener.child.send(job("first"))
    assert listener.heard(1) == ["first"]
    os.kill(listener.child.pid, signal.SIGSTOP)
    slowest = 0.0
    for n in range(200):
        began = time.monotonic()
        listener.child.send(job(str(n), channel.AT_ONCE_BYTES - 1000))
        slowest = max(slowest, time.monotonic() - began)
    os.kill(listener.child.pid, signal.SIGCONT)
    assert listener.heard(200) == [str(n) for n in range(200)]
    assert slowest < PATIENCE


def test_one_that_is_gone_is_told_nothing_and_nobody_minds(listener: Listener) -> None:
    assert listener.end() == 0
    for _ in range(3):
        listener.child.send(Cancel("late"))


@pytest.mark.parametrize("message", ["b'no pickle'", "b'cphid.errors\\nNothing\\n.'"])
def test_one_that_says_what_cannot_be_understood_is_ended(message: str) -> None:
    listener = Listener(f"{SAYS_IT}line.send_bytes({message})\nline.recv()\n")
    assert listener.wait() == -signal.SIGKILL


def test_a_line_that_is_closed_under_a_message_is_nothing_to_the_owner(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A larger message is written in two: what reads the line may close it between them."""
    send = channel.Connection._send

    def send_and_end(self: channel.Connection, buffer: bytes, *rest: object) -> None:
        send(self, buffer, *rest)
        listener.child.kill()
        listener.wait()

    monkeypatch.setattr(channel.Connection, "_send", send_and_end)
    listener.child.send(job("x", channel.AT_ONCE_BYTES - 1000))


@pytest.mark.parametrize("refused", ["engine-in", "engine-err", "engine-out"])
def test_one_whose_threads_cannot_be_started_is_not_left_behind(
    monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    spawned: list[subprocess.Popen[bytes]] = []
    spawn, start = channel.spawn, threading.Thread.start

    def spawn_and_tell(
        command: Sequence[str],
    ) -> tuple[subprocess.Popen[bytes], channel.Connection]:
        process, line = spawn(command)
        spawned.append(process)
        return process, line

    def start_or_refuse(thread: threading.Thread) -> None:
        if thread.name == refused:
            raise RuntimeError("can't start new thread")
        start(thread)

    before = set(threading.enumerate())
    monkeypatch.setattr(channel, "spawn", spawn_and_tell)
    monkeypatch.setattr(threading.Thread, "start", start_or_refuse)
    with pytest.raises(RuntimeError, match="new thread"):
        Listener()
    (process,) = spawned
    assert process.returncode == -signal.SIGKILL
    for thread in set(threading.enumerate()) - before:
        thread.join(10 * PATIENCE)
        assert not thread.is_alive()
