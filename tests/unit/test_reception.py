"""Who waits for the owner to decide: while there is one, and no longer."""

from __future__ import annotations

import queue
import threading
from typing import Any

from phid.intake import Intake
from phid.reception import Arrived, Received, Reception
from phid.topics import Topics
from phid.traffic import Inbound
from wire import PATIENCE

TOPICS = Topics("phid/v1", "dev")
INTAKE = Intake(TOPICS, payload_bytes=10_000, max_tokens=100, deadline_ms=60_000)
REQUEST = Inbound("phid/v1/dev/in/text/me", b'{"prompt": "x"}', qos=1, retain=False, dup=False)


class Waiting:
    """A session's thread that has received a request, and waits."""

    def __init__(self) -> None:
        self.posted: queue.SimpleQueue[Received] = queue.SimpleQueue()
        self.reception = Reception(TOPICS, lambda: INTAKE, lambda _frame: False, self.posted.put)
        self.decision: Any = None
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def _receive(self) -> None:
        self.decision = self.reception.receive(REQUEST)

    def goes_on(self) -> bool:
        self._thread.join(5 * PATIENCE)
        return not self._thread.is_alive()


def test_a_request_is_acknowledged_once_the_owner_has_decided() -> None:
    waiting = Waiting()
    arrived = waiting.posted.get(timeout=5 * PATIENCE)
    assert isinstance(arrived, Arrived)
    assert waiting.decision is None
    arrived.decided.set()
    assert waiting.goes_on()
    assert waiting.decision.acknowledges


def test_nobody_waits_for_an_owner_that_has_left_and_nothing_is_acknowledged_then() -> None:
    waiting = Waiting()
    waiting.posted.get(timeout=5 * PATIENCE)
    waiting.reception.close()
    assert waiting.goes_on()
    assert not waiting.decision.acknowledges
    # What comes later does not wait at all.
    late = waiting.reception.receive(REQUEST)
    assert late is not None
    assert not late.acknowledges
