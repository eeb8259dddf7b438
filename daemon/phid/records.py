"""The owner's side of the journal: which request is written how far, and what waits for that."""

from __future__ import annotations

from phid import log, messages
from phid.entries import (
    Accepted,
    AskedAgain,
    ConversationDropped,
    ConversationKept,
    Ended,
    Entry,
    Forgotten,
    Marked,
    PartKept,
    PartsDropped,
    Stepped,
    Told,
    Tried,
)
from phid.errors import Code, Refused
from phid.health import Health, percentile
from phid.intake import PartArrived, RequestArrived
from phid.jobs import Image, Turn
from phid.journal import Journal
from phid.ledger import Key, ReplyAddress, Ticket
from phid.messages import Outcome
from phid.traffic import Decision
from phid.wallclock import WallClock

# The pause after a failed write, before the disk is tried again.
_TRY_AGAIN_S = 1.0
# Entries that can wait are written after so long at the latest: else, after a power cut, outcomes
# would be sent again that the broker has had for hours.
_FLUSH_S = 5.0
# Counting never gets here: such a number is damaged, and SQLite may take none beyond it.
_FARTHEST = 1 << 62
_log = log.get("records")


class Records:
    """Numbers what is to be written and hands it to the journal. Owner thread only; never waits.

    What one turn of the owner's loop has brought goes into one commit, when the turn is over.
    Without a journal, and for what came at QoS 0, nothing is written and nothing waits.
    """

    def __init__(
        self, journal: Journal | None, health: Health, clock: WallClock | None = None
    ) -> None:
        self._health = health
        health.refresh.append(self._count)
        self._journal = journal
        self._clock = clock or WallClock()
        self._next = 1
        self._tickets: dict[int, Ticket] = {}
        self._try_at = 0.0
        self._flush_at = 0.0
        self._entries: list[Entry] = []

    @property
    def failing(self) -> str | None:
        """Why nothing can be written at present."""
        if self._journal is None:
            return None
        if self._journal.failing is None and self._journal.unread:
            return "what an earlier run has left is being taken over"
        return self._journal.failing

    @property
    def unread(self) -> bool:
        """True until it is known what an earlier run has left."""
        return self._journal is not None and self._journal.unread

    def tick(self, now: float) -> None:
        """Try again what could not be written, and write what has waited long enough."""
        journal = self._journal
        if journal is None:
            return
        self._time_of_day()
        if journal.failing is not None and now >= self._try_at:
            self._try_at = now + _TRY_AGAIN_S
            self._entries.append(Tried())
        elif not journal.waiting:
            self._flush_at = now + _FLUSH_S
        elif now >= self._flush_at:
            journal.flush()

    def commit(self) -> None:
        """Have written what this turn has brought."""
        if self._journal is not None and self._entries:
            self._journal.write(*self._entries)
            self._entries = []

    def check_room(self, qos: int, size_bytes: int) -> None:
        """Raises Refused (busy) for a message that could not be written."""
        journal = self._journal
        if journal is None or not qos:
            return
        retry_after_ms = round(_TRY_AGAIN_S * 1000)
        if self.failing is not None:
            says = f"what is accepted cannot be kept: {self.failing}"
            raise Refused(Code.BUSY, says, retry_after_ms=retry_after_ms)
        if journal.used_bytes + size_bytes > journal.max_bytes:
            says = f"the journal is full: {journal.used_bytes} bytes"
            raise Refused(Code.BUSY, says, retry_after_ms=retry_after_ms)

    def accept(
        self, ticket: Ticket, arrived: RequestArrived, decided: Decision, *, age_s: float = 0.0
    ) -> bool:
        """True if it is being written; `decided` is set once it is. It came `age_s` ago."""
        if self._journal is None or not arrived.inbound.qos:
            return False
        accepted_ts = self._time_of_day() - age_s
        self._number(ticket, self._next)
        # A part still to come gets an entry of its own; pictures not sent apart are in the payload.
        pictures = tuple(
            (-1 - n, image.data)
            for n, image in enumerate(arrived.images)
            if n in arrived.apart and isinstance(image, Image)
        )
        entry = Accepted(
            number=self._next,
            client=ticket.client,
            id=ticket.id,
            id_given=ticket.id_given,
            digest=ticket.digest,
            inbound=arrived.inbound,
            address=ticket.address,
            accepted_ts=accepted_ts,
            deadline_ts=accepted_ts + ticket.deadline - ticket.arrived,
            pictures=pictures,
            decided=decided,
        )
        self._next += 1
        self._entries.append(entry)
        return True

    def ask_again(self, ticket: Ticket, address: ReplyAddress, decided: Decision) -> bool:
        """As `accept`, for another address that wants its outcome."""
        if self._journal is None or ticket.number is None:
            return False
        self._entries.append(AskedAgain(ticket.number, address, decided))
        return True

    def accept_late(
        self, ticket: Ticket, arrived: RequestArrived, decided: Decision, now: float
    ) -> bool:
        """As `accept`, for one that came at QoS 0, is not answered yet, and now comes at QoS 1.

        Its deadline is counted from when it first came.
        """
        number, age_s = self._next, now - ticket.arrived
        if ticket.number is not None or not self.accept(ticket, arrived, decided, age_s=age_s):
            return False
        self._entries += [AskedAgain(number, address) for address in ticket.late_addresses]
        if ticket.mark != "no":  # deltas of it may be out
            self._entries.append(Marked(number))
        return True

    def keep_part(self, arrived: PartArrived, decided: Decision) -> bool:
        """As `accept`, for a picture sent apart."""
        if self._journal is None or not arrived.qos or not isinstance(arrived.part, bytes):
            return False
        part = arrived.part
        ts = self._time_of_day()
        self._entries.append(PartKept(arrived.client, arrived.id, arrived.n, part, ts, decided))
        return True

    def parts_dropped(self, key: Key) -> None:
        """Have these parts dropped from the disk: they are not needed any more."""
        if self._journal is None:
            return
        if self._entries:  # the parts may be among them, to be written first
            self._entries.append(PartsDropped(*key))
        else:
            self._journal.write_later(PartsDropped(*key))

    def conversation(
        self, client: str, session: str, system: str, turns: tuple[Turn, ...]
    ) -> ConversationKept:
        """What was said in a session, to be written with the outcome that brought its last turn."""
        return ConversationKept(client, session, system, turns, self._time_of_day())

    def keep_conversation(
        self, client: str, session: str, system: str, turns: tuple[Turn, ...]
    ) -> None:
        """Have written what was said in a session, by itself."""
        if self._journal is not None:
            self._entries.append(self.conversation(client, session, system, turns))

    def drop_conversation(self, client: str, session: str, decided: Decision | None = None) -> bool:
        """True if it is being taken off the disk; `decided` is set once it is."""
        if self._journal is None:
            return False
        self._entries.append(ConversationDropped(client, session, decided))
        return True

    def mark(self, ticket: Ticket) -> None:
        """Have it on the disk that deltas of it are published, before they are."""
        if self._journal is None or ticket.number is None:
            ticket.mark = "written"
        elif ticket.mark == "no":
            ticket.mark = "asked"
            self._entries.append(Marked(ticket.number))

    def end(self, ticket: Ticket, outcome: Outcome, said: ConversationKept | None = None) -> bool:
        """True if its outcome is being written, and is to be published once it is.

        `said` is its session's conversation with this turn: both are written, or neither is.
        """
        if self._journal is None:
            return False
        if ticket.number is None:
            if said is not None:
                self._entries.append(said)
            return False
        payload = messages.encode(outcome).decode()
        self._entries.append(Ended(ticket.number, payload, self._time_of_day(), said))
        return True

    def told(self, number: int) -> None:
        """The broker has the outcome, for one of those who asked."""
        ticket = self._tickets.get(number)
        if self._journal is None or ticket is None:
            return
        ticket.untold -= 1
        if ticket.untold > 0:
            return
        if ticket.state == "forgotten":
            del self._tickets[number]
            self._journal.write_later(Forgotten(number))
        elif not ticket.told:
            ticket.told = True
            self._journal.write_later(Told(number))

    def forget(self, ticket: Ticket) -> None:
        """Nobody may ask for its outcome again; it stays until the broker has it."""
        if self._journal is None or ticket.number is None:
            return
        if ticket.told or ticket.outcome is None:
            self._tickets.pop(ticket.number, None)
            self._journal.write_later(Forgotten(ticket.number))
        if ticket.outcome is None:  # it was not taken after all, though its parts may have been
            self.parts_dropped(ticket.key)

    def restore(self, ticket: Ticket, number: int) -> None:
        """Know a ticket that an earlier run has written."""
        self._number(ticket, number)
        if number < _FARTHEST:
            self._next = max(self._next, number + 1)

    def join(self, ticket: Ticket, number: int, addresses: tuple[ReplyAddress, ...]) -> None:
        """Know a ticket as the request that an earlier run has written; tell its addresses, too."""
        self.restore(ticket, number)
        own = (ticket.address, *ticket.late_addresses)
        self._entries += [AskedAgain(number, a) for a in own if a not in addresses]
        ticket.late_addresses += [a for a in addresses if a not in own]
        if ticket.mark != "no":  # deltas of it may be out
            self._entries.append(Marked(number))

    def recovered(self) -> None:
        """All that an earlier run has left is known: numbers go on behind it."""
        if self._journal is not None:
            self._time_of_day()  # a step of the clock before now must move nothing that is there
            self._journal.unread = False

    def ticket(self, number: int) -> Ticket | None:
        """The ticket of this number, unless it is forgotten."""
        return self._tickets.get(number)

    def not_written(self, entry: Entry) -> None:
        """Keep what must be tried again."""
        if self._journal is not None and isinstance(
            entry, Ended | Told | Forgotten | PartsDropped | Stepped
        ):
            self._journal.write_later(entry)

    def _time_of_day(self) -> float:
        """Unix seconds; if the clock was set meanwhile, what is written is moved with it first."""
        now, step_s = self._clock.look()
        if step_s and self._journal is not None:
            _log.warning("clock_stepped", by_s=round(step_s, 1))
            if not self._journal.unread:  # else recovery goes by the clock as it is
                self._entries.append(Stepped(step_s))
        return now

    def _count(self) -> None:
        journal, gauges = self._journal, self._health.gauges
        if journal is None:
            return
        self._health.counts["journal_failures"] = journal.failures
        gauges["journal_mb"] = round(journal.used_bytes / 2**20, 1)
        if samples := list(journal.commit_ms):
            gauges["journal_commit_ms_p99"] = round(percentile(samples, 0.99), 1)

    def _number(self, ticket: Ticket, number: int) -> None:
        ticket.number = number
        self._tickets[number] = ticket
