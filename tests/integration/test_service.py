"""The daemon on a real broker, with the scripted engine."""

from __future__ import annotations

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
