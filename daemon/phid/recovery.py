"""What an earlier run has written, as tickets: what runs again, what has ended, what is owed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from phid import log, messages, topics, wallclock
from phid.attachments import Picture
from phid.entries import Left, PartKept, Row
from phid.errors import Code, Failure
from phid.intake import ArrivalRefused, Intake, RequestArrived
from phid.jobs import Image, Job
from phid.ledger import Key, Ledger, ReplyAddress, Ticket
from phid.messages import ErrorMessage, Result
from phid.requests import Request

_log = log.get("recovery")
_DAMAGED = Failure(Code.INTERNAL, "the journal is damaged where it was kept: ask again")
_STARTED = Failure(Code.ENGINE_LOST, "the service was started anew while it was being answered")
# A longer deadline is taken for damage, unless the settings allow it.
_LONGEST_S = 7 * 86_400.0
# The name in the reply topic where a request's own topic and name cannot be read any more.
_NOBODY = topics.ANON, "unreadable"
# Stands for the request in a closed ticket, where it is not needed any more.
_ASKED = Request(prompt="-")


@dataclass(frozen=True, slots=True)
class Again:
    """A request that is still to be answered; its pictures are complete but for parts."""

    number: int
    arrived: RequestArrived
    arrived_at: float
    addresses: tuple[ReplyAddress, ...]


@dataclass(frozen=True, slots=True)
class Over:
    """A request that is not run again: it is told `ticket.outcome`, or else `failure`."""

    number: int
    ticket: Ticket
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class AskedMeanwhile:
    """A request that `ticket` has asked again before the journal could be read."""

    number: int
    ticket: Ticket
    addresses: tuple[ReplyAddress, ...]


@dataclass(frozen=True, slots=True)
class IdTaken:
    """`ticket` was accepted under an id that another open request, in the journal, had already."""

    ticket: Ticket


def parts_of(left: Left) -> dict[Key, list[PartKept]]:
    """The pictures sent apart, by the request that they belong to."""
    parts: dict[Key, list[PartKept]] = {}
    for part in left.parts:
        parts.setdefault((part.client, part.id), []).append(part)
    return parts


def read(
    rows: tuple[Row, ...], intake: Intake, ledger: Ledger, *, now: float, wall: float
) -> Iterator[Again | Over | AskedMeanwhile | IdTaken]:
    """What has become of each request, in the order of acceptance.

    Tickets without a number in `ledger` were accepted before the journal could be read.

    `now` is monotonic, `wall` Unix time, in seconds. Where the clock was set back, is not set yet,
    or was not set at acceptance, a request counts as new. One whose times cannot be right is not
    run: how long it was wanted is not known.
    """
    longest_s = max(_LONGEST_S, intake.deadline_ms / 1000)
    rows = tuple(_reachable(row, intake) for row in rows)
    misnamed = _misnamed(rows, intake)
    yield from (Over(n, _ticket(row, now, 0.0), _DAMAGED) for n, row in misnamed.items())
    for row in (row for row in rows if row.accepted.number not in misnamed):
        accepted = row.accepted
        meanwhile = _meanwhile(row, ledger.get((accepted.client, accepted.id)))
        if meanwhile is not None:
            yield meanwhile
        if isinstance(meanwhile, AskedMeanwhile):
            continue
        age_s = wallclock.age_s(accepted.accepted_ts, wall)
        span_s = accepted.deadline_ts - accepted.accepted_ts
        timed = wallclock.is_time(accepted.accepted_ts) and 0 <= span_s <= longest_s
        if not timed:
            span_s = 0.0
        if not timed or (row.outcome is not None and not wallclock.is_time(row.ended_ts)):
            _log.error("times_unreadable", id=accepted.id, client=accepted.client)
        if row.outcome is not None:
            ticket = _ticket(row, now - age_s, span_s)
            ticket.outcome, ticket.state, ticket.told = _outcome(row), "ended", row.told
            ticket.id = ticket.outcome.id  # it may have been told under another: `_misnamed`
            since_s = wallclock.age_s(row.ended_ts, wall)
            ticket.forget_at = now - since_s + max(ledger.keep_s, span_s)
            yield Over(accepted.number, ticket)
            continue
        sound = timed and not (row.marked or row.damaged)
        arrival = intake.read(accepted.inbound) if sound else None
        if not isinstance(arrival, RequestArrived):
            failure = _STARTED if row.marked else _DAMAGED
            if isinstance(arrival, ArrivalRefused):  # other settings may refuse what was taken
                failure = arrival.failure
            if failure is _DAMAGED:
                _log.error("request_unreadable", id=accepted.id, client=accepted.client)
            yield Over(accepted.number, _ticket(row, now - age_s, span_s), failure)
            continue
        shown = dict(accepted.pictures)
        yield Again(
            accepted.number,
            replace(
                arrival,
                id=accepted.id,
                id_given=accepted.id_given,
                digest=accepted.digest,
                reply=accepted.address,
                deadline_s=span_s,
                images=tuple(_shown(p, shown.get(-1 - n)) for n, p in enumerate(arrival.images)),
                size_bytes=arrival.size_bytes + sum(len(data) for data in shown.values()),
            ),
            now - age_s,
            row.addresses,
        )


def _reachable(row: Row, intake: Intake) -> Row:
    """The row with reply topics that can be published to (no wildcard), damaged ones replaced."""
    accepted, addresses = row.accepted, row.addresses
    reached = tuple(a for a in addresses if topics.is_publishable(a.topic))
    if topics.is_publishable(accepted.address.topic):
        return row if reached == addresses else replace(row, addresses=reached)
    _log.error("address_unreadable", id=accepted.id, client=accepted.client)
    name = accepted.client, accepted.id
    topic = intake.topics.res(*(name if all(map(topics.is_level, name)) else _NOBODY))
    address = ReplyAddress(topic, accepted.address.correlation)
    return replace(
        row, accepted=replace(accepted, address=address), addresses=reached, damaged=True
    )


def _misnamed(rows: tuple[Row, ...], intake: Intake) -> dict[int, Row]:
    """Open requests that damage has given another's name, by number, with their messages' names.

    No two open requests may have the same name. It is kept by the one whose message says it too, or
    else by the first whose message says none.
    """
    namesakes: dict[Key, list[Row]] = {}
    for row in rows:
        if row.outcome is None:
            namesakes.setdefault((row.accepted.client, row.accepted.id), []).append(row)
    found: dict[int, Row] = {}
    for key, several in namesakes.items():
        if len(several) == 1:
            continue
        named = [(row, _own_name(row, intake)) for row in several]
        (own, _) = max(named, key=lambda each: (each[1] == key, each[1] is None))
        for row, name in named:
            if row is not own:
                client, request_id = name or key
                _log.error("name_unreadable", id=request_id, client=client)
                accepted = replace(row.accepted, client=client, id=request_id)
                found[row.accepted.number] = replace(row, accepted=accepted)
    return found


def _own_name(row: Row, intake: Intake) -> Key | None:
    """The name in a request's own message: client and id; None if it says none."""
    arrival = intake.read(row.accepted.inbound)
    if isinstance(arrival, RequestArrived) and arrival.id_given:
        return arrival.client, arrival.id
    return None


def _meanwhile(row: Row, known: Ticket | None) -> AskedMeanwhile | IdTaken | None:
    """What this run's ticket of the same client and id is to the row; None: nothing."""
    if known is None or known.number is not None:
        return None
    ended = known.outcome is not None, row.outcome is not None
    if known.digest != row.accepted.digest:
        return IdTaken(known) if not any(ended) else None
    if all(ended):
        return None
    addresses = () if row.told else (row.accepted.address, *row.addresses)
    return AskedMeanwhile(row.accepted.number, known, addresses)


def _outcome(row: Row) -> Result | ErrorMessage:
    """What came of it; where that cannot be read any more, an error that says so."""
    assert row.outcome is not None
    try:
        outcome = messages.decode_answer(row.outcome.encode())
    except ValueError:
        outcome = None
    if isinstance(outcome, Result | ErrorMessage):
        return outcome
    _log.error("outcome_unreadable", id=row.accepted.id, client=row.accepted.client)
    return messages.error_message(row.accepted.id, _DAMAGED)


def _shown(picture: Picture, data: bytes | None) -> Picture:
    """The picture, with its bytes of then if it came apart: a camera's frame, or a part."""
    if not isinstance(picture, Image) and data is not None:
        return Image(data, picture.label)
    return picture


def _ticket(row: Row, arrived: float, span_s: float) -> Ticket:
    accepted = row.accepted
    return Ticket(
        client=accepted.client,
        id=accepted.id,
        digest=accepted.digest,
        request=_ASKED,
        job=Job("", ()),
        size_bytes=0,
        address=accepted.address,
        arrived=arrived,
        deadline=arrived + span_s,
        topic=accepted.inbound.topic,
        id_given=accepted.id_given,
        late_addresses=list(row.addresses),
    )
