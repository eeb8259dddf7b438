"""The life of a request: taken or refused, queued, given to the engine, answered exactly once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from phid import attachments, recovery
from phid.admission import Admission
from phid.answers import Answers
from phid.attachments import TopicRef
from phid.backlog import Backlog
from phid.conversations import Conversations
from phid.crew import Crew
from phid.entries import (
    Accepted,
    AskedAgain,
    Awaited,
    ConversationDropped,
    ConversationKept,
    Ended,
    Left,
    Marked,
    NotWritten,
    Written,
)
from phid.errors import Code, Failure, Refused
from phid.gathering import Gathering
from phid.health import Health
from phid.intake import Intake, PartArrived, RequestArrived
from phid.jobs import Event, Finish, Image
from phid.ledger import Ledger, ReplyAddress, Ticket
from phid.messages import Accepted as AcceptedMessage
from phid.messages import JobEvent
from phid.outbox import Outbox
from phid.records import Records
from phid.runner import Runner
from phid.settings import Settings
from phid.traffic import Decision
from phid.turns import model_of, next_turn
from phid.worker import Worker

_CANCELLED = Failure(Code.CANCELLED, "cancelled")
_EXPIRED = Failure(Code.EXPIRED, "its deadline passed before it was started")
_ID_TAKEN = Failure(Code.ID_CONFLICT, "this id was used for another request", field="id")


class Desk:
    """Owns every open request. Owner thread only; never waits.

    `admission` says which requests are let in; `held` and `cooling` each keep waiting requests from
    the engine. `look` gives what a camera shows, or raises Refused.
    """

    def __init__(
        self,
        settings: Settings,
        crew: Crew,
        outbox: Outbox,
        health: Health,
        tell: Callable[[JobEvent], None],
        look: Callable[[TopicRef, float], Image],
        records: Records,
    ) -> None:
        limits = settings.limits
        self.backlog = Backlog(
            limit=limits.backlog,
            per_client=limits.per_client,
            limit_bytes=limits.backlog_bytes,
        )
        vision = settings.vision
        self.gathering = Gathering(limit_bytes=vision.parts_bytes, keep_s=vision.parts_s)
        self.ledger = Ledger(
            keep_s=limits.dedupe_s, keep_entries=limits.dedupe_entries, on_forget=records.forget
        )
        self.gathering.parts.on_drop = records.parts_dropped
        self.admission = Admission(
            settings, crew, self.backlog, self.gathering, records, outbox, health
        )
        self.conversations = Conversations(settings, records, health)
        outbox.on_told = records.told
        self._answers = Answers(settings.topics, self.ledger, records, outbox, health, tell)
        self._records = records
        self.held = False
        self.cooling = False
        self._crew = crew
        self._runner = Runner(settings, outbox, health, self._answers, records, self.conversations)
        self._outbox = outbox
        self._health = health
        self._look = look
        self._jobs = 0

    def configure(self, settings: Settings) -> None:
        """Take over the limits of these settings; what is already accepted stays."""
        limits = settings.limits
        self.admission.configure(settings)
        self.conversations.configure(settings)
        self.ledger.keep_s, self.ledger.keep_entries = limits.dedupe_s, limits.dedupe_entries
        self._runner.delta_interval_s = settings.stream.delta_interval_ms / 1000
        parts, vision = self.gathering.parts, settings.vision
        parts.limit_bytes, parts.keep_s = vision.parts_bytes, vision.parts_s

    @property
    def idle(self) -> bool:
        """True while every accepted request has its outcome, and every outcome is on its way."""
        return not (self.ledger.open_tickets or self._answers.unpublished)

    @property
    def unpublished(self) -> int:
        """How many outcomes wait for the disk."""
        return self._answers.unpublished

    @property
    def spares_the_engine(self) -> bool:
        """True while no request waits or runs and nothing is held back: watches may be answered."""
        wanted = len(self.backlog) or self._running is not None
        return not (wanted or self.held or self.cooling or self.admission.closed)

    @property
    def due_at(self) -> float | None:
        """When `tick` has something to do."""
        times = [self.backlog.next_deadline, self.gathering.due_at, self._runner.due_at]
        return min((t for t in times if t is not None), default=None)

    def take(self, arrived: RequestArrived, now: float, decided: Decision) -> bool:
        """Queue a request, or say why not, or answer again what was asked before.

        True if it is being written to the disk, and `decided` will be set when that is done.
        """
        try:
            known = self._known(arrived, now)
            if known is not None:
                return self._answers.again(known, self._with_its(known, arrived), decided, now)
            self.conversations.check(arrived.client, arrived.request.session, now)
            self.admission.check(arrived, now)
            arrived = self._with_cameras(arrived, now)
            self.admission.take(arrived, now)
        except Refused as refused:
            self.refuse(arrived.reply, arrived.id, refused.failure, decided)
            return False
        ticket = self._open(arrived, now)
        # The engine may begin meanwhile; until the entry is written only `accepted` is published.
        being_written = self._records.accept(ticket, arrived, decided)
        self._admit(ticket, arrived, now)
        return being_written

    def take_part(self, arrived: PartArrived, now: float, decided: Decision) -> bool:
        """Keep a picture that is sent apart; its request goes on if that was the last.

        A part for which there is no room ends its request with that error. True as for `take`.
        """
        try:
            self.admission.check_part(arrived, now)
        except Refused as refused:
            arrived = replace(arrived, part=refused.failure)
        being_written = self._records.keep_part(arrived, decided)
        ticket = self.gathering.add(arrived.key, arrived.n, arrived.part, now, kept=being_written)
        if ticket is not None:
            self._gather(ticket, now)
        return being_written

    def recover(self, left: Left, intake: Intake, now: float, wall: float) -> None:
        """Take over what an earlier run has left, in the order in which it was accepted.

        Requests taken before the journal could be read keep their places.
        """
        self.conversations.restore(left.conversations, now, wall)
        parts = recovery.parts_of(left)
        for one in recovery.read(left.rows, intake, self.ledger, now=now, wall=wall):
            match one:
                case recovery.Again(number, arrived, arrived_at, addresses):
                    ticket = self._open(arrived, arrived_at)
                    ticket.late_addresses += addresses
                    self._records.restore(ticket, number)
                    # The request was accepted with them, so no limit applies to them now.
                    for part in parts.pop(ticket.key, ()):
                        self.gathering.parts.put_back(ticket.key, part.n, part.data, now)
                    self._admit(ticket, arrived, now, room=True)
                case recovery.AskedMeanwhile(number, ticket, addresses):
                    self._answers.join(ticket, number, addresses)
                case recovery.IdTaken(ticket):
                    self._cut(ticket, Finish.CANCELLED, _ID_TAKEN, now)
                case recovery.Over(number, ticket, failure):
                    self._records.restore(ticket, number)
                    self._answers.recall(ticket, failure, now)
        for key, strays in parts.items():
            for part in strays:
                held = self.gathering.add(key, part.n, part.data, now, kept=True)
                if held is not None:
                    self._gather(held, now)
        self.ledger.prune(now)
        self._records.recovered()

    def written(self, event: Written | NotWritten) -> None:
        """Do what has waited for the disk; what was not written is revoked or done without it."""
        if isinstance(event, Written):
            for entry in event.entries:
                self._answers.written(entry)
            return
        entry = event.entry
        self._records.not_written(entry)
        match entry:
            case Accepted(number):
                ticket = self._records.ticket(number)
                self._revoke(ticket, event.reason, entry.decided)
            case AskedAgain():
                self._take_back(entry, event.reason)
            case Marked(number):
                self._runner.mark_failed(number)
            case Ended():  # published all the same: it is written later
                self._answers.written(entry)
            case ConversationKept(client, session) | ConversationDropped(client, session):
                self.conversations.not_written(client, session)
        if isinstance(entry, Awaited) and entry.decided is not None:
            entry.decided.set()

    def refuse(
        self, reply: ReplyAddress, request_id: str, failure: Failure, decided: Decision | None
    ) -> None:
        """Tell a sender that its request was not taken; nothing else is touched."""
        self._answers.refuse(reply, request_id, failure, decided)

    def cancel(self, client: str, request_id: str, now: float) -> None:
        """End one of a client's requests at once; one that is not open is left alone."""
        ticket = self.ledger.get_open((client, request_id))
        if ticket is not None:
            self._cut(ticket, Finish.CANCELLED, _CANCELLED, now)

    def forget_session(self, client: str, session: str, now: float, decided: Decision) -> bool:
        """Forget one of a client's conversations, and end what is asked in it.

        True as for `take`.
        """
        for ticket in self.ledger.open_tickets:
            if (ticket.client, ticket.request.session) == (client, session):
                self._cut(ticket, Finish.CANCELLED, _CANCELLED, now)
        return self.conversations.forget(client, session, decided)

    def dispatch(self, now: float) -> None:
        """Hand the next request to its engine if that is free and none runs; called every turn."""
        if self.held or self.cooling or self._running is not None:
            return
        self._expire(now)
        while (turn := next_turn(self.backlog, self._crew, now)) is not None:
            ticket, worker = turn
            self.backlog.remove(ticket)
            if isinstance(worker, Worker):
                self._runner.start(ticket, worker, now)
                return
            self._end_with_error(ticket, worker, now)

    def engine_said(self, event: Event, now: float) -> None:
        """Bring the running job along."""
        self._runner.engine_said(event, now)

    def engine_lost(self, worker: Worker, now: float) -> None:
        """Its engine is gone: its job runs again if nothing of it was published, else it ends."""
        if self._runner.worker is not worker:
            return
        if (ticket := self._runner.engine_lost(f"the engine {worker.why}", now)) is not None:
            self.backlog.push(ticket, first=True)

    def end_waiting(self, model: str, failure: Failure, now: float) -> None:
        """Answer all that wait for this model with the same failure: no engine will come."""
        for ticket in self.ledger.open_tickets:
            if ticket is not self._running and model_of(ticket, self._crew) == model:
                self.backlog.remove(ticket)
                self._end_with_error(ticket, failure, now)

    def leave(self, now: float) -> None:
        """Stop: leave journaled requests that published nothing to the next start; end the rest.

        An answer that has begun ends as cancelled, with the text so far.
        """
        for ticket in self.ledger.open_tickets:
            if ticket.number is not None and ticket.mark == "no":
                self._runner.take_back(ticket)
            elif ticket is self._running:
                failure = Failure(Code.CANCELLED, "the service stops")
                self._cut(ticket, Finish.CANCELLED, failure, now)
            else:
                self.backlog.remove(ticket)
                failure = Failure(Code.DRAINING, "the device was stopped")
                self._end_with_error(ticket, failure, now)

    def connection_lost(self) -> None:
        """Deltas may have been lost."""
        self._runner.connection_lost()

    def tick(self, now: float) -> None:
        """Do what has come due: deadlines and deltas."""
        self._records.tick(now)
        self._expire(now)
        for ticket, why in self.gathering.expired(now):
            says = f"its deadline passed, and {why.message}"
            late = replace(why, code=Code.EXPIRED, message=says)
            self._end_with_error(ticket, late if ticket.deadline <= now else why, now)
        self.gathering.parts.prune(now)
        self.conversations.tick(now)
        self.ledger.prune(now)
        self._health.counts["parts_dropped"] = self.gathering.parts.dropped
        if (running := self._running) is not None and running.deadline <= now:
            self._cut(running, Finish.DEADLINE, _EXPIRED, now)
        else:
            self._runner.tick(now)

    @property
    def _running(self) -> Ticket | None:
        return self._runner.ticket

    def _gather(self, ticket: Ticket, now: float, *, room: bool = False) -> None:
        """Queue it if it is complete. `room`: it is of an earlier run, and sure of its place."""
        try:
            if self.gathering.complete(ticket):
                if not room:
                    self.admission.check_room(ticket.client, ticket.size_bytes)
                self._enqueue(ticket, now)
        except Refused as refused:
            self._end_with_error(ticket, refused.failure, now)

    def _open(self, arrived: RequestArrived, arrived_at: float) -> Ticket:
        self._jobs += 1
        ticket = arrived.ticket(str(self._jobs), arrived_at)
        self.ledger.open(ticket)
        return ticket

    def _admit(
        self, ticket: Ticket, arrived: RequestArrived, now: float, *, room: bool = False
    ) -> None:
        if attachments.wanted(arrived.images):
            self.gathering.hold(ticket, arrived.images, now)
            self._gather(ticket, now, room=room)
        else:
            self._enqueue(ticket, now)

    def _revoke(self, ticket: Ticket | None, reason: str, decided: Decision | None) -> None:
        """Refuse a request that could not be written, unless it has its outcome already."""
        if ticket is None or ticket.state == "ended":
            return
        self._runner.take_back(ticket)
        self.backlog.remove(ticket)
        self.ledger.drop(ticket)
        self._records.forget(ticket)
        ticket.number = None  # the disk does not have it, and need not have its parts
        self.gathering.drop(ticket)
        for address in (ticket.address, *ticket.late_addresses):
            self._answers.refuse(address, ticket.id, self._unkept(reason), decided)

    def _take_back(self, asked: AskedAgain, reason: str) -> None:
        """Refuse a late address that could not be written, if its message still waits for that."""
        ticket = self._records.ticket(asked.number)
        if asked.decided and ticket and asked.address in ticket.late_addresses:
            ticket.late_addresses.remove(asked.address)
            self._answers.refuse(asked.address, ticket.id, self._unkept(reason), asked.decided)

    def _unkept(self, reason: str) -> Failure:
        says = f"what is accepted cannot be kept: {reason}"
        return Failure(Code.BUSY, says, retry_after_ms=self.admission.retry_after_ms)

    def _enqueue(self, ticket: Ticket, now: float) -> None:
        position = self.backlog.push(ticket) + (self._running is not None)
        # Dispatch first: the engine reads the prompt while we go on.
        self.dispatch(now)
        if ticket.streams and ticket.state != "ended":
            eta_ms = self._health.wait_ms(position) if position else None
            message = AcceptedMessage(id=ticket.id, queue_pos=position, eta_ms=eta_ms)
            self._outbox.answer(ticket.address, message)

    def _known(self, arrived: RequestArrived, now: float) -> Ticket | None:
        if arrived.id_given:
            return self.ledger.find((arrived.client, arrived.id), arrived.digest, now)
        if arrived.redelivered:
            return self.ledger.find_redelivered(arrived.topic, arrived.digest, now)
        return None

    def _with_cameras(self, arrived: RequestArrived, now: float) -> RequestArrived:
        """The request with what the cameras that it names show now. Raises Refused."""
        places = [n for n, p in enumerate(arrived.images) if isinstance(p, TopicRef)]
        if not places:
            return arrived
        seen = attachments.seen(arrived.images, lambda ref: self._look(ref, now))
        brought = sum(len(p.data) for n in places if isinstance(p := seen[n], Image))
        return replace(
            arrived, images=seen, size_bytes=arrived.size_bytes + brought, apart=frozenset(places)
        )

    def _with_its(self, known: Ticket, arrived: RequestArrived) -> RequestArrived:
        """The request that is asked again, with the pictures that came apart for the first one."""
        if known.outcome is not None:
            return arrived
        apart = self.gathering.came_apart(known, arrived.images)
        images = tuple(apart.get(n, own) for n, own in enumerate(arrived.images))
        return replace(arrived, images=images, apart=frozenset(apart))

    def _expire(self, now: float) -> None:
        for ticket in self.backlog.expired(now):
            self.backlog.remove(ticket)
            self._end_with_error(ticket, _EXPIRED, now)

    def _cut(self, ticket: Ticket, finish: Finish, failure: Failure, now: float) -> None:
        if not self._runner.cut(ticket, finish, now):
            self.backlog.remove(ticket)
            self._end_with_error(ticket, failure, now)

    def _end_with_error(self, ticket: Ticket, failure: Failure, now: float) -> None:
        self.gathering.drop(ticket)
        self._answers.end_with_error(ticket, failure, now)
