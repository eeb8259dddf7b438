"""The job on the engine: handed over, streamed to its requester, ended with what it came to."""

from __future__ import annotations

from dataclasses import replace

from phid.answers import Answers
from phid.conversations import Conversations
from phid.errors import Code, Failure
from phid.health import Health
from phid.jobs import Event, Failed, Finish, Finished, Prefilled, Started, Tokens
from phid.ledger import Ticket
from phid.outbox import Outbox
from phid.records import Records
from phid.runs import Run
from phid.settings import Settings
from phid.streams import DeltaStream
from phid.worker import Worker

# An engine that dies twice under the same job is not given it a third time.
_MAX_LOST_ENGINES = 2


class Runner:
    """Runs one request at a time. Owner thread only; never waits."""

    def __init__(
        self,
        settings: Settings,
        outbox: Outbox,
        health: Health,
        answers: Answers,
        records: Records,
        conversations: Conversations,
    ) -> None:
        self.delta_interval_s = settings.stream.delta_interval_ms / 1000
        self._device = settings.device
        self._outbox = outbox
        self._health = health
        self._answers = answers
        self._records = records
        self._conversations = conversations
        self._run: Run | None = None

    @property
    def ticket(self) -> Ticket | None:
        """The request whose job is running."""
        return self._run.ticket if self._run is not None else None

    @property
    def worker(self) -> Worker | None:
        """The worker whose engine runs it."""
        return self._run.worker if self._run is not None else None

    @property
    def due_at(self) -> float | None:
        """When `tick` has something to do."""
        run = self._run
        if run is None:
            return None
        # A delta that waits for the network or the disk is looked at when that has answered.
        waits = self._outbox.congested or run.ticket.mark == "asked"
        at = None if waits else run.stream.due_at
        return run.ticket.deadline if at is None else min(at, run.ticket.deadline)

    def start(self, ticket: Ticket, worker: Worker, now: float) -> None:
        """Hand a request to an engine, which must be free."""
        ticket.state, ticket.model = "running", worker.load.model
        # The engine need not tell of tokens more often than a delta is due.
        gather_s = self.delta_interval_s
        job = self._conversations.job(ticket)
        job = replace(job, budget_s=ticket.deadline - now, gather_s=gather_s)
        self._run = Run(
            ticket,
            DeltaStream(ticket.id, wanted=ticket.streams, interval_s=self.delta_interval_s),
            worker,
            handed=now,
            job=job,
        )
        worker.submit(job)
        length = sum(len(turn.content) for turn in (*job.turns, *(job.history or ())))
        if ticket.streams and not job.images and length <= worker.prefill_slice:
            # The first token of so short a prompt is near: mark it in the request's own commit.
            self._records.mark(ticket)

    def engine_said(self, event: Event, now: float) -> None:
        """Bring the job along; what is said of a job already answered is dropped."""
        run = self._run
        if run is None or getattr(event, "job_id", None) != run.ticket.job_id:
            return
        match event:
            case Started():
                run.start(event)
                self._health.count("tokens_in", event.prompt_tokens)
                self._health.count("tokens_cached", event.cached_tokens)
                self._mark_in_time(run, event.cached_tokens)
            case Prefilled(_, tokens):
                self._mark_in_time(run, tokens)
            case Tokens():
                run.add(event, now)
                self._publish_delta(run, now)
            case Finished():
                run.finish(event)
                self._health.count("jobs_looped", event.looped)
                self._finish(run, event.finish, event.text, now)
            case Failed(_, code, message, field, text):
                self._fail(run, Failure(code, message, field=field, text=text or None), now)
            case _:
                pass

    def engine_lost(self, why: str, now: float) -> Ticket | None:
        """The engine is gone: the ticket, if nothing of it was published and it is to run again."""
        run, self._run = self._run, None
        if run is None:
            return None
        ticket = run.ticket
        ticket.lost_engines += 1
        if run.stream.published or ticket.lost_engines >= _MAX_LOST_ENGINES:
            self._fail(run, Failure(Code.ENGINE_LOST, why, text=run.stream.text or None), now)
            return None
        ticket.state = "queued"
        return ticket

    def cut(self, ticket: Ticket, finish: Finish, now: float) -> bool:
        """End it now with what there is; False if nothing has begun, and it is only taken back."""
        run = self._run
        if run is None or run.ticket is not ticket or not run.started:
            self.take_back(ticket)
            return False
        run.worker.cancel(ticket.job_id)
        self._finish(run, finish, run.stream.text, now)
        return True

    def take_back(self, ticket: Ticket) -> None:
        """Have the engine forget it; nothing is told."""
        if self._run is not None and self._run.ticket is ticket:
            self._run.worker.cancel(ticket.job_id)
            self._run = None

    def connection_lost(self) -> None:
        """Deltas may have been lost: the stream, if it had any, says no more."""
        if self._run is not None:
            self._run.stream.mute()

    def mark_failed(self, number: int) -> None:
        """Stop its stream: without its mark on the disk no delta of it may be published."""
        if self._run is not None and self._run.ticket.number == number:
            self._run.stream.stop()

    def tick(self, now: float) -> None:
        """Publish the delta that is due."""
        if self._run is not None:
            self._publish_delta(self._run, now)

    def _mark_in_time(self, run: Run, prefilled: int) -> None:
        """Have the mark of a stream on the disk by its first token, but not long before it."""
        left = run.usage.prompt_tokens - prefilled
        if run.ticket.streams and left <= run.worker.prefill_slice:
            self._records.mark(run.ticket)

    def _publish_delta(self, run: Run, now: float, *, last: bool = False) -> None:
        if self._outbox.congested:
            return
        delta = run.stream.due(now, last=last)
        if delta is None:
            return
        self._records.mark(run.ticket)
        if run.ticket.mark != "written":
            return
        address = run.ticket.address
        if self._outbox.send_now(address.topic, delta, address.correlation):
            run.stream.sent(now)
        else:  # larger than the broker takes
            run.stream.stop()

    def _fail(self, run: Run, failure: Failure, now: float) -> None:
        self._run = None
        self._end_stream(run, now)
        self._answers.end_with_error(run.ticket, failure, now)

    def _finish(self, run: Run, finish: Finish, text: str, now: float) -> None:
        self._run = None
        self._end_stream(run, now)
        result = run.result(finish, text, now, device=self._device)
        self._health.job_measured(
            ttft_ms=result.timing.ttft_ms,
            tokens_per_s=result.timing.tokens_per_s,
            job_s=now - run.handed,
            tokens=result.usage.output_tokens,
        )
        said = self._conversations.add(run.ticket, run.job, run.history, text, now)
        counter = {Finish.CANCELLED: "jobs_cancelled", Finish.DEADLINE: "jobs_expired"}
        self._answers.end(run.ticket, result, counter.get(finish, "jobs_ok"), finish, now, said)

    def _end_stream(self, run: Run, now: float) -> None:
        self._publish_delta(run, now, last=True)
        if run.ticket.mark == "asked" and (delta := run.stream.due(now, last=True)):
            # Its mark is not on the disk yet: the last delta goes out with the outcome.
            run.ticket.last_delta = delta
            run.stream.sent(now)
        run.stream.end()
        self._health.count("deltas_dropped", run.stream.dropped)
