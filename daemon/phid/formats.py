"""The shape an answer is to have: OpenAI's `response_format`, and which schemas are taken."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_SCHEMA_BYTES = 16_384
MAX_SCHEMA_DEPTH = 32
MAX_SCHEMA_ITEMS = 4096
"""The most that all its minItems, maxItems, minProperties and maxProperties may add up to."""

_NOTES = {"$schema", "$comment", "title", "description", "default", "examples"}
_DEFINED = {"$defs", "definitions"}
# Left out: `pattern`, for two backslashes in one hold the runtime for minutes; keywords that
# intersect schemas, which can take as long; exclusive bounds, which it lets a number equal.
_COUNTS = {"minItems", "maxItems", "minProperties", "maxProperties"}
_PLAIN = {
    *("type", "enum", "const", "format", "required"),
    *("minLength", "maxLength", "minimum", "maximum"),
}
_OF_SCHEMAS = {"properties", *_DEFINED}  # by name
_LISTS = {"anyOf", "prefixItems"}
_INNER = {"items", "additionalProperties"}
_KNOWN = _NOTES | _COUNTS | _PLAIN | _OF_SCHEMAS | _LISTS | _INNER | {"$ref"}


def _not_taken(says: str) -> PydanticCustomError:
    return PydanticCustomError("schema", "{says}", {"says": says})


def _taken(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, if the runtime can surely compile it at little cost."""
    try:
        text = json.dumps(schema, allow_nan=False, separators=(",", ":"))
    except ValueError:
        raise _not_taken("must not contain NaN or Infinity") from None
    if len(text) > MAX_SCHEMA_BYTES:
        raise _not_taken(f"at most {MAX_SCHEMA_BYTES} bytes, and these are {len(text)}")
    items = 0
    for part in _parts(schema, MAX_SCHEMA_DEPTH):
        items += sum(part[name] for name in _COUNTS & part.keys() if type(part[name]) is int)
    if items > MAX_SCHEMA_ITEMS:
        raise _not_taken(f"items and properties: at most {MAX_SCHEMA_ITEMS} counted altogether")
    return schema


def _parts(schema: Any, depth: int) -> Iterator[dict[str, Any]]:
    """Give the schema and all within it."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise _not_taken("a schema is an object, true or false")
    if not depth:
        raise _not_taken(f"at most {MAX_SCHEMA_DEPTH} schemas within each other")
    if unknown := schema.keys() - _KNOWN:
        raise _not_taken(f"the keyword {min(unknown)[:32]!r} is not supported")
    # Beside other keywords they would be intersected, which can take minutes.
    alone = schema.keys() & {"anyOf", "$ref"}
    if alone and len(schema.keys() - _NOTES - _DEFINED) > 1:
        raise _not_taken(f"{min(alone)} stands alone in a schema")
    yield schema
    for name in schema.keys() & (_OF_SCHEMAS | _LISTS | _INNER):
        for inner in _within(name, schema[name]):
            yield from _parts(inner, depth - 1)


def _within(name: str, value: Any) -> Iterable[Any]:
    if name in _INNER:
        return (value,)
    if name in _LISTS:
        if not isinstance(value, list):
            raise _not_taken(f"{name} is an array of schemas")
        return value
    if not isinstance(value, dict):
        raise _not_taken(f"{name} is an object of schemas")
    return value.values()


class _Format(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class JsonSchema(_Format):
    """The schema of an answer, and a name for it, which is the asker's own."""

    model_config = ConfigDict(serialize_by_alias=True)

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="For the asker's own use.")
    # Not `schema`: a pydantic model has a method of that name.
    schema_: Annotated[dict[str, Any], AfterValidator(_taken)] = Field(
        alias="schema", description="What the answer is held to, a subset of JSON Schema."
    )
    description: str | None = Field(None, max_length=1024, description="Not shown to the model.")
    strict: bool | None = Field(None, description="Ignored: a schema is always held to.")


class ResponseFormat(_Format):
    """OpenAI's response_format: text as the model likes it, any JSON object, or by a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise _not_taken("json_schema goes with type json_schema, and only with it")
        return self

    @property
    def schema_text(self) -> str | None:
        """The JSON Schema that the answer is to satisfy; None for plain text."""
        if self.type == "json_object":
            return '{"type":"object"}'
        return json.dumps(self.json_schema.schema_) if self.json_schema else None
