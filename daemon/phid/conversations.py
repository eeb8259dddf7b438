"""Conversations kept on the device: what was said in each session, for the request that goes on."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, replace

from phid import log, wallclock
from phid.entries import ConversationKept
from phid.errors import Code, Refused
from phid.health import Health
from phid.jobs import Job, Turn
from phid.ledger import Ticket
from phid.records import Records
from phid.sections import Sessions

SessionKey = tuple[str, str]
"""(client, session): a conversation belongs to who has it."""

_MAX_UNWANTED = 1024
_log = log.get("conversations")


@dataclass(frozen=True, slots=True)
class Conversation:
    """What was said: turns of the user and the assistant, oldest first, and the system's.

    `used_at` is monotonic seconds.
    """

    system: str
    turns: tuple[Turn, ...]
    used_at: float


class Conversations:
    """One for each session, written to the disk as its requests are. Owner thread only."""

    def __init__(self, limits: Sessions, records: Records, health: Health) -> None:
        self.limits = limits
        self._records = records
        self._health = health
        self._kept: OrderedDict[SessionKey, Conversation] = OrderedDict()
        # To be forgotten when what an earlier run has kept can be read.
        self._unwanted: set[SessionKey] = set()
        health.refresh.append(self._count)

    def configure(self, limits: Sessions) -> None:
        """Take over these limits."""
        self.limits = limits
        self._make_room()

    def check(self, session: str | None) -> None:
        """Raises Refused where a request cannot go on with a session now."""
        if session is None:
            return
        if not self.limits.most:
            says = "session: no conversation is kept here (sessions.most)"
            raise Refused(Code.UNSUPPORTED, says, field="session")
        if self._records.unread:
            says = "session: what an earlier run has kept cannot be read yet"
            raise Refused(Code.BUSY, says, field="session", retry_after_ms=1000)

    def job(self, ticket: Ticket, now: float) -> Job:
        """The ticket's job with what was said before it in its session."""
        key = _key(ticket)
        if key is None:
            return ticket.job
        if (kept := self._kept.get(key)) is None:
            return replace(ticket.job, history=())
        self._put(key, replace(kept, used_at=now))
        turns = ticket.job.turns
        if kept.system and turns[0].role != "system":
            turns = (Turn("system", kept.system), *turns)
        return replace(ticket.job, turns=turns, history=kept.turns)

    def add(self, ticket: Ticket, answer: str, history: int, now: float) -> None:
        """Keep what the ticket asked and was answered, behind the newest `history` turns of before.

        What was answered without a word is not kept: the next answer would be of as many.
        """
        key = _key(ticket)
        if key is None or not answer.strip():
            return
        kept = self._kept.get(key, Conversation("", (), now))
        turns = ticket.job.turns
        system = kept.system
        if turns[0].role == "system":
            system, turns = turns[0].content, turns[1:]
        before = kept.turns[len(kept.turns) - history :]
        turns = self._cut((*before, *turns, Turn("assistant", answer)), len(system))
        if not turns:  # one exchange is more than is kept of a conversation
            self._drop(key)
            return
        self._put(key, Conversation(system, turns, now))
        self._make_room()
        if key in self._kept:
            self._write(key)

    def forget(self, client: str, session: str) -> None:
        """Know nothing of it any more."""
        key = client, session
        if not self._records.unread:
            self._drop(key)
        elif len(self._unwanted) < _MAX_UNWANTED:
            self._unwanted.add(key)

    def restore(self, left: tuple[ConversationKept, ...], now: float, wall: float) -> None:
        """Take over what an earlier run has kept. `now` is monotonic, `wall` Unix time."""
        for one in sorted(left, key=lambda one: one.ts):
            key = one.client, one.session
            if not one.turns:
                _log.error("conversation_unreadable", client=one.client, session=one.session)
            if not one.turns or key in self._unwanted:
                self._write(key)
            elif key not in self._kept:
                used_at = now - wallclock.age_s(one.ts, wall)
                self._put(key, Conversation(one.system, one.turns, used_at))
        self._unwanted.clear()
        self._make_room()
        self.prune(now)

    def prune(self, now: float) -> None:
        """Forget those that nobody has gone on with for so long."""
        for key, kept in list(self._kept.items()):
            if kept.used_at + self.limits.keep_s > now:
                break
            self._drop(key)

    def write_again(self, client: str, session: str) -> None:
        """The disk did not take its last change: have it as it is now when it does."""
        self._write((client, session), later=True)

    def _put(self, key: SessionKey, kept: Conversation) -> None:
        self._kept[key] = kept
        self._kept.move_to_end(key)

    def _make_room(self) -> None:
        """Forget what is too many: those not used for longest, of one client and then of all."""
        shares = Counter(client for client, _ in self._kept)
        for key in list(self._kept):
            if shares[key[0]] > self.limits.per_client:
                shares[key[0]] -= 1
                self._sacrifice(key)
        while len(self._kept) > self.limits.most:
            self._sacrifice(next(iter(self._kept)))

    def _sacrifice(self, key: SessionKey) -> None:
        self._drop(key)
        self._health.count("sessions_dropped")

    def _cut(self, turns: tuple[Turn, ...], size: int) -> tuple[Turn, ...]:
        """The newest of them, from a user's on, that are no larger with `size` than is kept."""
        starts = [n for n, turn in enumerate(turns) if turn.role == "user"]
        for start in starts:
            if size + sum(len(turn.content) for turn in turns[start:]) <= self.limits.chars:
                return turns[start:]
        return ()

    def _drop(self, key: SessionKey) -> None:
        if self._kept.pop(key, None) is not None:
            self._write(key)

    def _write(self, key: SessionKey, *, later: bool = False) -> None:
        """Have it on the disk as it is, or is not, now."""
        kept = self._kept.get(key, Conversation("", (), 0.0))
        self._records.conversation(*key, kept.system, kept.turns, later=later)

    def _count(self) -> None:
        self._health.gauges["sessions"] = len(self._kept)


def _key(ticket: Ticket) -> SessionKey | None:
    session = ticket.request.session
    return (ticket.client, session) if session is not None else None
