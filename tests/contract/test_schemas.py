"""Answers held to a JSON Schema, from each runtime in a real child process."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pictures
from contract.subjects import EngineProcess, Subject, genai, scripted
from contract.test_engine import failed, finished
from contract.test_vision import HOME
from json_schema import admits, at_random
from phid.errors import Code
from phid.formats import ResponseFormat
from phid.jobs import (
    Cancel,
    Event,
    Finish,
    Finished,
    Image,
    Job,
    Load,
    Ready,
    Sampling,
    Tokens,
    Turn,
)
from wire import PATIENCE, SLOWNESS, held_to

ASK = "Tell me about a person. Answer in JSON."
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "größe": {"enum": ["klein", "groß", "日本", "😀", 'a"b\\c\n', None, 1.5]},
    },
    "required": ["name", "age", "größe"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": PERSON,
    "enum": {"enum": ["red", "green", "é", "😀😀"]},
    "array": {
        "type": "array",
        "items": {"type": "integer", "minimum": 1, "maximum": 9},
        "minItems": 2,
        "maxItems": 4,
    },
    "nested": {
        "type": "object",
        "properties": {
            "people": {"type": "array", "items": {"$ref": "#/$defs/person"}, "maxItems": 2},
            "on": {"type": "string", "format": "date"},
        },
        "required": ["people", "on"],
        "additionalProperties": False,
        "$defs": {"person": PERSON},
    },
    "choice": {"anyOf": [{"const": {"a": [1, "b"]}}, {"type": ["boolean", "null"]}]},
}
ENDLESS = {"type": "array", "items": {"type": "boolean"}, "minItems": 3000}
"""So long that every limit comes first; and on whichever token, what is there is no JSON."""


@pytest.fixture(scope="module")
def real(demo_folder: Path) -> Iterator[EngineProcess]:
    """An engine with the demo model that tests leave idle."""
    engine = EngineProcess()
    try:
        assert isinstance(engine.load(genai(demo_folder).load)[-1], Ready)
        yield engine
    finally:
        engine.close()


job = scripted().job


def schema(content: Any) -> str:
    """The text that a Job carries: what a request brings must get so far."""
    taken = ResponseFormat.model_validate(held_to(content)).schema_text
    assert taken is not None
    return taken


def answer(events: list[Event]) -> Any:
    """The value of a whole answer."""
    end = finished(events)
    assert end.finish is Finish.STOP
    return json.loads(end.text)


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_answer_is_json_that_the_schema_admits(
    shared: EngineProcess, subject: Subject, name: str
) -> None:
    held = {"schema": schema(SCHEMAS[name]), "max_tokens": 400}
    for how in ({}, *({"temperature": 1.2, "seed": seed} for seed in range(3))):
        value = answer(shared.ask(subject.job(ASK, **held, **how)))
        assert admits(SCHEMAS[name], value), value


def test_schemas_at_random_are_held_to(shared: EngineProcess, subject: Subject) -> None:
    whole = 0
    for seed in range(8):
        asked = at_random(random.Random(seed), 2)
        held = {"schema": schema(asked), "temperature": 1.0, "seed": seed, "max_tokens": 100}
        end = finished(shared.ask(subject.job(ASK, **held)))
        if end.finish is Finish.STOP:
            whole += 1
            assert admits(asked, json.loads(end.text)), (asked, end.text)
    assert whole >= 4


def test_any_object_is_json(shared: EngineProcess, subject: Subject) -> None:
    held = schema({"type": "object"})
    for seed in range(3):
        how = {"temperature": 1.0, "seed": seed, "max_tokens": 100}
        end = finished(shared.ask(subject.job(ASK, schema=held, **how)))
        assert end.text.startswith("{")
        if end.finish is Finish.STOP:
            assert isinstance(json.loads(end.text), dict)


def test_the_answer_after_it_is_text_again(shared: EngineProcess, subject: Subject) -> None:
    before = finished(shared.ask(subject.job(subject.talk(9), max_tokens=9))).text
    answer(shared.ask(subject.job(subject.talk(9), schema=schema(PERSON))))
    assert finished(shared.ask(subject.job(subject.talk(9), max_tokens=9))).text == before


def test_an_answer_cut_by_max_tokens_says_so(shared: EngineProcess, subject: Subject) -> None:
    end = finished(shared.ask(subject.job(ASK, schema=schema(ENDLESS), max_tokens=1)))
    assert (end.finish, end.usage.output_tokens) == (Finish.LENGTH, 1)
    with pytest.raises(ValueError, match="Expecting"):
        json.loads(end.text)


@pytest.mark.model
def test_a_deadline_a_cancel_and_a_stop_string_cut_it(real: EngineProcess) -> None:
    held = {"schema": schema(ENDLESS), "max_tokens": 3000}
    end = finished(real.ask(job(ASK, budget_s=4.0 * SLOWNESS, **held)))
    assert (end.finish, end.text[:1]) == (Finish.DEADLINE, "[")
    real.send(job(ASK, **held))
    events = real.until(Tokens)
    real.send(Cancel("job"))
    end = finished(events + real.until(Finished))
    assert end.finish is Finish.CANCELLED
    assert end.usage.output_tokens < 3000
    end = finished(real.ask(job(ASK, stop=(",",), **held)))
    assert (end.finish, "," in end.text) == (Finish.STOP, False)


@pytest.mark.model
def test_one_that_repeats_itself_is_cut(
    start: Callable[[], EngineProcess], demo_folder: Path
) -> None:
    subject, engine = genai(demo_folder), start()
    engine.load(replace(subject.load, loop_tokens=64))
    end = finished(engine.ask(subject.job(ASK, schema=schema(ENDLESS), max_tokens=2000)))
    assert (end.finish, end.looped) == (Finish.LENGTH, True)


@pytest.mark.parametrize(
    "unheld",
    [
        {"$ref": "#/$defs/none"},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}, "required": ["a"]},
        {"type": "quark"},
    ],
)
def test_a_schema_that_cannot_be_held_to_is_a_bad_request_before_any_work(
    shared: EngineProcess, subject: Subject, unheld: Any
) -> None:
    events = shared.ask(subject.job(ASK, schema=schema(unheld)))
    assert len(events) == 1
    end = failed(events)
    assert (end.code, end.field) == (Code.BAD_REQUEST, "response_format")
    assert end.message.startswith("response_format: the schema cannot be held to: ")
    answer(shared.ask(subject.job(ASK, schema=schema({"enum": ["still here"]}))))


REFUSED = {
    "a $ref or $schema leads nowhere": [
        {"$ref": "#/$defs/zqx"},
        {"$ref": "http://127.0.0.1:9/zqx"},
        {"$ref": "file:///etc/zqx"},
        {"$schema": "http://zqx/zqx"},
    ],
    "a type that there is not": [{"type": "zqx"}, {"type": 3}],
    "a format that is not known": [{"type": "string", "format": "zqx"}],
    "nothing satisfies it": [
        {"enum": []},
        {"type": "integer", "minimum": 2, "maximum": 1},
        {"type": "object", "properties": {"zqx": False}, "required": ["zqx"]},
    ],
    "the range of a number": [{"type": "number", "minimum": 1e308}],
    "": [
        {"properties": 3, "enum": "zqx"},
        {"type": "string", "maxLength": 1 << 40},
        {"type": "string", "minLength": "zqx"},
        {"type": "array", "minItems": -1},
        {"type": "object", "required": "zqx"},
        {"enum": [json.loads("[" * 150 + "]" * 150)]},
    ],
}


@pytest.mark.model
@pytest.mark.parametrize("says", REFUSED)
def test_what_the_runtime_refuses_is_told_without_quoting_it(
    real: EngineProcess, says: str
) -> None:
    for unheld in REFUSED[says]:
        end = failed(real.ask(job(ASK, schema=json.dumps(unheld))))
        assert (end.code, end.field) == (Code.BAD_REQUEST, "response_format"), unheld
        assert says in end.message
        assert "zqx" not in end.message
        assert "\n" not in end.message


def bombs() -> Iterator[tuple[str, dict[str, Any]]]:
    """The costliest schemas that a request may bring, as far as they were found."""
    numbers = range(200)
    yield "items", {"type": "array", "items": PERSON, "maxItems": 4096}
    yield (
        "counts",
        {"anyOf": [{"type": "array", "items": {"const": n}, "maxItems": 20} for n in numbers]},
    )
    yield "optional", {"type": "object", "properties": {f"p{n}": True for n in range(900)}}
    yield (
        "choices",
        {"anyOf": [{"type": "object", "properties": {"a": {"const": n}}} for n in range(280)]},
    )
    yield (
        "lengths",
        {"anyOf": [{"type": "string", "minLength": n, "maxLength": 1000 + n} for n in numbers]},
    )
    yield (
        "ranges",
        {
            "anyOf": [
                {"type": "number", "minimum": n + 0.123456789, "maximum": 10**15 + n}
                for n in numbers
            ]
        },
    )
    yield (
        "doubled",
        {
            "$defs": {"d0": {"type": "string"}}
            | {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n - 1}"}] * 10} for n in range(1, 50)},
            "$ref": "#/$defs/d49",
        },
    )
    node = {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/n"}}] * 200}
    yield "ambiguous", {"$defs": {"n": node}, "$ref": "#/$defs/n"}
    yield "words", {"enum": [f"{n:x}" for n in range(2000)]}
    yield (
        "loop",
        {
            "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
            "$ref": "#/$defs/a",
        },
    )


@pytest.mark.model
def test_a_schema_bomb_is_answered_or_refused_and_stalls_nothing(real: EngineProcess) -> None:
    for name, bomb in bombs():
        began = time.monotonic()
        end = real.ask(job(ASK, schema=schema(bomb), max_tokens=8))[-1]
        # The prompt and eight tokens take a tenth of a second without a schema.
        assert time.monotonic() - began < 3 * PATIENCE, name
        assert isinstance(end, Finished) or end.code is Code.BAD_REQUEST, (name, end)
    answer(real.ask(job(ASK, schema=schema({"enum": ["still here"]}))))


@pytest.mark.model
def test_a_vision_model_says_what_it_sees_in_json(start: Callable[[], EngineProcess]) -> None:
    engine = start()
    engine.load(Load("genai", "tiny", str(HOME)))
    scene = Image(pictures.jpeg())
    held = schema(
        {
            "type": "object",
            "properties": {
                "color": {"enum": ["red", "green", "blue"]},
                "seen": {"type": "boolean"},
            },
            "required": ["color", "seen"],
            "additionalProperties": False,
        }
    )
    for how in ({}, {"temperature": 1.0, "seed": 1}):
        sampling = Sampling(max_tokens=60, schema=held, **how)  # type: ignore[arg-type]
        for images in ((scene,), ()):
            asked = Job("j", (Turn("user", "What is there?"),), sampling, images=images)
            assert admits(json.loads(held), answer(engine.ask(asked)))
    unheld = Sampling(schema=schema({"$ref": "#/$defs/none"}))
    asked = Job("j", (Turn("user", "What is there?"),), unheld, images=(scene,))
    assert failed(engine.ask(asked)).field == "response_format"
