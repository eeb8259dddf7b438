"""Conversations kept on the device: what was said in each session, for the request that goes on."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, replace

from phid import wallclock
from phid.entries import ConversationKept
from phid.errors import Code, Refused
from phid.health import Health
from phid.jobs import Job, Turn
from phid.ledger import Ticket
from phid.records import Records
from phid.settings import Settings
from phid.traffic import Decision

SessionKey = tuple[str, str]
"""(client, session): a conversation belongs to one client."""

_MAX_UNWANTED = 1024
# At four bytes a character, a quarter of the journal at most; the rest is for requests.
_JOURNAL_BYTES_PER_CHAR = 16


@dataclass(frozen=True, slots=True)
class Conversation:
    """What was said: turns of the user and the assistant, oldest first, and the system's.

    `used_at` is monotonic seconds.
    """

    system: str
    turns: tuple[Turn, ...]
    used_at: float

    @property
    def chars(self) -> int:
        """How long it is."""
        return len(self.system) + sum(len(turn.content) for turn in self.turns)


class Conversations:
    """One for each session, the one longest unused first. Owner thread only; never waits."""

    def __init__(self, settings: Settings, records: Records, health: Health) -> None:
        self._limits = settings.sessions
        self._most_chars = settings.journal.max_bytes // _JOURNAL_BYTES_PER_CHAR
        self._records = records
        self._health = health
        self._kept: OrderedDict[SessionKey, Conversation] = OrderedDict()
        self._chars = 0
        # Sessions whose last change the disk did not take; and sessions to forget once what an
        # earlier run has kept can be read.
        self._unwritten: set[SessionKey] = set()
        self._unwanted: set[SessionKey] = set()
        health.refresh.append(self._count)

    def configure(self, settings: Settings) -> None:
        """Take over these limits."""
        self._limits = settings.sessions
        self._make_room()

    def check(self, client: str, session: str | None, now: float) -> None:
        """Raises Refused where a request cannot go on with its session now; else marks it used."""
        if session is None:
            return
        if not self._limits.most:
            says = "session: no conversation is kept here (sessions.most)"
            raise Refused(Code.UNSUPPORTED, says, field="session")
        if self._records.unread:
            says = "session: what an earlier run has kept cannot be read yet"
            raise Refused(Code.BUSY, says, field="session", retry_after_ms=1000)
        if (kept := self._kept.get((client, session))) is not None:
            self._put((client, session), replace(kept, used_at=now))

    def job(self, ticket: Ticket) -> Job:
        """The ticket's job with what was said before it in its session."""
        key = _key(ticket)
        if key is None:
            return ticket.job
        kept = self._kept.get(key, Conversation("", (), 0.0))
        turns = ticket.job.turns
        # A request drops the earlier system turn by an empty one of its own.
        if kept.system and turns[0].role != "system" and ticket.request.system is None:
            turns = (Turn("system", kept.system), *turns)
        return replace(ticket.job, turns=turns, history=kept.turns)

    def add(
        self, ticket: Ticket, job: Job, shown: int, answer: str, now: float
    ) -> ConversationKept | None:
        """Keep what the job asked and was answered, behind the newest `shown` turns before it.

        Returns what is to be written with the answer's outcome. A blank answer is not kept: the
        model would follow it with another blank one.
        """
        key = _key(ticket)
        if key is None or job.history is None or not answer.strip():
            return None
        system, turns = "", job.turns
        if turns[0].role == "system":
            system, turns = turns[0].content, turns[1:]
        before = job.history[len(job.history) - shown :]
        turns = self._cut((*before, *turns, Turn("assistant", answer)), len(system))
        if not turns:  # this exchange alone is longer than a conversation may be
            self._sacrifice(key)
            return None
        self._put(key, Conversation(system, turns, now))
        self._make_room()
        return self._records.conversation(*key, system, turns) if key in self._kept else None

    def forget(self, client: str, session: str, decided: Decision) -> bool:
        """Forget it. True if `decided` will be set once the disk has forgotten it, too."""
        key = client, session
        if self._records.unread:
            if len(self._unwanted) < _MAX_UNWANTED:
                self._unwanted.add(key)
            return False
        return self._remove(key) and self._records.drop_conversation(*key, decided)

    def restore(self, left: tuple[ConversationKept, ...], now: float, wall: float) -> None:
        """Take over what an earlier run has kept. `now` is monotonic, `wall` Unix time."""
        for one in sorted(left, key=lambda one: one.ts):
            key = one.client, one.session
            if key in self._unwanted:
                self._records.drop_conversation(*key)
            elif key not in self._kept:
                used_at = now - wallclock.age_s(one.ts, wall)
                self._put(key, Conversation(one.system, one.turns, used_at))
        self._unwanted.clear()
        self._make_room()
        self.tick(now)

    def not_written(self, client: str, session: str) -> None:
        """The disk did not take its last change: write the newest when the disk does again."""
        self._unwritten.add((client, session))

    def tick(self, now: float) -> None:
        """Forget those unused for `keep_s`; write what the disk did not take before."""
        while self._kept:
            key, oldest = next(iter(self._kept.items()))
            if oldest.used_at + self._limits.keep_s > now:
                break
            self._drop(key)
        if self._unwritten and self._records.failing is None:
            for key in self._unwritten:
                if (kept := self._kept.get(key)) is None:
                    self._records.drop_conversation(*key)
                else:
                    self._records.keep_conversation(*key, kept.system, kept.turns)
            self._unwritten.clear()

    def _put(self, key: SessionKey, kept: Conversation) -> None:
        self._remove(key)
        self._kept[key] = kept
        self._chars += kept.chars

    def _remove(self, key: SessionKey) -> bool:
        if (kept := self._kept.pop(key, None)) is None:
            return False
        self._chars -= kept.chars
        return True

    def _make_room(self) -> None:
        """Forget what exceeds the limits, longest unused first: each client's, then that of all."""
        limits = self._limits
        shares = Counter(client for client, _ in self._kept)
        for key in list(self._kept):
            if shares[key[0]] > limits.per_client:
                shares[key[0]] -= 1
                self._sacrifice(key)
        while len(self._kept) > limits.most or self._chars > self._most_chars:
            self._sacrifice(next(iter(self._kept)))

    def _cut(self, turns: tuple[Turn, ...], size: int) -> tuple[Turn, ...]:
        """The turns if they fit the limit with `size` more characters; else the newest of them.

        Those begin with a user's turn, and fill half of the limit at most if the last exchange
        fits in that: a conversation that lost one turn each time would begin differently each time,
        and never be in an engine's cache.
        """
        chars = self._limits.chars
        at, length = len(turns), size
        newest: tuple[Turn, ...] = ()
        while at and length <= chars:
            at -= 1
            length += len(turns[at].content)
            if turns[at].role == "user" and (2 * length <= chars or not newest):
                newest = turns[at:] if length <= chars else ()
        return turns if length <= chars else newest

    def _sacrifice(self, key: SessionKey) -> None:
        self._drop(key)
        self._health.count("sessions_dropped")

    def _drop(self, key: SessionKey) -> None:
        if self._remove(key):
            self._records.drop_conversation(*key)

    def _count(self) -> None:
        self._health.gauges["sessions"] = len(self._kept)


def _key(ticket: Ticket) -> SessionKey | None:
    session = ticket.request.session
    return (ticket.client, session) if session is not None else None
