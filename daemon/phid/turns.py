"""Whose turn it is: the waiting request that an engine takes next, and the model loaded for it."""

from __future__ import annotations

from phid.backlog import Backlog
from phid.crew import Crew
from phid.errors import Failure, Refused
from phid.ledger import Ticket
from phid.worker import Worker

# For so long requests for loaded models go before one whose model would take their model's place:
# else a device that holds one model at a time would load more than it answers.
_PATIENCE_S = 10.0


def next_turn(backlog: Backlog, crew: Crew, now: float) -> tuple[Ticket, Worker | Failure] | None:
    """The request to start and the free worker for it, or the reason why it cannot be answered.

    None while there is none, or its model is on its way. Asks for the model of the first request
    that lacks one; requests behind it whose models are loaded do not wait for that.
    """
    missing: tuple[Ticket, str] | None = None
    runnable: tuple[Ticket, str] | None = None
    for ticket in backlog:
        try:
            name = model_of(ticket, crew)
        except Refused as refused:
            return ticket, refused.failure
        if crew.ready(name) is not None:
            runnable = ticket, name
            break
        if missing is None and not crew.is_loaded(name):
            missing = ticket, name
            if not any(worker.free for worker in crew.workers):
                break  # no engine is free for those behind it either
    if missing is not None and not _goes_first(runnable, missing, crew, now):
        try:
            crew.want(missing[1], now)
        except Refused as refused:
            return missing[0], refused.failure
    if runnable is None:
        return None
    worker = crew.ready(runnable[1])  # None if it has just made room
    return (runnable[0], worker) if worker is not None else None


def model_of(ticket: Ticket, crew: Crew) -> str:
    """The name of the model that is to answer. Raises Refused."""
    return crew.name_for(ticket.request.model, pictures=bool(ticket.job.images))


def _goes_first(
    runnable: tuple[Ticket, str] | None, missing: tuple[Ticket, str], crew: Crew, now: float
) -> bool:
    """True if a request whose model is there goes before one that would take its place."""
    if runnable is None or not crew.waits_for_room(missing[1]):
        return False
    waited_s = now - missing[0].arrived
    return runnable[0].request.priority >= missing[0].request.priority and waited_s < _PATIENCE_S
