"""Proof that requests reach us: our own ping, sent the way a requester's would come."""

from __future__ import annotations

import uuid

from phid import messages
from phid.commands import Command
from phid.topics import Topics
from phid.traffic import Connected, Protocol, Sent

_PATIENCE_S = 10.0
_AGAIN_S = 60.0


class Loopback:
    """Notices a muted subscription: some brokers grant one that their ACL then mutes.

    It concludes nothing where an ACL does not let us publish to our own in/, which MQTT 5's PUBACK
    tells. That of 3.1.1 does not, so the ping is not tried there; nor where the broker takes one
    publication at a time, for that one is the outbox's.
    """

    def __init__(self, topics: Topics) -> None:
        self._topics = topics
        self._link: Connected | None = None
        self._id = ""
        self._mid: int | None = None
        self.silenced = False
        self.due_at: float | None = None

    def connect(self, connected: Connected, now: float) -> None:
        """Send the ping on this connection."""
        self.disconnect()
        if connected.protocol is Protocol.V5 and connected.beside:
            self._link = connected
            self._ping(now)

    def disconnect(self) -> None:
        """Nothing is proven without a connection."""
        self._link, self._mid, self.due_at, self.silenced = None, None, None, False

    def sent(self, event: Sent) -> None:
        """Take note of what the broker said of our ping."""
        if self._link is None or (event.session, event.mid) != (self._link.session, self._mid):
            return
        if event.refusal is not None:
            self._mid, self.due_at = None, None
        elif not event.heard:
            self.silenced = True

    def heard(self, command_id: str) -> bool:
        """True if this command is our own ping: the way is open, and nobody waits for an answer."""
        if not self._id or command_id != self._id:
            return False
        self._mid, self.due_at, self.silenced = None, None, False
        return True

    def tick(self, now: float) -> None:
        """Conclude from silence, and try again later."""
        if self.due_at is None or now < self.due_at:
            return
        if self._mid is not None:
            self.silenced, self._mid, self.due_at = True, None, now + _AGAIN_S
        else:
            self._ping(now)

    def _ping(self, now: float) -> None:
        assert self._link is not None
        self._id = f"loop-{uuid.uuid4().hex[:12]}"
        payload = messages.encode(Command(id=self._id))
        self._mid = self._link.link.publish(self._topics.ctl("ping"), payload)
        self.due_at = now + _PATIENCE_S
