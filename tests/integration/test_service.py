"""The daemon on a real broker, with the scripted engine."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

import pytest

from rig import DaemonFactory
from wire import Requester

pytestmark = pytest.mark.mosquitto


def test_a_request_is_answered(start_daemon: DaemonFactory, requester: Requester) -> None:
    start_daemon()
    result = requester.ask("one two three")
    assert result["type"] == "result"
    assert result["text"] == "one two three"
    assert result["finish"] == "stop"
    assert result["usage"]["output_tokens"] == 3


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_the_service_has_a_short_slice_and_its_engine_the_systems(
    start_daemon: DaemonFactory,
) -> None:
    def slice_ns(pid: int) -> int:
        """By sched_getattr(2): 0 before Linux 6.12."""
        attributes = ctypes.create_string_buffer(48)
        number = {"x86_64": 315, "aarch64": 275}[platform.machine()]
        assert ctypes.CDLL(None).syscall(number, pid, attributes, 48, 0) == 0
        return int(struct.unpack("=IIQiIQQQ", attributes.raw)[5])

    daemon = start_daemon()
    assert daemon.process is not None
    ours = slice_ns(os.getpid())
    assert slice_ns(daemon.process.pid) == (100_000 if ours else 0)
    assert slice_ns(daemon.engine_pid) == ours
