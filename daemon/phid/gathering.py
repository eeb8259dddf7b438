"""Requests whose pictures are sent apart: held until all have come, or time is up."""

from __future__ import annotations

from dataclasses import dataclass, replace

from phid import attachments
from phid.attachments import Picture
from phid.errors import Code, Failure
from phid.jobs import Image
from phid.ledger import Key, Ticket
from phid.parts import Part, Parts


@dataclass(frozen=True, slots=True)
class _Held:
    pictures: tuple[Picture, ...]
    until: float


class Gathering:
    """The incomplete requests, and parts that came before their request. Owner thread only."""

    def __init__(self, *, limit_bytes: int, keep_s: float) -> None:
        self.parts = Parts(limit_bytes=limit_bytes, keep_s=keep_s)
        self._held: dict[Ticket, _Held] = {}

    def __len__(self) -> int:
        return len(self._held)

    @property
    def size_bytes(self) -> int:
        """The size of the held requests, without their parts, which have a limit of their own."""
        return sum(ticket.size_bytes for ticket in self._held)

    def share(self, client: str) -> int:
        """How many requests of this client's are held."""
        return sum(ticket.client == client for ticket in self._held)

    @property
    def due_at(self) -> float | None:
        """When the next of them has waited long enough."""
        return min((held.until for held in self._held.values()), default=None)

    def hold(self, ticket: Ticket, pictures: tuple[Picture, ...], now: float) -> None:
        """Keep a request whose parts may be missing; `complete` says whether they are."""
        self._held[ticket] = _Held(pictures, min(now + self.parts.keep_s, ticket.deadline))
        self.parts.wait_on(ticket.key)

    def add(self, key: Key, n: int, part: Part, now: float, *, kept: bool) -> Ticket | None:
        """Keep a part (`kept`: on the disk too): the request it belongs to, if that is held."""
        self.parts.prune(now)
        self.parts.add(key, n, part, now, kept=kept)
        return next((t for t in self._held if t.key == key), None)

    def came_apart(self, ticket: Ticket, asked: tuple[Picture, ...]) -> dict[int, Image]:
        """The pictures that came apart for an open request which is `asked` again, by their places.

        Those that the new message brings itself are not among them.
        """
        held = self._held.get(ticket)
        has = ticket.job.images if held is None else held.pictures
        return {
            n: there
            for n, (here, there) in enumerate(zip(asked, has, strict=True))
            if isinstance(there, Image) and not isinstance(here, Image)
        }

    def complete(self, ticket: Ticket) -> bool:
        """True if no part is missing: they are in the ticket's job now.

        Raises Refused when one cannot be taken; the ticket is not held any more then.
        """
        held = self._held[ticket]
        if self.parts.missing(ticket.key, attachments.wanted(held.pictures)):
            return False
        del self._held[ticket]
        images = attachments.complete(held.pictures, self._take(ticket))
        ticket.job = replace(ticket.job, images=images)
        ticket.size_bytes += sum(len(image.data) for image in images)
        return True

    def drop(self, ticket: Ticket) -> None:
        """Forget a request that has ended otherwise, and its parts."""
        if self._held.pop(ticket, None) is not None:
            self._take(ticket)

    def _take(self, ticket: Ticket) -> dict[int, Part]:
        """Its parts; if the disk keeps the request, it keeps them too until that is answered."""
        return self.parts.take(ticket.key, for_good=ticket.number is None)

    def expired(self, now: float) -> list[tuple[Ticket, Failure]]:
        """Those that cannot become complete any more, with what their requesters are told.

        They have waited long enough, or there was no room for one of their parts.
        """
        ended = []
        for ticket, held in self._held.items():
            wanted = attachments.wanted(held.pictures)
            if (lost := self.parts.lost(ticket.key, wanted)) is not None:
                ended.append((ticket, lost))
            elif held.until <= now:
                ended.append((ticket, self._incomplete(ticket, wanted)))
        return ended

    def _incomplete(self, ticket: Ticket, wanted: frozenset[int]) -> Failure:
        names = ", ".join(str(n) for n in self.parts.missing(ticket.key, wanted))
        return Failure(Code.INCOMPLETE, f"these parts did not come: {names}", field="images")
