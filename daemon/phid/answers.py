"""What requesters are told: one outcome for each request, again for whoever asks again."""

from __future__ import annotations

import time
from collections.abc import Callable

from phid import log, messages
from phid.entries import ConversationKept, Ended, Entry, Marked
from phid.errors import Code, Failure
from phid.health import Health
from phid.intake import RequestArrived
from phid.ledger import Ledger, ReplyAddress, Ticket
from phid.messages import ErrorMessage, JobEvent, Outcome, Result
from phid.outbox import Outbox
from phid.records import Records
from phid.topics import Topics
from phid.traffic import Decision

_log = log.get("answers")


class Answers:
    """Ends tickets. An outcome is published when it is on the disk. Owner thread only.

    `tell` gets an event for each job that ended.
    """

    def __init__(
        self,
        topics: Topics,
        ledger: Ledger,
        records: Records,
        outbox: Outbox,
        health: Health,
        tell: Callable[[JobEvent], None],
    ) -> None:
        self.ledger = ledger
        self.records = records
        self.unpublished = 0
        self._topics = topics
        self._outbox = outbox
        self._health = health
        self._tell = tell

    def refuse(
        self, reply: ReplyAddress, request_id: str, failure: Failure, decided: Decision | None
    ) -> None:
        """Tell a sender that its request was not taken; nothing else is touched."""
        self._health.count("jobs_busy" if failure.code is Code.BUSY else "jobs_refused")
        self._outbox.refuse(reply, messages.error_message(request_id, failure), decided)

    def again(self, ticket: Ticket, arrived: RequestArrived, decided: Decision, now: float) -> bool:
        """Answer a request that is asked again. True if that is being written; raises Refused."""
        self._health.count("jobs_duplicate")
        reply = arrived.reply
        if not arrived.id_given and reply.topic == self._topics.res(arrived.client, arrived.id):
            # That topic has an id made up just now, which nobody knows: use the first one's.
            reply = ReplyAddress(self._topics.res(ticket.client, ticket.id), reply.correlation)
        if ticket.outcome is None or not ticket.published:
            qos, is_new = arrived.inbound.qos, not ticket.answers(reply)
            if ticket.number is None or is_new:  # else there is nothing to be kept
                self.records.check_room(qos, arrived.size_bytes)
            ticket.also_answer(reply)
            if ticket.outcome is None and self.records.accept_late(ticket, arrived, decided, now):
                return True
            return bool(qos and is_new) and self.records.ask_again(ticket, reply, decided)
        outcome = ticket.outcome.model_copy(update={"duplicate": True})
        self._outbox.repeat(reply, outcome, decided)
        return False

    def end_with_error(self, ticket: Ticket, failure: Failure, now: float) -> None:
        """End a request with an error."""
        counter = {
            Code.CANCELLED: "jobs_cancelled",
            Code.EXPIRED: "jobs_expired",
            Code.ENGINE_LOST: "jobs_engine_lost",
        }.get(failure.code, "jobs_error")
        message = messages.error_message(ticket.id, failure)
        self.end(ticket, message, counter, failure.code, now)

    def end(
        self,
        ticket: Ticket,
        outcome: Outcome,
        counter: str,
        word: str,
        now: float,
        said: ConversationKept | None = None,
    ) -> None:
        """End a request: counted as `counter`, told in events as `word`.

        `said` is its session's conversation with this exchange.
        """
        self.ledger.close(ticket, outcome, now)
        self._health.count(counter)
        self.unpublished += 1
        if not self.records.end(ticket, outcome, said):
            self._publish(ticket)
        total_ms = round((now - ticket.arrived) * 1000)
        tokens = outcome.usage.output_tokens if isinstance(outcome, Result) else 0
        self._tell(
            JobEvent(
                ts=int(time.time()),
                id=ticket.id,
                client=ticket.client,
                outcome=word,
                model=ticket.model,
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

    def written(self, entry: Entry) -> None:
        """Do what has waited for this to be on the disk."""
        if isinstance(entry, Marked | Ended) and (ticket := self.records.ticket(entry.number)):
            if isinstance(entry, Marked):
                ticket.mark = "written"
            elif not ticket.published:
                self._publish(ticket)

    def join(self, ticket: Ticket, number: int, addresses: tuple[ReplyAddress, ...]) -> None:
        """Let its outcome also answer the same request in the journal, from an earlier run."""
        self.records.join(ticket, number, addresses)
        if ticket.outcome is not None:  # whoever has it already is sent a duplicate
            ticket.outcome = ticket.outcome.model_copy(update={"duplicate": True})
            ticket.published = False
            self.unpublished += 1
            self.records.end(ticket, ticket.outcome)

    def recall(self, ticket: Ticket, failure: Failure | None, now: float) -> None:
        """Take over a request of an earlier run that has ended, or ends now with this failure.

        Its outcome is published again unless the broker is known to have it.
        """
        if failure is not None:
            if self.ledger.get_open(ticket.key) is None:
                self.ledger.open(ticket)
            self.end_with_error(ticket, failure, now)
            return
        self.ledger.recall(ticket)
        ticket.published = True
        if not ticket.told:
            self._owe(ticket)

    def _owe(self, ticket: Ticket) -> None:
        assert ticket.outcome is not None
        ticket.untold = 1 + len(ticket.late_addresses)
        for address in (ticket.address, *ticket.late_addresses):
            self._outbox.answer(address, ticket.outcome, ticket.number, sent_before=True)
        ticket.late_addresses.clear()

    def _publish(self, ticket: Ticket) -> None:
        outcome = ticket.outcome
        assert outcome is not None
        ticket.published, ticket.untold = True, 1 + len(ticket.late_addresses)
        self.unpublished -= 1
        if ticket.last_delta is not None:
            address = ticket.address
            if not self._outbox.send_now(address.topic, ticket.last_delta, address.correlation):
                self._health.count("deltas_dropped")
            ticket.last_delta = None
        self._outbox.answer(ticket.address, outcome, ticket.number)
        for address in ticket.late_addresses:
            again = outcome.model_copy(update={"duplicate": True})
            self._outbox.answer(address, again, ticket.number)
        # The outbox has these addresses; whoever asks from now on is answered at once.
        ticket.late_addresses.clear()
