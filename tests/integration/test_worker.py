"""Engines that end in ways that are hard to see."""

from __future__ import annotations

import queue
import subprocess
import sys
from multiprocessing.connection import Connection

import pytest

from phid import channel, worker
from phid.jobs import Load
from phid.worker import EngineEnded, Worker, WorkerEvent


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
        ended = events.get(timeout=10)
        assert isinstance(ended, EngineEnded)
        assert ended.returncode == 7
        assert engine.ended(ended, 0.0)
        assert engine.retry_at is not None
