"""Engines that end in ways that are hard to see."""

from __future__ import annotations

import contextlib
import os
import queue
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest

from phid import channel, worker
from phid.jobs import Job, Load, Sampling, Turn
from phid.worker import EngineEnded, EngineSaid, Worker, WorkerEvent
from wire import PATIENCE


def test_an_engine_that_ends_before_anybody_listens_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spawn = channel.spawn

    def spawn_dead(_command: object) -> tuple[subprocess.Popen[bytes], Connection]:
        child, connection = spawn((sys.executable, "-S", "-c", "raise SystemExit(7)"))
        child.wait()
        return child, connection

    monkeypatch.setattr(worker.channel, "spawn", spawn_dead)
    for _ in range(10):
        events: queue.SimpleQueue[WorkerEvent] = queue.SimpleQueue()
        engine = Worker(Load("scripted", "m", ""), events.put, restart_max_s=1)
        engine.start()
        ended = events.get(timeout=10 * PATIENCE)
        assert isinstance(ended, EngineEnded)
        assert ended.returncode == 7
        assert engine.ended(ended, 0.0)
        assert engine.retry_at is not None


def test_one_that_gathers_its_tokens_for_longer_than_a_hang_is_not_taken_for_hung() -> None:
    events: queue.SimpleQueue[WorkerEvent] = queue.SimpleQueue()
    engine = Worker(Load("scripted", "m", ""), events.put, restart_max_s=1, hang_s=0.5)
    engine.start()
    until_free(engine, events)
    asked = '@script {"tokens": 50, "token_ms": 50}'
    job = Job("1", (Turn("user", asked),), Sampling(max_tokens=50), gather_s=2.0)
    engine.submit(job)
    try:
        while engine.running:
            engine.tick(time.monotonic())
            with contextlib.suppress(queue.Empty):
                said = events.get(timeout=0.05)
                assert isinstance(said, EngineSaid), "it was ended"
                engine.take(said)
    finally:
        engine.stop()


@pytest.fixture
def leaked() -> Iterator[tuple[Worker, queue.SimpleQueue[WorkerEvent]]]:
    """A worker whose engine has leaked 40 MiB, and where its events come out."""
    events: queue.SimpleQueue[WorkerEvent] = queue.SimpleQueue()
    engine = Worker(Load("scripted", "m", ""), events.put, restart_max_s=1, recycle_bytes=20 << 20)
    engine.start()
    until_free(engine, events)
    for n in range(48):
        asked = '@script {"tokens": 1, "prompt_tokens": 1, "leak_mb": 1}'
        engine.submit(Job(str(n), (Turn("user", asked),), Sampling(max_tokens=1)))
        until_free(engine, events)
    yield engine, events
    engine.stop()


def until_free(engine: Worker, events: queue.SimpleQueue[WorkerEvent]) -> None:
    while not engine.free:
        said = events.get(timeout=10 * PATIENCE)
        assert isinstance(said, EngineSaid)
        engine.take(said)


def test_an_engine_that_is_being_recycled_is_given_no_job(
    leaked: tuple[Worker, queue.SimpleQueue[WorkerEvent]],
) -> None:
    engine, events = leaked
    now = time.monotonic()
    engine.tick(now, quiet=True)
    assert engine.free  # it has been quiet for a moment only
    engine.tick(now + 1.9, quiet=False)
    engine.tick(now + 2.1, quiet=True)
    assert engine.free
    first = engine.pid
    engine.tick(now + 4.2, quiet=True)
    assert not engine.free
    assert engine.recycling is not None
    ended = events.get(timeout=10 * PATIENCE)
    assert isinstance(ended, EngineEnded)
    assert engine.ended(ended, now)
    assert (engine.failure, engine.retry_at) == (None, now)
    engine.tick(now)
    assert engine.pid != first
    until_free(engine, events)
    assert engine.recycling is None
    engine.tick(now + 9, quiet=True)
    engine.tick(now + 12, quiet=True)
    assert engine.free  # the new one has not leaked


def test_one_whose_replacement_cannot_load_is_told_and_tried_again_after_growing_pauses(
    leaked: tuple[Worker, queue.SimpleQueue[WorkerEvent]],
) -> None:
    engine, events = leaked
    now = time.monotonic()
    engine.tick(now, quiet=True)
    engine.tick(now + 2.1, quiet=True)
    engine.load = Load("scripted", "m", "load_fail")
    pauses = []
    for _ in range(4):
        while not isinstance(ended := events.get(timeout=10 * PATIENCE), EngineEnded):
            engine.take(ended)
        assert engine.ended(ended, 100.0)
        pauses.append((engine.retry_at or 0.0) - 100)
        engine.start()
    assert pauses == [0.0, 0.0, 0.5, 1.0]
    assert engine.recycling is None
    assert engine.failure is not None


def test_pauses_grow_only_while_starts_fail(
    leaked: tuple[Worker, queue.SimpleQueue[WorkerEvent]],
) -> None:
    engine, events = leaked
    pauses = []
    for _ in range(4):
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        while not isinstance(ended := events.get(timeout=10 * PATIENCE), EngineEnded):
            pass
        assert engine.ended(ended, 100.0)
        pauses.append((engine.retry_at or 0.0) - 100)
        engine.start()
    assert pauses == [0.0, 0.5, 1.0, 1.0]


def test_one_that_cannot_be_spawned_is_tried_again_after_growing_pauses() -> None:
    events: queue.SimpleQueue[WorkerEvent] = queue.SimpleQueue()
    engine = Worker(Load("scripted", "m", ""), events.put, restart_max_s=1)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    pauses = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free_descriptor(), before[1]))
        for _ in range(4):
            began = time.monotonic()
            engine.start()
            assert engine.pid is None
            pauses.append((engine.retry_at or 0.0) - began)
        assert engine.failure is not None
        assert "could not be started: [Errno 24]" in engine.failure.message
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert pauses == pytest.approx([0.0, 0.5, 1.0, 1.0], abs=0.2 * PATIENCE)
    engine.tick(time.monotonic() + 1)
    until_free(engine, events)
    assert engine.failure is None
    engine.stop()


def lowest_free_descriptor() -> int:
    """A limit that lets no other descriptor be opened."""
    free = os.dup(0)
    os.close(free)
    return free
