"""Who asked what: the identity of requests, and the outcomes kept for those who ask again."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from phid.errors import Code, Refused
from phid.jobs import Job
from phid.messages import Delta, Outcome
from phid.requests import Request

Key = tuple[str, str]
"""(client, id): what a request is known by."""

# A requester that retries with a new reply topic each time must not grow a ticket without bound.
_MAX_ADDRESSES = 8


@dataclass(frozen=True, slots=True)
class ReplyAddress:
    """Where an answer goes, and the correlation data to send along untouched."""

    topic: str
    correlation: bytes | None = None


@dataclass(slots=True, eq=False)
class Ticket:
    """One accepted request, from its arrival to its outcome. Times are monotonic seconds.

    `number` is its place in the journal, if it is kept there. `mark` says whether it is on the disk
    that its deltas are published, `told` that the broker has its outcome for everyone who asked;
    `untold` is how many are left. An outcome is `published` once it is on its way, after
    `last_delta` if that has waited for the disk. `model` is the one that answers, once decided.
    """

    client: str
    id: str
    digest: str
    request: Request
    job: Job
    size_bytes: int
    address: ReplyAddress
    arrived: float
    deadline: float
    topic: str
    id_given: bool
    state: Literal["queued", "running", "ended", "forgotten"] = "queued"
    lost_engines: int = 0
    outcome: Outcome | None = None
    forget_at: float = 0.0
    late_addresses: list[ReplyAddress] = field(default_factory=list)
    number: int | None = None
    mark: Literal["no", "asked", "written"] = "no"
    published: bool = False
    model: str | None = None
    last_delta: Delta | None = None
    told: bool = False
    untold: int = 0

    @property
    def key(self) -> Key:
        """What it is known by."""
        return self.client, self.id

    @property
    def job_id(self) -> str:
        """What the engine knows it by."""
        return self.job.id

    @property
    def streams(self) -> bool:
        """True if its requester wants deltas."""
        return self.request.stream == "delta"

    def answers(self, address: ReplyAddress) -> bool:
        """True if the outcome goes there."""
        return address == self.address or address in self.late_addresses

    def also_answer(self, address: ReplyAddress) -> None:
        """Send the outcome here too: somebody has asked again. Raises Refused if too many have."""
        if self.answers(address):
            return
        if len(self.late_addresses) >= _MAX_ADDRESSES:
            raise Refused(Code.BUSY, "too many reply topics for one request")
        self.late_addresses.append(address)


class Ledger:
    """Every request that is open, and the outcomes of the last dedupe window.

    `on_forget` is called with each ticket that is not known any more.
    """

    def __init__(
        self,
        *,
        keep_s: float,
        keep_entries: int,
        on_forget: Callable[[Ticket], None] = lambda _: None,
    ) -> None:
        self._on_forget = on_forget
        self.keep_s = keep_s
        self.keep_entries = keep_entries
        self._open: dict[Key, Ticket] = {}
        self._ended: OrderedDict[Key, Ticket] = OrderedDict()
        self._unnamed: dict[tuple[str, str], Ticket] = {}
        self._forgets_at = math.inf  # no outcome is to be forgotten before this

    def __len__(self) -> int:
        return len(self._open) + len(self._ended)

    @property
    def open_tickets(self) -> list[Ticket]:
        """Requests without an outcome yet, oldest first."""
        return list(self._open.values())

    def find(self, key: Key, digest: str, now: float) -> Ticket | None:
        """The ticket of the same request, open or ended; None if it is new.

        Raises Refused (id_conflict) when the id was used for another request.
        """
        ticket = self._known(self.get(key), now)
        if ticket is not None and ticket.digest != digest:
            raise Refused(Code.ID_CONFLICT, "this id was used for another request", field="id")
        return ticket

    def find_redelivered(self, topic: str, digest: str, now: float) -> Ticket | None:
        """The ticket of a request that came without an id, now delivered again by the broker."""
        return self._known(self._unnamed.get((topic, digest)), now)

    def get(self, key: Key) -> Ticket | None:
        """The ticket of this key, open or ended."""
        return self._open.get(key) or self._ended.get(key)

    def get_open(self, key: Key) -> Ticket | None:
        """The open ticket of this key."""
        return self._open.get(key)

    def open(self, ticket: Ticket) -> None:
        """Know this request from now on."""
        self._open[ticket.key] = ticket
        if not ticket.id_given:
            self._unnamed[ticket.topic, ticket.digest] = ticket

    def drop(self, ticket: Ticket) -> None:
        """Forget an open request: it was not taken after all."""
        del self._open[ticket.key]
        self._disown(ticket)

    def recall(self, ticket: Ticket) -> None:
        """Know a request that ended in an earlier run."""
        self._keep(ticket)
        if not ticket.id_given:
            self._unnamed[ticket.topic, ticket.digest] = ticket
        self._forgets_at = min(self._forgets_at, ticket.forget_at)

    def close(self, ticket: Ticket, outcome: Outcome, now: float) -> None:
        """Keep the outcome for the dedupe window: the longer of the deadline and `keep_s`.

        A ticket that was never opened, for damage gave it another's name, leaves that one open.
        """
        if self._open.get(ticket.key) is ticket:
            del self._open[ticket.key]
        # A thousand prompts of a megabyte each are not kept for the sake of their outcomes.
        ticket.request = ticket.request.model_copy(
            update={"prompt": None, "messages": None, "system": None}
        )
        ticket.job = Job(ticket.job_id, ())
        ticket.state = "ended"
        ticket.outcome = outcome
        ticket.forget_at = now + max(self.keep_s, ticket.deadline - ticket.arrived)
        self._keep(ticket)
        while len(self._ended) > self.keep_entries:
            self._forget(next(iter(self._ended.values())))
        self._forgets_at = min(self._forgets_at, ticket.forget_at)

    def prune(self, now: float) -> None:
        """Forget outcomes whose window is over; cheap enough to call in every turn."""
        if now < self._forgets_at:
            return
        kept = self._ended.values()
        self._forgets_at = min((t.forget_at for t in kept if t.forget_at > now), default=math.inf)
        for ticket in [t for t in kept if t.forget_at <= now]:
            self._forget(ticket)

    def _keep(self, ticket: Ticket) -> None:
        if (former := self._ended.get(ticket.key)) is not None:
            self._forget(former)
        self._ended[ticket.key] = ticket

    def _known(self, ticket: Ticket | None, now: float) -> Ticket | None:
        """The ticket, unless its window is over."""
        if ticket is None or ticket.state != "ended" or ticket.forget_at > now:
            return ticket
        self._forget(ticket)
        return None

    def _forget(self, ticket: Ticket) -> None:
        del self._ended[ticket.key]
        self._disown(ticket)
        self._on_forget(ticket)

    def _disown(self, ticket: Ticket) -> None:
        ticket.state = "forgotten"
        if self._unnamed.get((ticket.topic, ticket.digest)) is ticket:
            del self._unnamed[ticket.topic, ticket.digest]
