"""The commands of operators: in/ctl/<verb>, each answered with what it did."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Container
from typing import Any, Protocol

from phid.errors import Code, Failure, Refused
from phid.intake import CommandArrived
from phid.messages import CtlReply
from phid.requests import ModelCommand, WatchCommand

Data = dict[str, Any]


class Operated(Protocol):
    """What can be commanded: the service."""

    def ping(self) -> Data:
        """State and uptime."""

    def pause(self) -> Data:
        """Refuse new requests and hold the waiting ones; the running one goes on."""

    def resume(self) -> Data:
        """Take requests again: after a pause or a drain."""

    def drain(self) -> Data:
        """Refuse new requests, finish the accepted ones, and go on running."""

    def discover(self) -> Data:
        """Publish status, info and health again."""

    def set_log_level(self, level: str, for_s: float | None) -> Data:
        """Log at another level, for a while or for good."""

    def reload(self) -> Data:
        """Read the settings again; raises Refused and keeps the old ones if they are not sound."""

    def watch(self, command: WatchCommand) -> Data:
        """Make, change or delete a standing prompt: the watch as it runs. Raises Refused."""

    def model(self, command: ModelCommand) -> Data:
        """Load, unload or switch to a model: which are loaded now. Raises Refused."""

    def restart(self, what: str) -> Data:
        """Start the engine, or after a drain the whole service, anew."""


def _log(service: Operated, command: Any) -> Data:
    if command.level is None:
        raise Refused(Code.BAD_REQUEST, "log: give a level", field="level")
    return service.set_log_level(command.level, command.for_s)


# The command is a Command, that of `watch` a WatchCommand, that of `model` a ModelCommand: intake
# has seen to it.
VERBS: dict[str, Callable[[Operated, Any], Data]] = {
    "ping": lambda service, _: service.ping(),
    "pause": lambda service, _: service.pause(),
    "resume": lambda service, _: service.resume(),
    "drain": lambda service, _: service.drain(),
    "discover": lambda service, _: service.discover(),
    "log": _log,
    "reload": lambda service, _: service.reload(),
    "restart": lambda service, command: service.restart(command.what),
    "watch": lambda service, command: service.watch(command),
    "model": lambda service, command: service.model(command),
}


def execute(service: Operated, arrived: CommandArrived, allow: Container[str]) -> CtlReply:
    """Run a command if its verb is among those allowed: its answer, of success or of failure."""
    verb = VERBS.get(arrived.verb)
    try:
        if verb is None:
            close = difflib.get_close_matches(arrived.verb, VERBS, n=1)
            hint = f": did you mean {close[0]}?" if close else f": there are {', '.join(VERBS)}"
            raise Refused(Code.NOT_FOUND, f"no such command{hint}")
        if arrived.verb not in allow:
            raise Refused(Code.UNAUTHORIZED, f"{arrived.verb} is switched off: see control.allow")
        data = verb(service, arrived.command)
    except Refused as refused:
        return refusal(arrived.id, arrived.verb, refused.failure)
    return CtlReply(id=arrived.id, verb=arrived.verb, ok=True, data=data)


def refusal(command_id: str, verb: str, failure: Failure) -> CtlReply:
    """The answer to a command that failed."""
    error: Data = {
        "code": failure.code,
        "status": failure.code.status,
        "message": failure.message,
    }
    if failure.field is not None:
        error["field"] = failure.field
    return CtlReply(id=command_id, verb=verb, ok=False, error=error)
