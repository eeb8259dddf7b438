"""Every decoder but that of pictures: what it may raise, and what must hold of what it gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from structlog.testing import capture_logs

from fuzzer.source import LIMIT_BYTES, Source
from phid import attachments, commands, messages, requests, settings, topics, watches
from phid.attachments import PictureLimits
from phid.errors import Code, Refused
from phid.fleet import Fleet, table
from phid.intake import (
    ArrivalRefused,
    CancelArrived,
    CommandArrived,
    ForgetArrived,
    Intake,
    RequestArrived,
)
from phid.roster import Notebook, Roster
from phid.sections import Mqtt
from phid.session import Protocols
from phid.settings import Settings, SettingsError
from phid.topics import Topics
from phid.traffic import Endpoint, Inbound

MAX_ERROR_BYTES = 2000


# How often each of them has its turn, by weight.
SHARES = {
    "intake": 30,
    "request": 30,
    "salvage": 6,
    "frame": 15,
    "cancel": 5,
    "command": 7,
    "answer": 7,
    "topic": 7,
    "fleet": 4,
    "settings": 4,
    "watch": 6,
    "model": 3,
    "picture": 6,
    "state": 3,
}
# A large one takes as long as a thousand others.
LARGE_EVERY = 2000


class Decoders:
    """Every decoder, with what it may raise and what must hold of what it returns."""

    def __init__(self, source: Source, folder: Path) -> None:
        self._source = source
        self._file = folder / "phid.toml"
        self._memory = folder / "state.json"
        self._topics = Topics("phid/v1", "porch")
        self._intake = Intake(
            self._topics,
            payload_bytes=LIMIT_BYTES,
            max_tokens=4096,
            deadline_ms=3_600_000,
            reply_allow=("site/+/answers/#",),
        )

    def cases(self) -> dict[str, tuple[Callable[[], Any], Callable[[Any], bool]]]:
        """By name: makes an input; decodes it, True if it was taken. Any exception is an escape."""
        source = self._source
        return {
            "intake": (source.inbound, self._inbound),
            "frame": (source.frame, self._inbound),
            "request": (source.payload, self._taken(self._request)),
            "salvage": (source.payload, self._salvage),
            "cancel": (source.payload, self._taken(commands.decode_cancel)),
            "command": (source.payload, self._taken(commands.decode_command)),
            "answer": (source.answer, self._answer),
            "topic": (source.topic, self._topic),
            "fleet": (source.inbound, self._fleet),
            "settings": (source.toml, self._settings),
            "watch": (source.watch, self._taken(self._watch)),
            "model": (source.model, self._taken(commands.decode_model)),
            "picture": (
                source.picture,
                self._taken(lambda payload: attachments.of_camera(payload, PictureLimits())),
            ),
            "state": (source.state, self._state),
            "large": (source.large, self._large),
        }

    def _taken(self, decode: Callable[[bytes], object]) -> Callable[[bytes], bool]:
        """Whether this takes a payload; what it refuses, it must be able to tell."""

        def taken(payload: bytes) -> bool:
            try:
                decode(payload)
            except Refused as refused:
                return self._told(refused)
            return True

        return taken

    @staticmethod
    def _request(payload: bytes) -> None:
        request = requests.decode_request(payload, LIMIT_BYTES)
        digest = request.digest("text")
        again = requests.decode_request(messages.encode(request), 2 * LIMIT_BYTES)
        assert again.digest("text") == digest, "another digest after a round trip"

    def _salvage(self, payload: bytes) -> bool:
        request_id, _ = requests.salvage(payload, LIMIT_BYTES)
        assert request_id is None or topics.is_level(request_id)
        return request_id is not None

    def _answer(self, payload: bytes) -> bool:
        try:
            answer = messages.decode_answer(payload)
        except ValueError:
            return False
        messages.encode(answer)
        return True

    def _topic(self, topic: str) -> bool:
        address = self._topics.parse(topic)
        assert address is None or topics.is_level(address.client)
        self._topics.may_reply(topic, "me", ("+/#",))
        return address is not None

    def _inbound(self, inbound: Inbound) -> bool:
        arrival = self._intake.read(inbound)
        match arrival:
            case None:
                assert inbound.retain
                return False
            case CancelArrived():
                return True
            case ForgetArrived(_, session):
                assert topics.is_level(session)
                return True
            case ArrivalRefused():
                assert arrival.failure.code is not Code.INTERNAL, arrival.failure.message
                messages.encode(messages.error_message(arrival.id, arrival.failure))
            case RequestArrived():
                assert 0 <= arrival.deadline_s <= 3600
            case CommandArrived():
                pass
        assert topics.is_level(arrival.id)
        assert topics.is_publishable(arrival.reply.topic), arrival.reply.topic
        return not isinstance(arrival, ArrivalRefused)

    def _fleet(self, inbound: Inbound) -> bool:
        """What phid fleet hears and prints: anybody may have published it."""
        fleet = Fleet("phid/v1")
        for out in ("status", "info", "health"):
            fleet.take(Inbound(f"phid/v1/porch/out/{out}", inbound.payload, 0, False, False))
        fleet.take(inbound)
        assert len(table(fleet).splitlines()) <= 2, "a line break in a cell"
        return bool(fleet.devices())

    def _settings(self, text: str) -> bool:
        self._file.write_text(text, "utf-8")
        try:
            loaded = settings.load(self._file)
        except SettingsError:
            return False
        assert isinstance(loaded, Settings)
        return True

    @staticmethod
    def _watch(payload: bytes) -> None:
        told = commands.decode_watch(payload)
        watch = watches.merged(None, {**told.definition, "name": told.name})
        watches.check(watch, "phid/v1", 4)
        assert topics.is_filter(watch.topic)

    def _state(self, data: bytes) -> bool:
        """What an earlier run left: taken, or set aside beside."""
        self._memory.write_bytes(data)
        with capture_logs():
            roster = Roster(Notebook(self._memory), "phid/v1")
            roster.configure((), 4)
            taken = bool(roster.all) or bool(roster.filters)
            self._memory.write_bytes(data)
            Protocols(Endpoint(Mqtt(host="h"), "me", ()), self._memory, lambda: 1e9).choose()
        for aside in self._memory.parent.glob(f"{self._memory.name}.*.bad"):
            aside.unlink()
        return taken

    def _large(self, payload: bytes) -> bool:
        return self._inbound(
            Inbound("phid/v1/porch/in/text/me", payload, 1, retain=False, dup=False)
        )

    @staticmethod
    def _told(refused: Refused) -> bool:
        said = messages.encode(messages.error_message("a1", refused.failure))
        assert len(said) <= MAX_ERROR_BYTES, "an error echoes what it was sent"
        return False
