"""The requests that wait: bounded in all and per client, by priority and then by age."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterator
from itertools import count

from phid.errors import Code, Refused
from phid.ledger import Ticket

_Rank = tuple[int, int]


class Backlog:
    """A bounded queue of tickets; refuses instead of growing."""

    def __init__(self, *, limit: int, per_client: int, limit_bytes: int = 1 << 26) -> None:
        self.limit = limit
        self.per_client = per_client
        self.limit_bytes = limit_bytes
        self._bytes = 0
        self._ranked: list[tuple[_Rank, Ticket]] = []
        self._rank_of: dict[Ticket, _Rank] = {}
        self._share: Counter[str] = Counter()
        self._count = count()

    def __len__(self) -> int:
        return len(self._ranked)

    def check_room(
        self,
        client: str,
        size_bytes: int,
        retry_after_ms: int,
        *,
        held: int = 0,
        held_bytes: int = 0,
    ) -> None:
        """Raises Refused (busy) when there is no room for one more of this client's.

        Requests that are to come here later count too: `held` of this client, `held_bytes` of all.
        """
        if len(self._ranked) >= self.limit:
            says = f"the queue is full: {len(self._ranked)} requests are waiting"
            raise Refused(Code.BUSY, says, retry_after_ms=retry_after_ms)
        taken = self._bytes + held_bytes
        if taken and taken + size_bytes > self.limit_bytes:
            says = f"no room: waiting requests take {taken} of at most {self.limit_bytes} bytes"
            raise Refused(Code.BUSY, says, retry_after_ms=retry_after_ms)
        if self._share[client] + held >= self.per_client:
            says = f"at most {self.per_client} requests of one client may wait"
            raise Refused(Code.BUSY, says, retry_after_ms=retry_after_ms)

    def push(self, ticket: Ticket, *, first: bool = False) -> int:
        """Queue it: how many are in front of it. `first`: it had its turn, and goes before all."""
        age = -next(self._count) - 1 if first else next(self._count)
        rank = (-10 if first else -ticket.request.priority, age)
        insort(self._ranked, (rank, ticket), key=lambda entry: entry[0])
        self._rank_of[ticket] = rank
        self._share[ticket.client] += 1
        self._bytes += ticket.size_bytes
        return sum(other < rank for other, _ in self._ranked)

    def __iter__(self) -> Iterator[Ticket]:
        """Those that wait, the next to run first."""
        return iter([ticket for _, ticket in self._ranked])

    def remove(self, ticket: Ticket) -> bool:
        """Take the ticket out of the queue. True if it was waiting."""
        rank = self._rank_of.pop(ticket, None)
        if rank is None:
            return False
        self._ranked.remove((rank, ticket))
        self._share[ticket.client] -= 1
        self._bytes -= ticket.size_bytes
        if not self._share[ticket.client]:
            del self._share[ticket.client]
        return True

    def expired(self, now: float) -> list[Ticket]:
        """Those whose deadline has passed; they still wait to be removed."""
        return [t for t in self._rank_of if t.deadline <= now]

    @property
    def next_deadline(self) -> float | None:
        """When the next of them expires."""
        return min((t.deadline for t in self._rank_of), default=None)

    @property
    def oldest_arrival(self) -> float | None:
        """When the one that waits longest arrived."""
        return min((t.arrived for t in self._rank_of), default=None)
