"""JSON Schema as `phid.formats` takes it: whether a value satisfies one, and schemas at random."""

from __future__ import annotations

import random
from typing import Any

TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "number": (int, float),
    "integer": int,
}


def admits(schema: Any, value: Any, whole: Any = None) -> bool:
    """Whether the value satisfies the schema; `format` is not looked at."""
    whole = schema if whole is None else whole
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema:
        place = whole
        for level in schema["$ref"].removeprefix("#/").split("/"):
            place = place[level]
        return admits(place, value, whole)
    if "anyOf" in schema:
        return any(admits(choice, value, whole) for choice in schema["anyOf"])
    kinds = schema.get("type", list(TYPES))
    one_of = [schema["const"]] if "const" in schema else schema.get("enum", [value])
    return (
        any(_is(kind, value) for kind in ([kinds] if isinstance(kinds, str) else kinds))
        and any(_same(choice, value) for choice in one_of)
        and _admits_parts(schema, value, whole)
    )


def _admits_parts(schema: dict[str, Any], value: Any, whole: Any) -> bool:
    match value:
        case dict():
            named, others = schema.get("properties", {}), schema.get("additionalProperties", True)
            return (
                set(schema.get("required", ())) <= value.keys()
                and _within(schema, "Properties", len(value))
                and all(admits(named.get(key, others), item, whole) for key, item in value.items())
            )
        case list():
            first = schema.get("prefixItems", [])
            return _within(schema, "Items", len(value)) and all(
                admits(first[n] if n < len(first) else schema.get("items", True), item, whole)
                for n, item in enumerate(value)
            )
        case str():
            return _within(schema, "Length", len(value))
        case bool() | None:
            return True
    return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value))


def _within(schema: dict[str, Any], what: str, count: int) -> bool:
    return schema.get(f"min{what}", 0) <= count <= schema.get(f"max{what}", count)


def _is(kind: str, value: Any) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, TYPES[kind])


def _same(one: Any, other: Any) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)


WORDS = ["a", "b1", "größe", "日本", "😀", 'q"u', "back\\slash", "new\nline", "", "a b"]


def at_random(dice: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema that something satisfies."""
    kind = dice.choice(("object", "object", "array", "anyOf") if depth else ("leaf",))
    if kind == "anyOf":
        return {"anyOf": [at_random(dice, depth - 1) for _ in range(dice.randint(1, 3))]}
    if kind == "array":
        least = dice.randint(0, 2)
        schema = {"type": "array", "items": at_random(dice, depth - 1), "maxItems": least + 2}
        return schema | ({"minItems": least} if dice.random() < 0.5 else {})
    if kind == "object":
        names = dice.sample(WORDS, dice.randint(1, 4))
        return {
            "type": "object",
            "properties": {name: at_random(dice, dice.randint(0, depth - 1)) for name in names},
            "required": [name for name in names if dice.random() < 0.7],
            "additionalProperties": False,
        }
    low = dice.randint(-50, 50)
    return dice.choice(
        [
            {"enum": dice.sample(WORDS, 3)},
            {"const": dice.choice([None, True, 1.5, {"x": [1]}, *WORDS])},
            {"type": "string", "maxLength": 8},
            {"type": "string", "minLength": 2, "maxLength": 9, "description": "x"},
            {"type": "integer", "minimum": low, "maximum": low + dice.randint(0, 900)},
            {"type": "number", "minimum": low, "maximum": low + 0.75},
            {"type": ["boolean", "null"]},
            {"type": "string", "format": dice.choice(["date", "time", "uuid", "ipv4"])},
        ]
    )
