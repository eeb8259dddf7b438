"""Messages other than requests: cancels and operators' commands, decoded and checked."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from phid.decoding import decode, mistake
from phid.requests import Level, Message


class CancelRequest(Message):
    """Ends one of the sender's own requests, or one of its sessions."""

    id: Level | None = Field(None, description="The request to end.")
    session: Level | None = Field(None, description="The conversation to forget.")

    @model_validator(mode="after")
    def _has_one_aim(self) -> CancelRequest:
        if (self.id is None) == (self.session is None):
            raise mistake("id", "give the id of a request, or a session")
        return self


class Command(Message):
    """The payload of a ctl topic; empty is fine for verbs that need nothing."""

    id: Level | None = Field(None, description="Names the command; made up when absent.")
    reply_to: str | None = Field(None, description="Reply topic; MQTT 5's Response Topic wins.")
    level: Literal["debug", "info", "warning", "error"] | None = Field(
        None, description="log: the new level."
    )
    for_s: float | None = Field(
        None, gt=0, le=86400, allow_inf_nan=False, description="log: the settings' level after."
    )
    what: Literal["engine", "service"] = Field("engine", description="restart: which program.")


class ModelCommand(Message):
    """The payload of ctl/model: what is to become of which model."""

    id: Level | None = Field(None, description="Names the command; made up when absent.")
    reply_to: str | None = Field(None, description="Reply topic; MQTT 5's Response Topic wins.")
    action: Literal["load", "unload", "switch"] = Field(description="switch: make it the default.")
    name: Annotated[str, Field(min_length=1, max_length=256)] = Field(
        description="The model's name in the models folder."
    )
    pin: bool = Field(False, description="load: it stays, whatever else is asked for.")


class WatchCommand(Message):
    """The payload of ctl/watch: which one, and the fields of its definition that are to change."""

    model_config = ConfigDict(extra="allow")

    id: Level | None = Field(None, description="Names the command; made up when absent.")
    reply_to: str | None = Field(None, description="Reply topic; MQTT 5's Response Topic wins.")
    name: Level = Field(description="The watch to change, or to make.")
    delete: bool = Field(False, description="Forget it.")

    @property
    def definition(self) -> dict[str, Any]:
        """The fields to change."""
        return dict(self.model_extra or {})


def decode_cancel(payload: bytes) -> CancelRequest:
    """What to end. Raises Refused."""
    return decode(CancelRequest, payload, 4096)


def decode_command(payload: bytes) -> Command:
    """The options of a command; an empty payload has none. Raises Refused."""
    return decode(Command, payload or b"{}", 4096)


def decode_watch(payload: bytes) -> WatchCommand:
    """A command to change a watch; its definition is not checked here. Raises Refused."""
    return decode(WatchCommand, payload, 65_536)


def decode_model(payload: bytes) -> ModelCommand:
    """A command to load, unload or switch a model. Raises Refused."""
    return decode(ModelCommand, payload, 4096)
