"""The commands of operators: in/ctl/<verb>, each answered with what it did."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Container
from typing import Any

from phid.errors import Code, Failure, Refused
from phid.intake import CommandArrived
from phid.messages import CtlReply
from phid.operations import Data, Operations


def _log(operations: Operations, command: Any) -> Data:
    if command.level is None:
        raise Refused(Code.BAD_REQUEST, "log: give a level", field="level")
    return operations.set_log_level(command.level, command.for_s)


# `watch` gets a WatchCommand, `model` a ModelCommand, every other verb a Command: `intake` decodes
# them so.
VERBS: dict[str, Callable[[Operations, Any], Data]] = {
    "ping": lambda operations, _: operations.ping(),
    "pause": lambda operations, _: operations.pause(),
    "resume": lambda operations, _: operations.resume(),
    "drain": lambda operations, _: operations.drain(),
    "discover": lambda operations, _: operations.discover(),
    "log": _log,
    "reload": lambda operations, _: operations.reload(),
    "restart": lambda operations, command: operations.restart(command.what),
    "watch": lambda operations, command: operations.watch(command),
    "model": lambda operations, command: operations.model(command),
}


def execute(operations: Operations, arrived: CommandArrived, allow: Container[str]) -> CtlReply:
    """Run a command if its verb is allowed: the answer to it, of success or of failure."""
    verb = VERBS.get(arrived.verb)
    try:
        if verb is None:
            close = difflib.get_close_matches(arrived.verb, VERBS, n=1)
            hint = f": did you mean {close[0]}?" if close else f": there are {', '.join(VERBS)}"
            raise Refused(Code.NOT_FOUND, f"no such command{hint}")
        if arrived.verb not in allow:
            raise Refused(Code.UNAUTHORIZED, f"{arrived.verb} is switched off: see control.allow")
        data = verb(operations, arrived.command)
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
