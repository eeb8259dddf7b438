"""The words of the wire: nothing that is sent to us can do more than be refused."""

from __future__ import annotations

import contextlib
import json
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phid import commands, messages, requests, topics
from phid.errors import Code, Failure, Refused
from phid.requests import Request
from wire import SLOWNESS

LIMIT = 1_048_576
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
objects = st.dictionaries(
    st.sampled_from([*Request.model_fields, "max_token", "x"]), json_values, max_size=8
)
payloads = (
    st.binary(max_size=200)
    | json_values.map(lambda v: json.dumps(v).encode())
    | objects.map(lambda v: json.dumps(v).encode())
    | objects.map(lambda v: json.dumps(v, ensure_ascii=False).encode("utf-8", "surrogatepass"))
)


def decode(payload: bytes) -> Request | Failure:
    try:
        return requests.decode_request(payload, LIMIT)
    except Refused as refused:
        return refused.failure


@settings(max_examples=400)
@given(payloads)
def test_a_request_is_decoded_or_refused_and_never_more(payload: bytes) -> None:
    decoded = decode(payload)
    if isinstance(decoded, Failure):
        assert decoded.code in (Code.BAD_REQUEST, Code.UNSUPPORTED)
        assert decoded.message
        assert len(messages.encode(messages.error_message("i", decoded))) < 2000
    else:
        assert (decoded.prompt is None) != (decoded.messages is None)
        assert len(decoded.digest("text")) == 64
        json.loads(json.dumps(decoded.tags, allow_nan=False))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"stop": 5}, 'stop: must be an array, not a number: such as ["\\n","END"]'),
        ({"stop": "END"}, 'stop: must be an array, not text: such as ["\\n","END"]'),
        ({"stop": [None]}, "stop.0: must be text, not null"),
        ({"stop": [""]}, "stop.0: must have at least 1 characters"),
        ({"stop": ["x"] * 9}, "stop: must have at most 8 items"),
        ({"temperature": "hot"}, "temperature: must be a number, not text"),
        ({"temperature": 3}, "temperature: must be 2 or less"),
        ({"top_p": 0}, "top_p: must be more than 0"),
        ({"top_k": 1.5}, "top_k: must be a whole number, not a fraction"),
        ({"max_tokens": 0}, "max_tokens: must be 1 or more"),
        ({"seed": True}, "seed: must be a whole number, not true or false"),
        ({"stream": True}, "stream: must be 'none' or 'delta'"),
        ({"format": "json"}, "unknown field 'format': here it is response_format"),
        (
            {"response_format": "json"},
            'response_format: must be an object, not text: such as {"type":"json_object"}',
        ),
        ({"prompt": {}}, "prompt: must be text, not an object"),
        (
            {"images": "x"},
            'images: must be an array, not text: such as [{"b64":"..."}]',
        ),
        (
            {"tools": []},
            "unknown field 'tools': answers are text, or JSON by response_format, in this version",
        ),
        ({"stream_options": {}}, "unknown field 'stream_options': every result has its usage"),
        ({"max_new_tokens": 5}, "unknown field 'max_new_tokens': here it is max_tokens"),
        (
            {"images": [{"url": "http://x/"}]},
            "unknown field 'images.0.url': nothing is fetched: " + requests._PICTURE,
        ),
        ({"nonsense": 1}, "unknown field 'nonsense'"),
    ],
)
def test_a_mistake_is_told_with_what_is_taken(fields: dict[str, Any], says: str) -> None:
    failure = decode(json.dumps({"prompt": "x"} | fields).encode())
    assert isinstance(failure, Failure)
    assert failure.message == says


def test_a_property_that_is_no_number_is_told_so() -> None:
    with pytest.raises(Refused, match=r"^temperature: must be a number$"):
        requests.decode_properties((("prompt", "x"), ("temperature", "hot")))


@settings(max_examples=200)
@given(payloads)
def test_cancels_and_commands_are_decoded_or_refused(payload: bytes) -> None:
    for decoder in (commands.decode_cancel, commands.decode_command):
        with contextlib.suppress(Refused):
            decoder(payload)


@settings(max_examples=400)
@given(payloads)
def test_salvage_takes_anything_and_gives_only_sound_ids(payload: bytes) -> None:
    request_id, reply_to = requests.salvage(payload, LIMIT)
    assert request_id is None or topics.is_level(request_id)
    assert reply_to is None or isinstance(reply_to, str)


@pytest.mark.parametrize("payload", [b"{", b"\xff", b"[" * 5000, b'{"id":' + b"9" * 10_000 + b"}"])
def test_salvage_takes_these_too(payload: bytes) -> None:
    assert requests.salvage(payload, LIMIT) == (None, None)
    assert requests.salvage(b'{"id": "x"}', 5) == (None, None)


def full(**fields: Any) -> bytes:
    return json.dumps({"prompt": "x", **fields}).encode()


@pytest.mark.parametrize(
    "payload",
    [
        json.dumps({f"k{n}": n for n in range(60_000)}).encode(),
        full(tags={f"k{n}": [] for n in range(60_000)}),
        full(stop=[1] * 300_000),
        json.dumps({"messages": [1] * 300_000}).encode(),
        json.dumps({"messages": [{"role": "user", "content": ""}] * 25_000}).encode(),
        b"[" * LIMIT,
        full(max_tokens=0)[:-1] + b', "x": ' + b"9" * 1_000_000 + b"}",
    ],
    ids=["fields", "tags", "stops", "messages", "empty turns", "depth", "digits"],
)
def test_a_megabyte_of_mistakes_is_refused_in_no_time(payload: bytes) -> None:
    """Decoding holds the interpreter: what it takes is taken from every other thread."""
    assert len(payload) <= LIMIT
    taken = []
    for _ in range(3):
        began = time.thread_time()
        assert isinstance(decode(payload), Failure)
        taken.append(time.thread_time() - began)
    assert min(taken) < 0.3 * SLOWNESS


def test_a_field_with_a_name_of_a_megabyte_takes_no_memory_to_compare() -> None:
    tracemalloc.start()
    try:
        failure = decode(full(**{"x" * 1_000_000: 1}))
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(failure, Failure)
    assert "unknown field" in failure.message
    assert most_bytes < 20e6


def test_an_unknown_field_is_named_with_the_nearest() -> None:
    failure = decode(full(temprature=1, max_tokens=0))
    assert isinstance(failure, Failure)
    assert failure.field == "temprature"
    assert "did you mean temperature" in failure.message


@pytest.mark.parametrize("detail", [0, 17, 99, -1, 1.5, 1.0, True, None, "4", "medium", "", []])
def test_a_wrong_detail_is_told_by_its_name_and_with_what_it_may_be(detail: object) -> None:
    payload = json.dumps({"prompt": "x", "detail": detail}).encode()
    with pytest.raises(Refused, match=r"^detail: must be low, auto, high or 1 to 16") as refused:
        requests.decode_request(payload, 1000)
    assert refused.value.failure.field == "detail"


def test_every_plain_field_can_be_a_property() -> None:
    fields = {
        "v": "1",
        "id": "i",
        "client": "c",
        "prompt": "x",
        "system": "s",
        "model": "m",
        "max_tokens": "5",
        "temperature": "0.5",
        "top_p": "0.9",
        "top_k": "40",
        "seed": "7",
        "stop": "end",
        "stream": "delta",
        "deadline_ms": "1000",
        "priority": "9",
        "reply_to": "t",
        "detail": "4",
    }
    others = {"messages", "images", "tags", "response_format", "session"}
    assert fields.keys() | others == Request.model_fields.keys()
    request = requests.decode_properties(tuple(fields.items()))
    assert (request.v, request.max_tokens, request.detail) == (1, 5, 4)
    with pytest.raises(Refused, match=r"^v: "):
        requests.decode_properties((("prompt", "x"), ("v", "2")))


def test_a_thousand_wrong_properties_are_refused_in_no_time() -> None:
    began = time.thread_time()
    with pytest.raises(Refused, match="more than 100 mistakes"):
        requests.decode_properties(tuple((f"k{n}", "x") for n in range(1000)))
    assert time.thread_time() - began < 0.1 * SLOWNESS


def test_the_digest_is_of_what_is_asked_and_not_of_the_way_back() -> None:
    def digest(**fields: Any) -> str:
        request = decode(full(**fields))
        assert isinstance(request, Request)
        return request.digest("text")

    alike = [
        digest(),
        digest(id="i"),
        digest(client="c"),
        digest(deadline_ms=5),
        digest(reply_to="t"),
        digest(max_tokens=256, temperature=0, stream="none", system=None),
    ]
    assert len(set(alike)) == 1
    different = [
        alike[0],
        digest(prompt="y"),
        digest(system="s"),
        digest(max_tokens=1),
        digest(temperature=1),
        digest(seed=1),
        digest(stop=["s"]),
        digest(stream="delta"),
    ]
    assert len(set(different)) == len(different)


def test_every_code_has_a_status_and_comes_through() -> None:
    for code in Code:
        message = messages.error_message("i", Failure(code, "why", field="f", retry_after_ms=5))
        told = json.loads(messages.encode(message))
        assert told["status"] == code.status
        assert messages.decode_answer(messages.encode(message)) == message
        assert "text" not in told
        assert "duplicate" not in told


def test_what_is_no_answer_is_a_value_error() -> None:
    for payload in (b"", b"{}", b"[]", b'{"type": "gossip"}', b"\xff"):
        with pytest.raises(ValueError):  # noqa: PT011 - pydantic's own words
            messages.decode_answer(payload)


def test_an_answer_of_a_later_version_is_understood() -> None:
    payload = b'{"type": "delta", "id": "i", "seq": 0, "text": "x", "mood": "fine"}'
    assert messages.decode_answer(payload) == messages.Delta(id="i", seq=0, text="x")
