"""The life of a request: taken or refused, queued, run on the engine, answered exactly once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from phid import log, messages
from phid.backlog import Backlog
from phid.errors import Code, Failure, Refused
from phid.health import Health
from phid.intake import RequestArrived
from phid.jobs import (
    Event,
    Failed,
    Finish,
    Finished,
    Job,
    Sampling,
    Started,
    Token,
    Turn,
)
from phid.ledger import Ledger, ReplyAddress, Ticket
from phid.messages import Accepted, ErrorMessage, JobEvent, Outcome, Result, Timing, UsageReport
from phid.outbox import Outbox
from phid.requests import Request
from phid.settings import Settings
from phid.streams import DeltaStream
from phid.topics import Topics
from phid.worker import Worker

_DEFAULT_RETRY_MS = 1000
# An engine that dies twice under the same job is not given it a third time.
_MAX_LOST_ENGINES = 2
_log = log.get("desk")


@dataclass(slots=True)
class _Run:
    """The job the engine works on. Times are monotonic seconds."""

    ticket: Ticket
    stream: DeltaStream
    handed: float
    started: bool = False
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_token: float | None = None


class Desk:
    """Owns every open request. Owner thread only; never waits.

    `closed` says why new requests are refused at present, `held` keeps waiting ones from the
    engine.
    """

    def __init__(
        self,
        settings: Settings,
        worker: Worker | None,
        outbox: Outbox,
        health: Health,
        tell: Callable[[JobEvent], None],
    ) -> None:
        limits = settings.limits
        self.backlog = Backlog(limit=limits.backlog, per_client=limits.per_client)
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
        self._run: _Run | None = None
        self._jobs = 0

    def configure(self, settings: Settings) -> None:
        """Take over the limits of these settings; what is already accepted stays."""
        limits = settings.limits
        self.backlog.limit, self.backlog.per_client = limits.backlog, limits.per_client
        self.ledger.keep_s, self.ledger.keep_entries = limits.dedupe_s, limits.dedupe_entries
        self._delta_interval_s = settings.stream.delta_interval_ms / 1000

    @property
    def idle(self) -> bool:
        """True while no accepted request is without its outcome."""
        return not self.ledger.open_tickets

    @property
    def due_at(self) -> float | None:
        """When `tick` has something to do."""
        times = [self.backlog.next_deadline]
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
            address=arrived.reply,
            arrived=now,
            deadline=now + arrived.deadline_s,
            job_id=str(self._jobs),
            topic=arrived.topic,
            id_given=arrived.id_given,
        )
        self.ledger.open(ticket)
        position = self.backlog.push(ticket) + (self._run is not None)
        if ticket.streams:
            eta_ms = self._health.wait_ms(position) if position else None
            message = Accepted(id=ticket.id, queue_pos=position, eta_ms=eta_ms)
            self._outbox.answer(ticket.address, message)
        self.dispatch(now)

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
        self._run = _Run(
            ticket,
            DeltaStream(ticket.id, wanted=ticket.streams, interval_s=self._delta_interval_s),
            handed=now,
        )
        self._worker.submit(
            Job(
                ticket.job_id,
                turns_of(ticket.request),
                sampling_of(ticket.request),
                budget_s=ticket.deadline - now,
            )
        )

    def engine_said(self, event: Event, now: float) -> None:
        """Bring the running job along; what is said of a job already answered is dropped."""
        run = self._run
        if run is not None and getattr(event, "job_id", None) == run.ticket.job_id:
            match event:
                case Started():
                    run.started, run.prompt_tokens = True, event.prompt_tokens
                case Token():
                    self._add(run, event.text, now)
                case Finished():
                    run.output_tokens = event.usage.output_tokens
                    self._finish(run, event.finish, event.text, now, prefill_ms=event.prefill_ms)
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
        while (ticket := self.backlog.pop()) is not None:
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
        run = self._run
        if run is None:
            return
        if run.ticket.deadline <= now:
            self._cut(run.ticket, Finish.DEADLINE, _EXPIRED, now)
        else:
            self._publish_delta(run, now)

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

    def _check(self, arrived: RequestArrived) -> None:
        if self.closed is not None:
            failure = self.closed
            raise Refused(failure.code, failure.message, retry_after_ms=failure.retry_after_ms)
        wanted = arrived.request.model
        if wanted is not None and (self._worker is None or wanted != self._worker.load.model):
            raise Refused(Code.NOT_FOUND, "no such model here: see out/info", field="model")
        if arrived.deadline_s <= 0:
            raise Refused(Code.EXPIRED, "its deadline passed before it arrived")
        self.backlog.check_room(arrived.client, self._health.wait_ms(1) or _DEFAULT_RETRY_MS)

    def _expire(self, now: float) -> None:
        for ticket in self.backlog.expired(now):
            self.backlog.remove(ticket)
            self._end_with_error(ticket, _EXPIRED, now)

    def _add(self, run: _Run, text: str, now: float) -> None:
        if run.first_token is None:
            run.first_token = now
        run.output_tokens += 1
        run.stream.add(text)
        self._publish_delta(run, now)

    def _publish_delta(self, run: _Run, now: float, *, last: bool = False) -> None:
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

    def _fail(self, run: _Run, failed: Failed, now: float) -> None:
        self._run = None
        self._end_stream(run, now)
        failure = Failure(failed.code, failed.message, field=failed.field, text=failed.text or None)
        self._end_with_error(run.ticket, failure, now)

    def _finish(
        self, run: _Run, finish: Finish, text: str, now: float, prefill_ms: float | None = None
    ) -> None:
        assert self._worker is not None
        self._run = None
        self._end_stream(run, now)
        ticket = run.ticket
        facts = self._worker.facts
        first = run.first_token if run.first_token is not None else now
        decode_s = now - first
        # The first token belongs to the prefill: it is sampled from what that computed.
        rate = (run.output_tokens - 1) / decode_s if run.output_tokens > 1 and decode_s else 0.0
        ttft_ms = (first - ticket.arrived) * 1000
        result = Result(
            id=ticket.id,
            client=ticket.client,
            device=self._device,
            model=self._worker.load.model,
            provider=facts.provider if facts else "unknown",
            text=text,
            finish=finish,
            usage=UsageReport(prompt_tokens=run.prompt_tokens, output_tokens=run.output_tokens),
            timing=Timing(
                queued_ms=round((run.handed - ticket.arrived) * 1000),
                prefill_ms=round((first - run.handed) * 1000 if prefill_ms is None else prefill_ms),
                ttft_ms=round(ttft_ms),
                decode_ms=round(decode_s * 1000),
                total_ms=round((now - ticket.arrived) * 1000),
                tokens_per_s=round(rate, 2),
            ),
            deltas=run.stream.published,
        )
        self._health.job_measured(
            ttft_ms=ttft_ms, tokens_per_s=rate, job_s=now - run.handed, tokens=run.output_tokens
        )
        counter = {Finish.CANCELLED: "jobs_cancelled", Finish.DEADLINE: "jobs_expired"}
        self._close(ticket, result, counter.get(finish, "jobs_ok"), finish, now)

    def _end_with_error(self, ticket: Ticket, failure: Failure, now: float) -> None:
        counter = {
            Code.CANCELLED: "jobs_cancelled",
            Code.EXPIRED: "jobs_expired",
            Code.ENGINE_LOST: "jobs_engine_lost",
        }.get(failure.code, "jobs_error")
        message = messages.error_message(ticket.id, failure)
        self._close(ticket, message, counter, failure.code, now)

    def _close(self, ticket: Ticket, outcome: Outcome, counter: str, word: str, now: float) -> None:
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

    def _end_stream(self, run: _Run, now: float) -> None:
        self._publish_delta(run, now, last=True)
        run.stream.end()
        self._health.count("deltas_dropped", run.stream.dropped)


_EXPIRED = Failure(Code.EXPIRED, "its deadline passed before it was started")


def turns_of(request: Request) -> tuple[Turn, ...]:
    """The conversation a request stands for."""
    turns = [Turn(m.role, m.content) for m in request.messages or ()]
    if request.prompt is not None:
        turns = [Turn("user", request.prompt)]
    if request.system:
        turns.insert(0, Turn("system", request.system))
    return tuple(turns)


def sampling_of(request: Request) -> Sampling:
    """How a request wants its tokens chosen."""
    return Sampling(
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        seed=request.seed,
        stop=request.stop,
    )
