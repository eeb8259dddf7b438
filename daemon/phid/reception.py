"""Where messages come in, on the session's thread: read, posted, held until it is decided."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from phid.intake import Arrival, Intake
from phid.topics import Topics
from phid.traffic import Decision, Inbound

# How often a thread that waits for the owner looks whether the owner has ended.
_LOOK_S = 0.1


@dataclass(frozen=True, slots=True)
class Arrived:
    """Something to decide on; `decided` lets the session's thread acknowledge it to the broker."""

    arrival: Arrival
    decided: Decision


@dataclass(frozen=True, slots=True)
class StatusHeard:
    """A word on our status topic, most often our own: said now, or retained."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class FrameCame:
    """A watch's camera has a new frame, and had none before: the end of the turn sees to it."""


Received = Arrived | StatusHeard | FrameCame


class Reception:
    """Takes what the broker sends. The session's thread only, but for `close`.

    `intake` gives the one in force; `see` takes a camera's frame, and says whether the owner is to
    look at it.
    """

    def __init__(
        self,
        topics: Topics,
        intake: Callable[[], Intake],
        see: Callable[[Inbound], bool],
        post: Callable[[Received], None],
    ) -> None:
        self._topics = topics
        self._intake = intake
        self._see = see
        self._post = post
        self._closed = threading.Event()

    def receive(self, inbound: Inbound) -> Decision | None:
        """The decision on a message, once there is one; None if it needs none. Waits for the owner.

        This wait bounds the mailbox: a client that floods is slowed down by TCP.
        """
        if inbound.topic == self._topics.status:
            self._post(StatusHeard(inbound.payload))
            return None
        if not self._topics.is_ours(inbound.topic):
            if self._see(inbound):
                self._post(FrameCame())
            return None
        arrival = self._intake().read(inbound)
        if arrival is None:
            return None
        decided = Decision(awaited=inbound.qos > 0)
        self._post(Arrived(arrival, decided))
        while not self._closed.is_set() and not decided.wait(_LOOK_S):
            pass
        return decided

    def close(self) -> None:
        """Have nobody wait any longer: there is no owner to decide."""
        self._closed.set()
