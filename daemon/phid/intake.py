"""From a message of the broker to a decoded arrival with its reply address; pure."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from phid import requests, topics
from phid.broker import Inbound
from phid.errors import Code, Failure, Refused
from phid.ledger import ReplyAddress
from phid.requests import Command, Request
from phid.topics import Address, Topics


@dataclass(frozen=True, slots=True)
class RequestArrived:
    """A sound request: it may still be refused for lack of room."""

    client: str
    id: str
    id_given: bool
    topic: str
    request: Request
    digest: str
    deadline_s: float
    redelivered: bool
    reply: ReplyAddress


@dataclass(frozen=True, slots=True)
class CancelArrived:
    """A client wants one of its requests ended."""

    client: str
    id: str


@dataclass(frozen=True, slots=True)
class CommandArrived:
    """An operator's command."""

    verb: str
    id: str
    command: Command
    broadcast: bool
    reply: ReplyAddress


@dataclass(frozen=True, slots=True)
class ArrivalRefused:
    """Something that cannot be taken; its sender is told."""

    client: str
    id: str
    failure: Failure
    reply: ReplyAddress
    verb: str | None = None


Arrival = RequestArrived | CancelArrived | CommandArrived | ArrivalRefused


@dataclass(frozen=True, slots=True)
class Intake:
    """What decides how a message is read; replaced as a whole when settings are reloaded."""

    topics: Topics
    payload_bytes: int
    max_tokens: int
    deadline_ms: int
    reply_allow: tuple[str, ...] = ()

    def read(self, inbound: Inbound) -> Arrival | None:
        """What a message means; None for what must be ignored: retained ones and strangers'.

        Retained requests would be answered again at every reconnect, for ever.
        """
        if inbound.retain:
            return None
        address = self.topics.parse(inbound.topic)
        try:
            if address is None:
                raise Refused(Code.NOT_FOUND, "no such topic: text, cancel and ctl are here")
            if address.kind == "text":
                return self._request(inbound, address)
            if address.kind == "cancel":
                cancel = requests.decode_cancel(inbound.payload)
                return CancelArrived(address.client, cancel.id)
            if address.kind == "ctl":
                return self._command(inbound, address)
            raise Refused(Code.UNSUPPORTED, "frames are not supported by this version")
        except Refused as refused:
            client = address.client if address else topics.ANON
            request_id, reply_to = requests.salvage(inbound.payload, self.payload_bytes)
            request_id = request_id or _new_id()
            verb = address.verb if address and address.kind == "ctl" else None
            try:
                reply = self._reply(
                    inbound, client, request_id, reply_to, operator=verb is not None
                )
            except Refused:
                reply = ReplyAddress(self.topics.res(client, request_id), inbound.correlation)
            return ArrivalRefused(client, request_id, refused.failure, reply, verb)

    def _request(self, inbound: Inbound, address: Address) -> RequestArrived:
        request = requests.decode_request(inbound.payload, self.payload_bytes)
        if request.client not in (None, address.client):
            raise Refused(
                Code.UNAUTHORIZED, f"the topic says client {address.client}", field="client"
            )
        digest = request.digest(address.kind)
        if request.max_tokens > self.max_tokens:
            if "max_tokens" in request.model_fields_set:
                says = f"max_tokens: at most {self.max_tokens} here"
                raise Refused(Code.BAD_REQUEST, says, field="max_tokens")
            request = request.model_copy(update={"max_tokens": self.max_tokens})
        request_id = request.id or _new_id()
        deadline_s = min(request.deadline_ms, self.deadline_ms) / 1000
        if inbound.expiry_s is not None:
            deadline_s = min(deadline_s, inbound.expiry_s)
        return RequestArrived(
            client=address.client,
            id=request_id,
            id_given=request.id is not None,
            topic=inbound.topic,
            request=request,
            digest=digest,
            deadline_s=deadline_s,
            redelivered=inbound.dup,
            reply=self._reply(inbound, address.client, request_id, request.reply_to),
        )

    def _command(self, inbound: Inbound, address: Address) -> CommandArrived:
        command = requests.decode_command(inbound.payload)
        command_id = command.id or _new_id()
        return CommandArrived(
            verb=address.verb,
            id=command_id,
            command=command,
            broadcast=address.broadcast,
            reply=self._reply(inbound, address.client, command_id, command.reply_to, operator=True),
        )

    def _reply(
        self,
        inbound: Inbound,
        client: str,
        request_id: str,
        reply_to: str | None,
        *,
        operator: bool = False,
    ) -> ReplyAddress:
        wanted = inbound.response_topic or reply_to
        if wanted is None:
            return ReplyAddress(self.topics.res(client, request_id), inbound.correlation)
        # Whoever may publish commands is an operator, and has an inbox of any client's name.
        allow = self.reply_allow
        if operator:
            allow = (*allow, self.topics.rx("+"))
        if not self.topics.may_reply(wanted, client, allow):
            own = self.topics.rx(client), self.topics.res(client, request_id)
            says = f"reply topic: only {own[0]}, {own[1]} and what is beside them"
            raise Refused(Code.UNAUTHORIZED, says, field="reply_to")
        return ReplyAddress(wanted, inbound.correlation)


def _new_id() -> str:
    return uuid.uuid4().hex[:20]
