"""Payloads into values, strictly and within limits: whatever is wrong is refused in a sentence."""

from __future__ import annotations

import difflib
import json
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from phid.errors import Code, Refused

# A megabyte can hold half a million mistakes: listing them would stop every thread for seconds.
_MAX_MISTAKES = 100
# So would a payload of nothing but brackets: each becomes an object, with the GIL held.
_MAX_CONTAINERS = 65_536
# Possessive: brackets within strings are skipped, and nothing is ever tried a second time.
_OUTSIDE = rb'(?:[^"\[{]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+'
_ALL_BRACKETS = re.compile(rb"(?:%s[\[{]){%d}+" % (_OUTSIDE, _MAX_CONTAINERS + 1), re.DOTALL)
_MAX_FIELD_CHARS = 128
# Pydantic's types of errors, in the words of JSON; its context fills the braces.
_NEEDED = {
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "tuple_type": "must be an array",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "literal_error": "must be {expected}",
    "missing": "is missing",
    "greater_than_equal": "must be {ge} or more",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be {le} or less",
    "less_than": "must be less than {lt}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match {pattern}",
    "too_short": "must have at least {min_length} {unit}",
    "too_long": "must have at most {max_length} {unit}",
}
_SEEN = {
    str: "text",
    int: "a number",
    float: "a fraction",
    bool: "true or false",
    list: "an array",
    dict: "an object",
    type(None): "null",
}

M = TypeVar("M", bound=BaseModel)


def decode(model: type[M], payload: bytes, limit_bytes: int) -> M:
    """The value in a JSON payload. Raises Refused with what is wrong and where."""
    if len(payload) > limit_bytes:
        raise Refused(
            Code.TOO_LARGE, f"payload of {len(payload)} bytes: the limit is {limit_bytes}"
        )
    if is_all_brackets(payload):
        raise Refused(Code.BAD_REQUEST, f"more than {_MAX_CONTAINERS} arrays and objects")
    try:
        return model.model_validate_json(payload, strict=True)
    except ValidationError as error:
        raise refusal(model, error) from None


def refusal(model: type[BaseModel], error: ValidationError) -> Refused:
    """What the sender of such a message is told."""
    if error.error_count() > _MAX_MISTAKES:
        return Refused(Code.BAD_REQUEST, f"more than {_MAX_MISTAKES} mistakes")
    # The first mistake is enough, and an unknown field explains the ones after it.
    mistakes = error.errors(include_url=False)
    mistakes.sort(key=lambda e: e["type"] != "extra_forbidden")
    return _refused(model, dict(mistakes[0]))


def is_all_brackets(payload: bytes) -> bool:
    """True if it has more arrays and objects than any message of ours; takes milliseconds."""
    if payload.count(b"[") + payload.count(b"{") <= _MAX_CONTAINERS:
        return False
    return _ALL_BRACKETS.match(payload) is not None


def _refused(model: type[BaseModel], mistake: dict[str, Any]) -> Refused:
    kind, loc = mistake["type"], mistake["loc"]
    field = ".".join(str(level) for level in loc) or mistake.get("ctx", {}).get("field")
    field = field[:_MAX_FIELD_CHARS] if field else None
    if kind == "json_invalid":
        return Refused(Code.BAD_REQUEST, mistake["msg"])
    if kind == "model_type" and not loc:
        return Refused(Code.BAD_REQUEST, "the payload must be a JSON object")
    if kind == "extra_forbidden":
        return Refused(Code.BAD_REQUEST, f"unknown field {field!r}{_hint(model, loc)}", field=field)
    says = _needed(model, mistake)
    return Refused(Code.BAD_REQUEST, f"{field}: {says}" if field else says, field=field)


def _needed(model: type[BaseModel], mistake: dict[str, Any]) -> str:
    """What must be there instead; with an example where the field has one."""
    kind, loc, came = mistake["type"], mistake["loc"], mistake["input"]
    said = mistake.get("ctx", {}) | {"unit": "characters" if isinstance(came, str) else "items"}
    # A bound of 2.0 is told as 2.
    said |= {n: int(v) for n, v in said.items() if isinstance(v, float) and v.is_integer()}
    says = _NEEDED[kind].format(**said) if kind in _NEEDED else str(mistake["msg"])
    if not kind.endswith("_type") or type(came) not in _SEEN:
        return says
    says += f", not {_SEEN[type(came)]}"
    known = model.model_fields.get(str(loc[0])) if len(loc) == 1 else None
    for example in (known.examples if known else None) or ():
        says += f": such as {json.dumps(example, separators=(',', ':'))}"
    return says


def _hint(model: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    """What to send in place of an unknown field, where that can be told."""
    foreign: dict[str, str] = getattr(model, "foreign", {})
    path = ".".join(level for level in loc if isinstance(level, str))
    if path in foreign:
        return f": {foreign[path]}"
    # Comparing names takes forty bytes of memory for each character of the unknown one.
    close = difflib.get_close_matches(path[:_MAX_FIELD_CHARS], list(model.model_fields), n=1)
    return f": did you mean {close[0]}?" if close and len(loc) == 1 else ""


def mistake(field: str, says: str) -> PydanticCustomError:
    """A mistake in a message as a whole, reported under this field of it."""
    return PydanticCustomError("question", "{says}", {"field": field, "says": says})
