"""The life of a request: taken or refused, queued, run on the engine, answered exactly once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from phid import attachments, log, messages
from phid.attachments import TopicRef
from phid.backlog import Backlog
from phid.errors import Code, Failure, Refused
from phid.gathering import Gathering
from phid.health import Health
from phid.intake import PartArrived, RequestArrived
from phid.jobs import (
    Event,
    Failed,
    Finish,
    Finished,
    Image,
    Job,
    Started,
    Tokens,
)
from phid.ledger import Ledger, ReplyAddress, Ticket
from phid.messages import Accepted, ErrorMessage, JobEvent, Outcome, Result
from phid.outbox import Outbox
from phid.runs import Run
from phid.settings import Settings
from phid.streams import DeltaStream
from phid.topics import Topics
from phid.worker import Worker

_DEFAULT_RETRY_MS = 1000
# An engine that dies twice under the same job is not given it a third time.
_MAX_LOST_ENGINES = 2
_log = log.get("desk")


class Desk:
    """Owns every open request. Owner thread only; never waits.

    `closed` says why new requests are refused at present, `held` keeps waiting ones from the
    engine. `look` gives what a camera shows, or raises Refused.
    """

    def __init__(
        self,
        settings: Settings,
        worker: Worker | None,
        outbox: Outbox,
        health: Health,
        tell: Callable[[JobEvent], None],
        look: Callable[[TopicRef, float], Image],
    ) -> None:
        limits = settings.limits
        self.backlog = Backlog(
            limit=limits.backlog,
            per_client=limits.per_client,
            limit_bytes=limits.backlog_bytes,
        )
        vision = settings.vision
        self.gathering = Gathering(limit_bytes=vision.parts_bytes, keep_s=vision.parts_s)
        self.ledger = Ledger(keep_s=limits.dedupe_s, keep_entries=limits.dedupe_entries)
        self.closed: Failure | None = None
        self.held = False
        self._delta_interval_s = settings.stream.delta_interval_ms / 1000
        self._topics: Topics = settings.topics
        self._device = settings.device
        self._worker = worker
        self._outbox = outbox
        self._health = health
        self._tell = tell
        self._look = look
        self._run: Run | None = None
        self._jobs = 0

    def configure(self, settings: Settings) -> None:
        """Take over the limits of these settings; what is already accepted stays."""
        limits = settings.limits
        self.backlog.limit, self.backlog.per_client = limits.backlog, limits.per_client
        self.backlog.limit_bytes = limits.backlog_bytes
        self.ledger.keep_s, self.ledger.keep_entries = limits.dedupe_s, limits.dedupe_entries
        self._delta_interval_s = settings.stream.delta_interval_ms / 1000
        parts, vision = self.gathering.parts, settings.vision
        parts.limit_bytes, parts.keep_s = vision.parts_bytes, vision.parts_s

    @property
    def idle(self) -> bool:
        """True while no accepted request is without its outcome."""
        return not self.ledger.open_tickets

    @property
    def spares_the_engine(self) -> bool:
        """True while nobody waits for the engine, and work that nobody waits for may have it."""
        return not (len(self.backlog) or self.held or self.closed)

    @property
    def due_at(self) -> float | None:
        """When `tick` has something to do."""
        times = [self.backlog.next_deadline, self.gathering.due_at]
        if self._run is not None:
            times.append(self._run.ticket.deadline)
            if not self._outbox.congested:
                times.append(self._run.stream.due_at)
        return min((t for t in times if t is not None), default=None)

    def take(self, arrived: RequestArrived, now: float) -> None:
        """Queue a request, or say why not, or answer again what was asked before."""
        try:
            known = self._known(arrived)
            if known is not None:
                self._answer_again(known, arrived)
                return
            arrived = self._with_cameras(arrived, now)
            self._check(arrived)
        except Refused as refused:
            self.refuse(arrived.reply, arrived.id, refused.failure)
            return
        self._jobs += 1
        ticket = Ticket(
            client=arrived.client,
            id=arrived.id,
            digest=arrived.digest,
            request=arrived.request,
            job=Job(
                str(self._jobs),
                arrived.turns,
                arrived.sampling,
                images=tuple(p for p in arrived.images if isinstance(p, Image)),
                crops=arrived.crops,
            ),
            size_bytes=arrived.size_bytes,
            address=arrived.reply,
            arrived=now,
            deadline=now + arrived.deadline_s,
            topic=arrived.topic,
            id_given=arrived.id_given,
        )
        self.ledger.open(ticket)
        if attachments.wanted(arrived.images):
            self.gathering.hold(ticket, arrived.images, now)
            self._gather(ticket, now)
        else:
            self._enqueue(ticket, now)

    def take_part(self, arrived: PartArrived, now: float) -> None:
        """Keep a picture that is sent apart; its request goes on if that was the last."""
        ticket = self.gathering.add(arrived.client, arrived.id, arrived.n, arrived.part, now)
        if ticket is not None:
            self._gather(ticket, now)

    def refuse(self, reply: ReplyAddress, request_id: str, failure: Failure) -> None:
        """Tell a sender that its request was not taken; nothing else is touched."""
        self._health.count("jobs_busy" if failure.code is Code.BUSY else "jobs_refused")
        self._outbox.refuse(reply, messages.error_message(request_id, failure))

    def cancel(self, client: str, request_id: str, now: float) -> None:
        """End one of a client's requests at once; one that is not open is left alone."""
        ticket = self.ledger.get_open((client, request_id))
        if ticket is not None:
            self._cut(ticket, Finish.CANCELLED, Failure(Code.CANCELLED, "cancelled"), now)

    def dispatch(self, now: float) -> None:
        """Hand the next request to the engine if it is free."""
        if self.held or self._worker is None or not self._worker.free:
            return
        self._expire(now)
        ticket = self.backlog.pop()
        if ticket is None:
            return
        ticket.state = "running"
        self._run = Run(
            ticket,
            DeltaStream(ticket.id, wanted=ticket.streams, interval_s=self._delta_interval_s),
            handed=now,
        )
        # Nobody is told more often than a delta is due: half of that keeps a delta fresh.
        gather_s = self._delta_interval_s / 2
        job = replace(ticket.job, budget_s=ticket.deadline - now, gather_s=gather_s)
        self._worker.submit(job)

    def engine_said(self, event: Event, now: float) -> None:
        """Bring the running job along; what is said of a job already answered is dropped."""
        run = self._run
        if run is not None and getattr(event, "job_id", None) == run.ticket.job_id:
            match event:
                case Started():
                    run.start(event)
                case Tokens():
                    run.add(event, now)
                    self._publish_delta(run, now)
                case Finished():
                    run.finish(event)
                    self._finish(run, event.finish, event.text, now)
                case Failed():
                    self._fail(run, event, now)
                case _:
                    pass
        self.dispatch(now)

    def engine_lost(self, why: str, now: float) -> None:
        """The engine is gone: its job runs again if nothing of it was published, else it ends."""
        run, self._run = self._run, None
        if run is None:
            return
        ticket = run.ticket
        ticket.lost_engines += 1
        if run.stream.published or ticket.lost_engines >= _MAX_LOST_ENGINES:
            self._end_stream(run, now)
            failure = Failure(Code.ENGINE_LOST, why, text=run.stream.text or None)
            self._end_with_error(ticket, failure, now)
        else:
            ticket.state = "queued"
            self.backlog.push(ticket, first=True)

    def end_waiting(self, failure: Failure, now: float) -> None:
        """Answer all that wait with the same failure: no engine will come for them."""
        running = self._run.ticket if self._run is not None else None
        for ticket in self.ledger.open_tickets:
            if ticket is not running:
                self.backlog.remove(ticket)
                self._end_with_error(ticket, failure, now)

    def end_running(self, now: float) -> None:
        """Answer the running job with what there is, as cancelled."""
        if self._run is not None:
            failure = Failure(Code.CANCELLED, "the service stops")
            self._cut(self._run.ticket, Finish.CANCELLED, failure, now)

    def connection_lost(self) -> None:
        """Deltas may have been lost: the running stream, if it had any, says no more."""
        if self._run is not None:
            self._run.stream.mute()

    def tick(self, now: float) -> None:
        """Do what has come due: deadlines and deltas."""
        self._expire(now)
        for ticket, failure in self.gathering.expired(now):
            self._end_with_error(ticket, failure, now)
        self.gathering.parts.prune(now)
        self._health.counts["parts_dropped"] = self.gathering.parts.dropped
        run = self._run
        if run is None:
            return
        if run.ticket.deadline <= now:
            self._cut(run.ticket, Finish.DEADLINE, _EXPIRED, now)
        else:
            self._publish_delta(run, now)

    @property
    def _retry_after_ms(self) -> int:
        return self._health.wait_ms(1) or _DEFAULT_RETRY_MS

    def _gather(self, ticket: Ticket, now: float) -> None:
        try:
            if self.gathering.complete(ticket):
                self.backlog.check_room(ticket.client, ticket.size_bytes, self._retry_after_ms)
                self._enqueue(ticket, now)
        except Refused as refused:
            self._end_with_error(ticket, refused.failure, now)

    def _enqueue(self, ticket: Ticket, now: float) -> None:
        position = self.backlog.push(ticket) + (self._run is not None)
        if ticket.streams:
            eta_ms = self._health.wait_ms(position) if position else None
            message = Accepted(id=ticket.id, queue_pos=position, eta_ms=eta_ms)
            self._outbox.answer(ticket.address, message)
        self.dispatch(now)

    def _known(self, arrived: RequestArrived) -> Ticket | None:
        if arrived.id_given:
            return self.ledger.find((arrived.client, arrived.id), arrived.digest)
        if arrived.redelivered:
            return self.ledger.find_redelivered(arrived.topic, arrived.digest)
        return None

    def _answer_again(self, ticket: Ticket, arrived: RequestArrived) -> None:
        self._health.count("jobs_duplicate")
        reply = arrived.reply
        if not arrived.id_given and reply.topic == self._topics.res(arrived.client, arrived.id):
            # The id in it was made up just now, and nobody knows it.
            reply = ReplyAddress(self._topics.res(ticket.client, ticket.id), reply.correlation)
        if ticket.outcome is None:
            ticket.also_answer(reply)
        else:
            self._outbox.repeat(reply, ticket.outcome.model_copy(update={"duplicate": True}))

    def _with_cameras(self, arrived: RequestArrived, now: float) -> RequestArrived:
        """The request with what the cameras that it names show now. Raises Refused."""
        seen = attachments.seen(arrived.images, lambda ref: self._look(ref, now))
        brought = sum(
            len(image.data)
            for image, was in zip(seen, arrived.images, strict=True)
            if isinstance(image, Image) and isinstance(was, TopicRef)
        )
        return replace(arrived, images=seen, size_bytes=arrived.size_bytes + brought)

    def _check(self, arrived: RequestArrived) -> None:
        if self.closed is not None:
            failure = self.closed
            raise Refused(failure.code, failure.message, retry_after_ms=failure.retry_after_ms)
        wanted = arrived.request.model
        if wanted is not None and (self._worker is None or wanted != self._worker.load.model):
            raise Refused(Code.NOT_FOUND, "no such model here: see out/info", field="model")
        facts = self._worker.facts if self._worker is not None else None
        if arrived.images and facts is not None and facts.kind != "vision":
            says = f"{facts.model} does not look at pictures: it needs a vision model"
            if facts.runtime != "scripted":
                raise Refused(Code.UNSUPPORTED, says, field="images")
        if arrived.deadline_s <= 0:
            raise Refused(Code.EXPIRED, "its deadline passed before it arrived")
        if len(self.gathering) >= self.backlog.limit:
            says = f"{len(self.gathering)} requests wait for their parts"
            raise Refused(Code.BUSY, says, retry_after_ms=self._retry_after_ms)
        self.backlog.check_room(arrived.client, arrived.size_bytes, self._retry_after_ms)

    def _expire(self, now: float) -> None:
        for ticket in self.backlog.expired(now):
            self.backlog.remove(ticket)
            self._end_with_error(ticket, _EXPIRED, now)

    def _publish_delta(self, run: Run, now: float, *, last: bool = False) -> None:
        if self._outbox.congested:
            return
        delta = run.stream.due(now, last=last)
        if delta is None:
            return
        address = run.ticket.address
        if self._outbox.send_now(address.topic, delta, address.correlation):
            run.stream.sent(now)
        else:  # larger than the broker takes
            run.stream.stop()

    def _cut(self, ticket: Ticket, finish: Finish, failure: Failure, now: float) -> None:
        run = self._run
        if run is not None and run.ticket is ticket:
            assert self._worker is not None
            self._worker.cancel(ticket.job_id)
            if run.started:
                self._finish(run, finish, run.stream.text, now)
                return
            self._run = None
        self.backlog.remove(ticket)
        self._end_with_error(ticket, failure, now)

    def _fail(self, run: Run, failed: Failed, now: float) -> None:
        self._run = None
        self._end_stream(run, now)
        failure = Failure(failed.code, failed.message, field=failed.field, text=failed.text or None)
        self._end_with_error(run.ticket, failure, now)

    def _finish(self, run: Run, finish: Finish, text: str, now: float) -> None:
        assert self._worker is not None
        self._run = None
        self._end_stream(run, now)
        facts = self._worker.facts
        result = run.result(
            finish,
            text,
            now,
            device=self._device,
            model=self._worker.load.model,
            provider=facts.provider if facts else "unknown",
        )
        self._health.job_measured(
            ttft_ms=result.timing.ttft_ms,
            tokens_per_s=result.timing.tokens_per_s,
            job_s=now - run.handed,
            tokens=result.usage.output_tokens,
        )
        counter = {Finish.CANCELLED: "jobs_cancelled", Finish.DEADLINE: "jobs_expired"}
        self._close(run.ticket, result, counter.get(finish, "jobs_ok"), finish, now)

    def _end_with_error(self, ticket: Ticket, failure: Failure, now: float) -> None:
        counter = {
            Code.CANCELLED: "jobs_cancelled",
            Code.EXPIRED: "jobs_expired",
            Code.ENGINE_LOST: "jobs_engine_lost",
        }.get(failure.code, "jobs_error")
        message = messages.error_message(ticket.id, failure)
        self._close(ticket, message, counter, failure.code, now)

    def _close(self, ticket: Ticket, outcome: Outcome, counter: str, word: str, now: float) -> None:
        self.gathering.drop(ticket)
        self.ledger.close(ticket, outcome, now)
        self.ledger.prune(now)
        self._health.count(counter)
        self._outbox.answer(ticket.address, outcome)
        for address in ticket.late_addresses:
            self._outbox.answer(address, outcome.model_copy(update={"duplicate": True}))
        total_ms = round((now - ticket.arrived) * 1000)
        tokens = outcome.usage.output_tokens if isinstance(outcome, Result) else 0
        self._tell(
            JobEvent(
                ts=int(time.time()),
                id=ticket.id,
                client=ticket.client,
                outcome=word,
                model=self._worker.load.model if self._worker else None,
                output_tokens=tokens,
                total_ms=total_ms,
                tags=ticket.request.tags or None,
            )
        )
        fields = {"code": outcome.code} if isinstance(outcome, ErrorMessage) else {}
        _log.info(
            "job_ended",
            id=ticket.id,
            client=ticket.client,
            outcome=str(word),
            tokens=tokens,
            total_ms=total_ms,
            **fields,
        )

    def _end_stream(self, run: Run, now: float) -> None:
        self._publish_delta(run, now, last=True)
        run.stream.end()
        self._health.count("deltas_dropped", run.stream.dropped)


_EXPIRED = Failure(Code.EXPIRED, "its deadline passed before it was started")
