"""Which shapes of an answer can be asked for, and which schemas are refused at the edge."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from phid import findings, requests, watches
from phid.errors import Code, Refused
from phid.formats import MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH, MAX_SCHEMA_ITEMS
from phid.jobs import Sampling
from phid.requests import Request
from phid.settings import Settings
from phid.watches import Watch
from wire import SLOWNESS, held_to

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def request(response_format: Any) -> Request:
    payload = json.dumps({"prompt": "x", "response_format": response_format})
    return requests.decode_request(payload.encode(), 1 << 20)


def refused(response_format: Any) -> str:
    with pytest.raises(Refused) as error:
        request(response_format)
    failure = error.value.failure
    assert failure.code is Code.BAD_REQUEST
    assert (failure.field or "").startswith("response_format")
    return failure.message.removeprefix("response_format.json_schema.schema: ")


def within(schema: Any, times: int) -> dict[str, Any]:
    for _ in range(times):
        schema = {"type": "array", "items": schema}
    return dict(schema)


def test_each_type_says_what_the_answer_is_held_to() -> None:
    assert Request(prompt="x").response_format.schema_text is None
    assert request({"type": "text"}).response_format.schema_text is None
    assert request({"type": "json_object"}).response_format.schema_text == '{"type":"object"}'
    asked = held_to(CITY)
    asked["json_schema"] |= {"strict": True, "description": "where"}
    assert json.loads(request(asked).response_format.schema_text or "") == CITY


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object", "properties": {}, "additionalProperties": {"type": "integer"}},
        {"$defs": {"node": {"type": "array", "items": {"$ref": "#/$defs/node"}}}, "$ref": "#"},
        {"anyOf": [{"type": "string", "format": "date"}, {"const": None}], "title": "a day"},
        {"type": "array", "prefixItems": [True, {"enum": [1, "two"]}], "maxItems": 2},
        {"type": "object", "properties": {"pattern": True, "anyOf": {"type": "null"}}},
        {"enum": [{"pattern": "x", "minItems": 1 << 70}]},
        within({}, MAX_SCHEMA_DEPTH - 1),
        {"type": "array", "minItems": 1000, "maxItems": MAX_SCHEMA_ITEMS - 1000},
    ],
)
def test_a_schema_of_the_subset_is_taken(schema: dict[str, Any]) -> None:
    assert json.loads(request(held_to(schema)).response_format.schema_text or "") == schema


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "string", "pattern": "a\\\\b"}, "the keyword 'pattern' is not supported"),
        ({"not": {}}, "the keyword 'not' is not supported"),
        ({"x-guidance": {}}, "the keyword 'x-guidance' is not supported"),
        (within({"allOf": [True]}, 9), "the keyword 'allOf' is not supported"),
        ({"properties": {"a": {"multipleOf": 3}}}, "the keyword 'multipleOf' is not supported"),
        ({"anyOf": [{}], "type": "object"}, "anyOf stands alone in a schema"),
        ({"$ref": "#", "maxLength": 3}, "$ref stands alone in a schema"),
        ({"$ref": "#", "anyOf": [{}]}, "$ref stands alone in a schema"),
        ({"properties": {"a": 3}}, "a schema is an object, true or false"),
        ({"properties": [CITY]}, "properties is an object of schemas"),
        ({"anyOf": CITY}, "anyOf is an array of schemas"),
        ({"items": [CITY]}, "a schema is an object, true or false"),
        ({"enum": [float("inf")]}, "must not contain NaN or Infinity"),
        (within({}, MAX_SCHEMA_DEPTH), "at most 32 schemas within each other"),
        ({"description": "x" * MAX_SCHEMA_BYTES}, "at most 16384 bytes, and these are 16402"),
        (
            {"type": "array", "minItems": 1, "maxItems": MAX_SCHEMA_ITEMS},
            "items and properties: at most 4096 counted altogether",
        ),
        (
            within({"type": "object", "minProperties": 1 << 62}, 3),
            "items and properties: at most 4096 counted altogether",
        ),
    ],
)
def test_what_could_stall_the_engine_is_refused_with_its_reason(schema: Any, says: str) -> None:
    assert refused(held_to(schema)) == says


def test_a_format_that_is_none_is_refused() -> None:
    assert "'json_object'" in refused({"type": "yaml"})
    assert "goes with type json_schema" in refused({"type": "json_schema"})
    assert "goes with type json_schema" in refused(held_to({}) | {"type": "text"})
    assert "unknown field" in refused({"type": "text", "schema": {}})
    assert refused(held_to("x"))
    assert refused({"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}})


def test_the_largest_payload_of_a_schema_is_refused_in_no_time() -> None:
    bombs: list[Any] = [
        {"enum": ["v"] * 200_000},
        {"anyOf": [{"type": "string"}] * 60_000},
        {"properties": {f"p{n}": True for n in range(60_000)}},
    ]
    for bomb in bombs:
        payload = json.dumps({"prompt": "x", "response_format": held_to(bomb)}).encode()
        began = time.thread_time()
        with pytest.raises(Refused):
            requests.decode_request(payload, 1 << 21)
        assert time.thread_time() - began < 0.3 * SLOWNESS


def test_a_schema_nested_deeper_than_json_goes_is_refused() -> None:
    deep = b'{"items":' * 5000 + b"{}" + b"}" * 5000
    payload = json.dumps({"prompt": "x", "response_format": held_to("@")}).encode()
    with pytest.raises(Refused):
        requests.decode_request(payload.replace(b'"@"', deep), 1 << 20)


def test_a_raw_frame_brings_it_as_a_property_in_json() -> None:
    named = ("response_format", json.dumps(held_to(CITY)))
    read = requests.decode_properties((("prompt", "x"), named))
    assert read == request(held_to(CITY))
    with pytest.raises(Refused, match="response_format: must be JSON"):
        requests.decode_properties((("prompt", "x"), ("response_format", "{")))


def test_the_digest_is_the_same_without_it_and_with_its_default() -> None:
    plain = Request(prompt="x").digest("text")
    assert request({"type": "text"}).digest("text") == plain
    assert request(held_to(CITY)).digest("text") not in {plain, request(held_to({})).digest("text")}


def test_a_watch_has_one_and_keeps_it_where_another_field_changes() -> None:
    fields = {"name": "yard", "topic": "cam/+", "prompt": "What is there?"}
    watch = watches.merged(None, {**fields, "response_format": held_to(CITY), "min_change_pct": 3})
    changed = watches.merged(watch, {"max_tokens": 9})
    assert changed.response_format == watch.response_format
    assert Watch.model_validate(watch.model_dump(exclude_defaults=True), strict=True) == watch
    job = findings.job("w1", changed, "cam/a", (), 4096)
    assert job.sampling == Sampling(max_tokens=9, schema=json.dumps(CITY))
    assert job.gate != findings.job("w1", watch, "cam/a", (), 4096).gate
    with pytest.raises(Refused) as error:
        watches.merged(watch, {"response_format": held_to({"pattern": "x"})})
    assert error.value.failure.field == "response_format"


def test_a_watch_of_the_settings_has_one() -> None:
    watch = {"name": "yard", "topic": "cam/+", "prompt": "?", "response_format": held_to(CITY)}
    (read,) = Settings(device="dut", watches=[watch]).watches
    assert json.loads(read.response_format.schema_text or "") == CITY
