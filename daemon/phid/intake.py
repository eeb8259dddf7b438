"""From a message of the broker to a decoded arrival with its reply address; pure."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Self

from phid import attachments, commands, log, requests, topics
from phid.attachments import Picture, PictureLimits
from phid.commands import Command, ModelCommand, WatchCommand
from phid.errors import Code, Failure, Refused
from phid.jobs import Image, Job, Sampling, Turn
from phid.ledger import Key, ReplyAddress, Ticket
from phid.requests import Request
from phid.settings import Settings
from phid.topics import Address, Topics
from phid.traffic import Inbound

# It is kept as long as the outcome, for each of a thousand requests.
_MAX_CORRELATION_BYTES = 16_384
_log = log.get("intake")


@dataclass(frozen=True, slots=True)
class RequestArrived:
    """A sound request: it may still be refused for lack of room.

    `inbound` is the message it came in; `apart` are the places of the images that are not in that
    message: what cameras showed, or parts that had come before it.
    """

    client: str
    id: str
    id_given: bool
    topic: str
    request: Request
    digest: str
    turns: tuple[Turn, ...]
    sampling: Sampling
    images: tuple[Picture, ...]
    crops: int
    size_bytes: int
    deadline_s: float
    redelivered: bool
    reply: ReplyAddress
    inbound: Inbound
    apart: frozenset[int] = frozenset()

    def ticket(self, job_id: str, arrived: float) -> Ticket:
        """A ticket for it, with the job that the engine will know by this id."""
        return Ticket(
            client=self.client,
            id=self.id,
            digest=self.digest,
            request=self.request,
            job=Job(
                job_id,
                self.turns,
                self.sampling,
                images=tuple(p for p in self.images if isinstance(p, Image)),
                crops=self.crops,
            ),
            size_bytes=self.size_bytes,
            address=self.reply,
            arrived=arrived,
            deadline=arrived + self.deadline_s,
            topic=self.topic,
            id_given=self.id_given,
        )


@dataclass(frozen=True, slots=True)
class PartArrived:
    """A picture of a request, sent apart; or why it cannot be taken."""

    client: str
    id: str
    n: int
    part: bytes | Failure
    qos: int

    @property
    def key(self) -> Key:
        """What its request is known by."""
        return self.client, self.id


@dataclass(frozen=True, slots=True)
class CancelArrived:
    """A client wants one of its requests ended."""

    client: str
    id: str


@dataclass(frozen=True, slots=True)
class ForgetArrived:
    """A client wants one of its conversations forgotten."""

    client: str
    session: str


@dataclass(frozen=True, slots=True)
class CommandArrived:
    """An operator's command."""

    verb: str
    id: str
    command: Command | WatchCommand | ModelCommand
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


Arrival = (
    RequestArrived | PartArrived | CancelArrived | ForgetArrived | CommandArrived | ArrivalRefused
)


@dataclass(frozen=True, slots=True)
class Intake:
    """The settings by which messages are read; replaced as a whole when they are reloaded."""

    topics: Topics
    payload_bytes: int
    max_tokens: int
    deadline_ms: int
    frame_bytes: int = 12_582_912
    pictures: PictureLimits = field(default_factory=PictureLimits)
    reply_allow: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """What reads messages under these settings."""
        limits = settings.limits
        return cls(
            settings.topics,
            payload_bytes=limits.payload_bytes,
            max_tokens=limits.max_tokens,
            deadline_ms=limits.deadline_ms,
            frame_bytes=limits.frame_bytes,
            pictures=PictureLimits.of(settings.vision),
            reply_allow=settings.mqtt.reply_allow,
        )

    def read(self, inbound: Inbound) -> Arrival | None:
        """What a message means; None for a retained one, which must be ignored.

        Retained requests would be answered again at every reconnect, for ever.
        """
        if inbound.retain:
            return None
        address = self.topics.parse(inbound.topic)
        try:
            return self._arrival(inbound, address)
        except Refused as refused:
            failure = refused.failure
        except Exception as error:  # noqa: BLE001 - whatever we did not foresee in it, its sender is told
            fault = log.fault(error)
            _log.error("intake_failed", fault=fault)
            failure = Failure(Code.INTERNAL, f"a fault of ours in reading it: {fault}")
        client = address.client if address else topics.ANON
        limit = self.frame_bytes if address and address.kind == "frame" else self.payload_bytes
        request_id, reply_to = self._salvage(inbound, limit)
        request_id = request_id or _new_id()
        verb = address.verb if address and address.kind == "ctl" else None
        try:
            reply = self._reply(inbound, client, request_id, reply_to, operator=verb is not None)
        except Refused:
            reply = ReplyAddress(self.topics.res(client, request_id), inbound.correlation)
        return ArrivalRefused(client, request_id, failure, reply, verb)

    def _arrival(self, inbound: Inbound, address: Address | None) -> Arrival:
        """Raises Refused."""
        if inbound.fault is not None:
            raise Refused(Code.BAD_REQUEST, inbound.fault)
        if address is None:
            raise Refused(Code.NOT_FOUND, "no such topic: text, frame, part, cancel, ctl are here")
        if address.kind in ("text", "frame"):
            return self._request(inbound, address)
        if address.kind == "part":
            part = attachments.of_part(inbound.payload, self.pictures)
            return PartArrived(address.client, address.id, address.part, part, inbound.qos)
        if address.kind == "cancel":
            cancel = commands.decode_cancel(inbound.payload)
            if cancel.session is not None:
                return ForgetArrived(address.client, cancel.session)
            assert cancel.id is not None
            return CancelArrived(address.client, cancel.id)
        return self._command(inbound, address)

    def _salvage(self, inbound: Inbound, limit: int) -> tuple[str | None, str | None]:
        if inbound.user and _is_raw(inbound):
            named = dict(inbound.user)
            request_id = named.get("id", "")
            return request_id if topics.is_level(request_id) else None, named.get("reply_to")
        return requests.salvage(inbound.payload, limit)

    def _request(self, inbound: Inbound, address: Address) -> RequestArrived:
        if len(inbound.correlation or b"") > _MAX_CORRELATION_BYTES:
            says = f"correlation data: at most {_MAX_CORRELATION_BYTES} bytes"
            raise Refused(Code.TOO_LARGE, says)
        pictures: tuple[Picture, ...] = ()
        if address.kind == "text":
            request = requests.decode_request(inbound.payload, self.payload_bytes)
            if request.images:
                raise Refused(Code.UNSUPPORTED, "images go to in/frame", field="images")
        elif _is_raw(inbound):
            pictures = attachments.of_payload(inbound.payload, self.pictures)
            request = requests.decode_properties(inbound.user)
        else:
            request = requests.decode_request(inbound.payload, self.frame_bytes)
            pictures = attachments.of_request(request, self.pictures)
            if request.id is None and attachments.wanted(pictures):
                raise Refused(Code.BAD_REQUEST, "id: parts need one to find it by", field="id")
            # Their bytes are in `pictures` now.
            request = request.model_copy(update={"images": ()})
        if request.client not in (None, address.client):
            raise Refused(
                Code.UNAUTHORIZED, f"the topic says client {address.client}", field="client"
            )
        _check_session(request, address)
        digest = request.digest(address.kind, attachments.hashes(pictures))
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
            turns=_turns(request),
            sampling=_sampling(request),
            images=pictures,
            crops=attachments.crops_of(request.detail),
            size_bytes=len(inbound.payload),
            deadline_s=deadline_s,
            redelivered=inbound.dup,
            reply=self._reply(inbound, address.client, request_id, request.reply_to),
            inbound=inbound,
        )

    def _command(self, inbound: Inbound, address: Address) -> CommandArrived:
        command: Command | WatchCommand | ModelCommand
        match address.verb:
            case "watch":
                command = commands.decode_watch(inbound.payload)
            case "model":
                command = commands.decode_model(inbound.payload)
            case _:
                command = commands.decode_command(inbound.payload)
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
        if wanted is not None and len(wanted) > requests.MAX_TOPIC_CHARS:
            says = f"reply topic: at most {requests.MAX_TOPIC_CHARS} characters"
            raise Refused(Code.BAD_REQUEST, says, field="reply_to")
        if wanted is None:
            return ReplyAddress(self.topics.res(client, request_id), inbound.correlation)
        # Whoever may publish commands is an operator: its inbox may have any client's name.
        allow = self.reply_allow
        if operator:
            allow = (*allow, self.topics.rx("+"))
        if not self.topics.may_reply(wanted, client, allow):
            own = self.topics.rx(client), self.topics.res(client, request_id)
            says = f"reply topic: only {own[0]}, {own[1]} and what is beside them"
            raise Refused(Code.UNAUTHORIZED, says, field="reply_to")
        return ReplyAddress(wanted, inbound.correlation)


def _is_raw(inbound: Inbound) -> bool:
    return not attachments.is_json(inbound.payload)


def _check_session(request: Request, address: Address) -> None:
    """Raises Refused for a session without a client that owns it, or with pictures."""
    if request.session is None:
        return
    if address.client == topics.ANON:
        says = "session: ask on in/text/<client>: a conversation belongs to a client"
        raise Refused(Code.UNAUTHORIZED, says, field="session")
    if address.kind == "frame":
        says = "session: a conversation is of text alone"
        raise Refused(Code.UNSUPPORTED, says, field="session")


def _turns(request: Request) -> tuple[Turn, ...]:
    turns = [Turn(m.role, m.content) for m in request.messages or ()]
    if request.prompt is not None:
        turns = [Turn("user", request.prompt)]
    if request.system:
        turns.insert(0, Turn("system", request.system))
    return tuple(turns)


def _sampling(request: Request) -> Sampling:
    return Sampling(
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        seed=request.seed,
        stop=request.stop,
        schema=request.response_format.schema_text,
    )


def _new_id() -> str:
    return uuid.uuid4().hex[:20]
