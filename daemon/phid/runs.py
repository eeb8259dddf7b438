"""The job the engine works on: what the engine has said of it, and the result this makes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from phid.jobs import Finish, Finished, Job, Started, Tokens, Usage
from phid.ledger import Ticket
from phid.messages import Result, Timing, UsageReport
from phid.streams import DeltaStream
from phid.worker import Worker


@dataclass(slots=True)
class Run:
    """One job between its hand-over and its outcome. Times are monotonic seconds."""

    ticket: Ticket
    stream: DeltaStream
    worker: Worker
    handed: float
    job: Job
    started: bool = False
    usage: Usage = field(default_factory=Usage)
    first_token: float | None = None
    prefill_ms: float | None = None
    looped: bool = False
    history: int = 0

    def start(self, event: Started) -> None:
        """The prompt has been counted, and is being read."""
        self.started, self.history = True, event.history
        self.usage = replace(
            self.usage,
            prompt_tokens=event.prompt_tokens,
            image_tokens=event.image_tokens,
            cached_tokens=event.cached_tokens,
        )

    def add(self, event: Tokens, now: float) -> None:
        """Some more tokens, and what they brought."""
        if self.first_token is None:
            self.first_token = now
        self.usage = replace(self.usage, output_tokens=self.usage.output_tokens + event.count)
        self.stream.add(event.text)

    def finish(self, event: Finished) -> None:
        """The engine's own count replaces ours, which knows nothing of tokens without text."""
        self.usage = event.usage
        self.prefill_ms = event.prefill_ms
        self.looped = event.looped

    def result(self, finish: Finish, text: str, now: float, *, device: str) -> Result:
        """The answer, as it is told."""
        ticket, usage, facts = self.ticket, self.usage, self.worker.facts
        first = now if self.first_token is None else self.first_token
        prefill_ms = (first - self.handed) * 1000 if self.prefill_ms is None else self.prefill_ms
        decode_s = now - first
        # The first token belongs to the prefill: it is sampled from what that computed.
        count = usage.output_tokens - 1
        rate = count / decode_s if count > 0 and decode_s > 0 else 0.0
        return Result(
            id=ticket.id,
            client=ticket.client,
            device=device,
            model=self.worker.load.model,
            provider=facts.provider if facts else "unknown",
            text=text,
            finish=finish,
            usage=UsageReport.of(usage),
            timing=Timing(
                queued_ms=round((self.handed - ticket.arrived) * 1000),
                prefill_ms=round(prefill_ms),
                ttft_ms=round((first - ticket.arrived) * 1000),
                decode_ms=round(decode_s * 1000),
                total_ms=round((now - ticket.arrived) * 1000),
                tokens_per_s=round(rate, 2),
            ),
            deltas=self.stream.published,
            looped=self.looped or None,
            session=ticket.request.session,
            session_turns=self.history if ticket.request.session else None,
        )
