"""What is to be published: kept until the broker has it, within a window, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from pydantic import BaseModel

from phid import log, messages
from phid.errors import Code, Failure
from phid.ledger import ReplyAddress
from phid.messages import CtlReply, ErrorMessage, Outcome, Result
from phid.traffic import Connected, Decision, Link, Sent

# What a PUBLISH packet has beyond topic and payload, generously: fixed header and properties.
_PACKET_OVERHEAD = 128
# At most so many QoS 0 messages may sit unwritten in paho: it has no bound of its own.
_MAX_UNWRITTEN = 32
# When so many publications wait, a new one is dropped if it is
# - a report;
# - an answer, but for outcomes and the two below;
# - an answer that holds back its request's acknowledgement: while it waits, a broker that minds our
#   Receive Maximum brings no more requests (mosquitto 2.0.11 goes far beyond);
# - an answer to a command.
_MAX_REPORTS, _MAX_ANSWERS, _MAX_OWED, _MAX_COMMANDS = 1024, 2048, 4096, 4608
# While so many outcomes wait nothing new is accepted: outcomes are never dropped.
_FULL = 1024
_log = log.get("outbox")


@dataclass(frozen=True, slots=True)
class Publication:
    """A QoS 1 message on its way out.

    `outcome`: it is never dropped, and marked as a duplicate when sent again; anything else is
    forgotten with the connection it was sent on. `answer`: somebody waits for it. `number`: the
    journal wants to know when the broker has it. `decided` belongs to the message that it answers,
    where that may be acknowledged only once this is on its way.
    """

    topic: str
    message: BaseModel | bytes
    correlation: bytes | None = None
    retain: bool = False
    expiry_s: int | None = None
    outcome: bool = False
    answer: bool = False
    sent_before: bool = False
    number: int | None = None
    decided: Decision | None = None


class Outbox:
    """Sends what is put into it; the owner thread's own, and never waits.

    `on_told` is called with the number of each publication that had one and is done with.
    """

    def __init__(self, on_told: Callable[[int], None] = lambda _: None) -> None:
        self.on_told = on_told
        self._link: Link | None = None
        self._window = 0
        self._packet_bytes = 0
        self._waiting: deque[Publication] = deque()
        self._outcomes = 0  # of those that wait
        self._in_flight: dict[int, Publication] = {}
        self._unwritten: set[int] = set()
        self.dropped = 0
        self.refused = 0

    def __len__(self) -> int:
        return len(self._waiting) + len(self._in_flight)

    @property
    def connected(self) -> bool:
        """True while there is a link to publish on."""
        return self._link is not None

    @property
    def congested(self) -> bool:
        """True while QoS 0 messages would only pile up: nobody, or too slow a broker, reads."""
        return self._link is None or len(self._unwritten) >= _MAX_UNWRITTEN

    @property
    def full(self) -> bool:
        """True while too many outcomes wait for the broker: nothing new is to be promised."""
        return self._outcomes >= _FULL

    def connect(self, connected: Connected) -> None:
        """Publish on this link from now on, beginning with what is still owed."""
        self._link = connected.link
        self._window = connected.window
        self._packet_bytes = connected.packet_bytes
        self._flush()

    def disconnect(self) -> None:
        """Keep the outcomes that are not acknowledged; those in flight are sent again, marked."""
        self._link = None
        self._unwritten.clear()
        before = len(self)
        owed = [replace(p, sent_before=True) for p in self._in_flight.values() if p.outcome]
        self._in_flight.clear()
        self._waiting = deque([*owed, *(p for p in self._waiting if p.outcome)])
        self._outcomes = len(self._waiting)
        self.dropped += before - self._outcomes

    def put(self, publication: Publication) -> None:
        """Publish at QoS 1 when the window allows. Without a link only answers are kept.

        Requests that the broker kept for us may be answered before it says that we are subscribed.
        """
        if not publication.outcome and (
            len(self._waiting) >= _most_waiting(publication)
            or not (self._link or publication.answer)
        ):
            self.dropped += 1
            return
        self._waiting.append(publication)
        self._outcomes += publication.outcome
        if publication.decided is not None:
            publication.decided.owed = True
        self._flush()

    def answer(
        self,
        address: ReplyAddress,
        message: BaseModel,
        number: int | None = None,
        *,
        sent_before: bool = False,
    ) -> None:
        """Publish a message to whoever asked; `sent_before` marks an outcome as a duplicate."""
        outcome = isinstance(message, Result | ErrorMessage)
        self.put(
            Publication(
                address.topic,
                message,
                address.correlation,
                outcome=outcome,
                answer=True,
                sent_before=sent_before,
                number=number,
            )
        )

    def refuse(
        self, address: ReplyAddress, message: ErrorMessage, decided: Decision | None = None
    ) -> None:
        """Publish why something was not accepted: an answer, but one that a flood may lose.

        A broken link loses the request's acknowledgement too: the broker sends it again.
        """
        self._put_in_front(Publication(address.topic, message, address.correlation), decided)

    def repeat(
        self, address: ReplyAddress, outcome: Outcome, decided: Decision | None = None
    ) -> None:
        """Publish an outcome again for whoever asks again; like a refusal, it may be lost."""
        self._put_in_front(Publication(address.topic, outcome, address.correlation), decided)

    def _put_in_front(self, publication: Publication, decided: Decision | None) -> None:
        """Publish an answer that may be lost; its request is acknowledged only behind it."""
        decided = decided if decided is not None and decided.awaited else None
        self.put(replace(publication, answer=True, decided=decided))

    def send_now(
        self, topic: str, message: BaseModel | bytes, correlation: bytes | None = None
    ) -> bool:
        """Publish at QoS 0: True. False, and dropped, when congested or too large."""
        if self._link is None or self.congested:
            return False
        payload = message if isinstance(message, bytes) else messages.encode(message)
        if not self._fits(topic, payload, correlation):
            return False
        # on_publish comes for QoS 0 too, once the socket has taken it; never before this returns
        # to the owner's loop, for it comes through the mailbox.
        self._unwritten.add(self._link.publish(topic, payload, qos=0, correlation=correlation))
        return True

    def sent(self, event: Sent) -> None:
        """The broker has one (QoS 1) or the socket has (QoS 0): send the next."""
        if self._link is None or event.session != self._link.session:
            return
        self._unwritten.discard(event.mid)
        publication = self._in_flight.pop(event.mid, None)
        if publication is None:
            return
        if event.refusal is not None:
            _log.error("publish_refused", topic=publication.topic, reason=event.refusal)
            self.refused += 1
        self._done(publication)
        self._flush()

    def _flush(self) -> None:
        while self._link is not None and self._waiting and len(self._in_flight) < self._window:
            publication = self._waiting.popleft()
            self._outcomes -= publication.outcome
            payload = self._payload(publication)
            if payload is None:
                self._done(publication)
                _release(publication)
                continue
            mid = self._link.publish(
                publication.topic,
                payload,
                qos=1,
                retain=publication.retain,
                correlation=publication.correlation,
                expiry_s=publication.expiry_s,
                user=_user_properties(publication.message),
            )
            self._in_flight[mid] = publication
            _release(publication)

    def _done(self, publication: Publication) -> None:
        if publication.number is not None:
            self.on_told(publication.number)

    def _payload(self, publication: Publication) -> bytes | None:
        message = publication.message
        if publication.sent_before and isinstance(message, Result | ErrorMessage):
            message = message.model_copy(update={"duplicate": True})
        payload = message if isinstance(message, bytes) else messages.encode(message)
        if self._fits(publication.topic, payload, publication.correlation):
            return payload
        # One QoS 1 message over the broker's limit would be refused and sent again for ever.
        _log.warning("message_too_large", topic=publication.topic, bytes=len(payload))
        request_id = getattr(message, "id", None)
        if request_id is not None:
            says = f"the answer has {len(payload)} bytes: the broker takes {self._packet_bytes}"
            error = messages.error_message(request_id, Failure(Code.TOO_LARGE, says))
            payload = messages.encode(error)
            if self._fits(publication.topic, payload, publication.correlation):
                return payload
        self.dropped += 1
        return None

    def _fits(self, topic: str, payload: bytes, correlation: bytes | None) -> bool:
        size = len(topic.encode()) + len(payload) + len(correlation or b"") + _PACKET_OVERHEAD
        return size <= self._packet_bytes


def _most_waiting(publication: Publication) -> int:
    if isinstance(publication.message, CtlReply):
        return _MAX_COMMANDS
    if publication.decided is not None:
        return _MAX_OWED
    return _MAX_ANSWERS if publication.answer else _MAX_REPORTS


def _release(publication: Publication) -> None:
    """Let what it answers be acknowledged: the acknowledgement is written behind it."""
    if publication.decided is not None:
        publication.decided.owed = False


def _user_properties(message: BaseModel | bytes) -> list[tuple[str, str]]:
    """The error's status, for clients that route by it without reading JSON."""
    if isinstance(message, ErrorMessage):
        return [("code", message.code), ("status", str(message.status))]
    return []
