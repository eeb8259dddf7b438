"""From a message of the broker to what it means."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phid.errors import Code
from phid.intake import ArrivalRefused, CancelArrived, CommandArrived, Intake, RequestArrived
from phid.topics import Topics
from phid.traffic import Inbound

TOPICS = Topics("phid/v1", "dev")
INTAKE = Intake(TOPICS, payload_bytes=10_000, max_tokens=100, deadline_ms=60_000)
TEXT = "phid/v1/dev/in/text/me"


def inbound(
    payload: object = None,
    topic: str = TEXT,
    *,
    retain: bool = False,
    dup: bool = False,
    **properties: Any,
) -> Inbound:
    if not isinstance(payload, bytes):
        payload = json.dumps(payload or {"prompt": "x"}).encode()
    return Inbound(topic, payload, qos=1, retain=retain, dup=dup, **properties)


@given(
    st.sampled_from(
        [
            TEXT,
            "phid/v1/dev/in/text",
            "phid/v1/dev/in/cancel/me",
            "phid/v1/dev/in/ctl/ping",
            "phid/v1/dev/in/frame",
            "phid/v1/dev/in/nothing",
            "phid/v1/all/in/ctl/discover",
        ]
    )
    | st.text(max_size=60),
    st.binary(max_size=60) | st.sampled_from([b'{"prompt": "x", "reply_to": "a"}', b'{"id": "i"}']),
    st.none() | st.text(max_size=40) | st.just("phid/v1/client/me/rx"),
    st.none() | st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_whatever_comes_has_a_meaning_or_an_answer_on_a_topic_that_is_allowed(
    topic: str, payload: bytes, response_topic: str | None, expiry_s: int | None, dup: bool
) -> None:
    message = inbound(
        payload, topic, response_topic=response_topic, expiry_s=expiry_s, dup=dup, correlation=b"c"
    )
    arrival = INTAKE.read(message)
    if isinstance(arrival, ArrivalRefused):
        assert arrival.failure.code is not Code.INTERNAL, arrival.failure
    assert arrival is not None
    if isinstance(arrival, CancelArrived):
        return
    assert arrival.reply.correlation == b"c"
    client = getattr(arrival, "client", "anon")
    operator = topic.startswith(("phid/v1/dev/in/ctl/", "phid/v1/all/"))
    assert TOPICS.may_reply(
        arrival.reply.topic, client, ("phid/v1/client/+/rx",) if operator else ()
    )


def test_what_is_retained_means_nothing() -> None:
    assert INTAKE.read(inbound(retain=True)) is None
    assert INTAKE.read(inbound(b"junk", retain=True)) is None


def test_a_request_is_read_with_its_way_back() -> None:
    arrival = INTAKE.read(inbound({"prompt": "x", "id": "i"}, correlation=b"c", dup=True))
    assert isinstance(arrival, RequestArrived)
    assert (arrival.client, arrival.id, arrival.id_given) == ("me", "i", True)
    assert arrival.redelivered
    assert arrival.reply.topic == "phid/v1/dev/out/res/me/i"
    assert arrival.reply.correlation == b"c"


def test_the_response_topic_wins_over_reply_to() -> None:
    payload = {"prompt": "x", "reply_to": "phid/v1/client/me/json"}
    arrival = INTAKE.read(inbound(payload, response_topic="phid/v1/client/me/rx"))
    assert isinstance(arrival, RequestArrived)
    assert arrival.reply.topic == "phid/v1/client/me/rx"


LONG = "phid/v1/client/me/" + "x" * 512


@pytest.mark.parametrize(
    ("payload", "properties", "code"),
    [
        (
            {"prompt": "x", "reply_to": LONG},
            {"response_topic": "phid/v1/client/me/rx"},
            "bad_request",
        ),
        ({"prompt": "x", "reply_to": LONG}, {}, "bad_request"),
        ({"prompt": "x"}, {"response_topic": LONG}, "bad_request"),
        ({"prompt": "x"}, {"correlation": bytes(16_385)}, "too_large"),
    ],
)
def test_nothing_long_is_kept_of_the_way_back(
    payload: object, properties: dict[str, Any], code: str
) -> None:
    arrival = INTAKE.read(inbound(payload, **properties))
    assert isinstance(arrival, ArrivalRefused)
    assert arrival.failure.code == code


@pytest.mark.parametrize(
    ("deadline_ms", "expiry_s", "deadline_s"),
    [
        (None, None, 60.0),  # the default is longer than what is allowed here
        (5000, None, 5.0),
        (5000, 3, 3.0),
        (2000, 3, 2.0),
        (10**30, None, 60.0),
        (5000, 0, 0.0),
    ],
)
def test_the_nearest_deadline_holds(
    deadline_ms: int | None, expiry_s: int | None, deadline_s: float
) -> None:
    payload = {"prompt": "x"} | ({} if deadline_ms is None else {"deadline_ms": deadline_ms})
    arrival = INTAKE.read(inbound(payload, expiry_s=expiry_s))
    assert isinstance(arrival, RequestArrived)
    assert arrival.deadline_s == deadline_s


def test_the_default_length_bows_to_the_limit_and_a_retry_is_still_the_same() -> None:
    short, long = INTAKE.read(inbound()), replace(INTAKE, max_tokens=1000).read(inbound())
    assert isinstance(short, RequestArrived)
    assert isinstance(long, RequestArrived)
    assert (short.request.max_tokens, long.request.max_tokens) == (100, 256)
    assert short.digest == long.digest


def test_without_an_id_each_reading_makes_one_up() -> None:
    first, second = INTAKE.read(inbound()), INTAKE.read(inbound())
    assert isinstance(first, RequestArrived)
    assert isinstance(second, RequestArrived)
    assert not first.id_given
    assert first.id != second.id
    assert first.reply.topic.endswith(first.id)


@pytest.mark.parametrize(
    ("payload", "code", "field"),
    [
        ({"prompt": "x", "client": "you"}, Code.UNAUTHORIZED, "client"),
        ({"prompt": "x", "max_tokens": 101}, Code.BAD_REQUEST, "max_tokens"),
        ({"prompt": "x", "reply_to": "elsewhere"}, Code.UNAUTHORIZED, "reply_to"),
        (b"x" * 10_001, Code.TOO_LARGE, None),
    ],
)
def test_what_is_refused_says_why(payload: object, code: Code, field: str | None) -> None:
    arrival = INTAKE.read(inbound(payload))
    assert isinstance(arrival, ArrivalRefused)
    assert (arrival.failure.code, arrival.failure.field) == (code, field)
    assert arrival.client == "me"


@pytest.mark.parametrize(
    "topic",
    [TEXT, "phid/v1/dev/in/frame/me", "phid/v1/dev/in/cancel/me", "phid/v1/dev/in/ctl/ping"],
)
def test_properties_that_cannot_be_read_are_told_where_those_that_can_say(topic: str) -> None:
    arrival = INTAKE.read(
        inbound({"id": "i"}, topic, response_topic="phid/v1/client/me/rx", fault="too many")
    )
    assert isinstance(arrival, ArrivalRefused)
    assert (arrival.failure.code, arrival.failure.message) == (Code.BAD_REQUEST, "too many")
    assert (arrival.id, arrival.reply.topic) == ("i", "phid/v1/client/me/rx")


def test_a_refusal_goes_where_its_payload_says_as_far_as_it_can_be_read() -> None:
    payload = {"id": "i", "reply_to": "phid/v1/client/me/rx", "oops": 1}
    arrival = INTAKE.read(inbound(payload))
    assert isinstance(arrival, ArrivalRefused)
    assert (arrival.id, arrival.reply.topic) == ("i", "phid/v1/client/me/rx")


def test_an_operator_is_answered_in_any_inbox_even_when_wrong() -> None:
    topic = "phid/v1/dev/in/ctl/ping"
    sound = INTAKE.read(inbound(b"", topic, response_topic="phid/v1/client/op/rx"))
    wrong = INTAKE.read(inbound(b"{", topic, response_topic="phid/v1/client/op/rx"))
    assert isinstance(sound, CommandArrived)
    assert isinstance(wrong, ArrivalRefused)
    assert sound.reply.topic == wrong.reply.topic == "phid/v1/client/op/rx"
    assert wrong.verb == "ping"
    stray = INTAKE.read(inbound(b"", topic, response_topic="phid/v1/dev/in/text"))
    assert isinstance(stray, ArrivalRefused)


def test_what_we_did_not_foresee_is_told_by_its_place_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def faulty(_payload: bytes) -> None:
        raise TypeError("my secret")

    monkeypatch.setattr("phid.intake.commands.decode_cancel", faulty)
    told = INTAKE.read(inbound({"id": "abc"}, "phid/v1/dev/in/cancel/me"))
    assert isinstance(told, ArrivalRefused)
    assert (told.client, told.id, told.failure.code) == ("me", "abc", Code.INTERNAL)
    assert "test_intake.py:" in told.failure.message
    assert "secret" not in told.failure.message + "".join(capsys.readouterr())
