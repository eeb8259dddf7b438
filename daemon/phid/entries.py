"""Values: the entries of the journal, and what an earlier run has left in it."""

from __future__ import annotations

from dataclasses import dataclass

from phid.jobs import Turn
from phid.ledger import ReplyAddress
from phid.traffic import Decision, Inbound


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request is taken: `inbound` as it came, `number` in the order of acceptance.

    Times are Unix seconds. `pictures` are those that are not in `inbound`: what cameras showed, or
    parts that had come before it. The number of each is -1 minus its place in the request.
    """

    number: int
    client: str
    id: str
    id_given: bool
    digest: str
    inbound: Inbound
    address: ReplyAddress
    accepted_ts: float
    deadline_ts: float
    pictures: tuple[tuple[int, bytes], ...] = ()
    decided: Decision | None = None


@dataclass(frozen=True, slots=True)
class AskedAgain:
    """Somebody else wants that request's outcome, too."""

    number: int
    address: ReplyAddress
    decided: Decision | None = None


@dataclass(frozen=True, slots=True)
class PartKept:
    """A picture sent apart: part `n` of a request that may still be to come."""

    client: str
    id: str
    n: int
    data: bytes
    ts: float
    decided: Decision | None = None


@dataclass(frozen=True, slots=True)
class PartsDropped:
    """Nobody asked for these parts in time, or there was no room for them."""

    client: str
    id: str


@dataclass(frozen=True, slots=True)
class ConversationKept:
    """What was said in a session so far; it replaces what was written of it before."""

    client: str
    session: str
    system: str
    turns: tuple[Turn, ...]
    ts: float


@dataclass(frozen=True, slots=True)
class ConversationDropped:
    """What was said in a session is not wanted any more."""

    client: str
    session: str
    decided: Decision | None = None


@dataclass(frozen=True, slots=True)
class Marked:
    """A delta of it is about to be published: it is not run again from here on."""

    number: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A request's outcome, as JSON, and its session's conversation with this exchange."""

    number: int
    outcome: str
    ts: float
    said: ConversationKept | None = None


@dataclass(frozen=True, slots=True)
class Told:
    """The broker has its outcome."""

    number: int


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Its dedupe window is over, or it was not taken after all."""

    number: int


@dataclass(frozen=True, slots=True)
class Stepped:
    """The clock was set by so many seconds: every time written so far is moved with it."""

    by_s: float


@dataclass(frozen=True, slots=True)
class Tried:
    """An empty entry, written to see whether the disk takes it."""


Awaited = Accepted | AskedAgain | PartKept | ConversationDropped
"""Entries that must be written before their message is acknowledged to the broker."""

Entry = (
    Accepted
    | AskedAgain
    | PartKept
    | PartsDropped
    | ConversationKept
    | ConversationDropped
    | Marked
    | Ended
    | Told
    | Forgotten
    | Stepped
    | Tried
)


@dataclass(frozen=True, slots=True)
class Written:
    """These are on the disk."""

    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class NotWritten:
    """This is not, and why."""

    entry: Entry
    reason: str


@dataclass(frozen=True, slots=True)
class Row:
    """A request as an earlier run has left it; `inbound` only while it has no outcome.

    `damaged`: its outcome, or else what it asked, cannot be read any more.
    """

    accepted: Accepted
    marked: bool
    addresses: tuple[ReplyAddress, ...]
    outcome: str | None
    ended_ts: float
    told: bool
    damaged: bool = False


@dataclass(frozen=True, slots=True)
class Left:
    """What an earlier run has left: requests in the order of acceptance, parts, conversations."""

    rows: tuple[Row, ...] = ()
    parts: tuple[PartKept, ...] = ()
    conversations: tuple[ConversationKept, ...] = ()


JournalEvent = Written | NotWritten | Left
