"""Payloads into values, strictly and within limits: whatever is wrong is refused in a sentence."""

from __future__ import annotations

import difflib
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from phid.errors import Code, Refused

# A megabyte can hold half a million mistakes: to list them would stop every thread for seconds.
_MAX_MISTAKES = 100
# The same for what is nothing but brackets: each becomes an object, and the GIL is held for it.
_MAX_CONTAINERS = 65_536
# Possessive: what a prompt quotes is skipped, and nothing is ever tried a second time.
_OUTSIDE = rb'(?:[^"\[{]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+'
_ALL_BRACKETS = re.compile(rb"(?:%s[\[{]){%d}+" % (_OUTSIDE, _MAX_CONTAINERS + 1), re.DOTALL)
_MAX_FIELD_CHARS = 128

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
    mistakes = error.errors(include_url=False, include_input=False)
    mistakes.sort(key=lambda e: e["type"] != "extra_forbidden")
    return _refused(model, dict(mistakes[0]))


def is_all_brackets(payload: bytes) -> bool:
    """True if there are more arrays and objects than anything of ours can have; in milliseconds."""
    if payload.count(b"[") + payload.count(b"{") <= _MAX_CONTAINERS:
        return False
    return _ALL_BRACKETS.match(payload) is not None


def _refused(model: type[BaseModel], mistake: dict[str, Any]) -> Refused:
    kind, says, loc = mistake["type"], mistake["msg"], mistake["loc"]
    field = ".".join(str(level) for level in loc) or mistake.get("ctx", {}).get("field")
    field = field[:_MAX_FIELD_CHARS] if field else None
    if kind == "json_invalid":
        return Refused(Code.BAD_REQUEST, says)
    if kind == "model_type":
        whole = f"{field}: must be an object" if loc else "the payload must be a JSON object"
        return Refused(Code.BAD_REQUEST, whole, field=field)
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(field or "", list(model.model_fields), n=1)
        hint = f": did you mean {close[0]}?" if close and len(loc) == 1 else ""
        return Refused(Code.BAD_REQUEST, f"unknown field {field!r}{hint}", field=field)
    code = Code.UNSUPPORTED if kind == "unsupported" else Code.BAD_REQUEST
    return Refused(code, f"{field}: {says}" if field else says, field=field)
