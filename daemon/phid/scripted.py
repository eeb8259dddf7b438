"""The scripted runtime: no model, exact tokens, and faults on demand.

Without a directive it answers with the last user turn, a word (and the white space after it) per
token; held to a schema, with the least that satisfies it. A turn that begins with `@script {...}`
says what to do instead; all keys are optional:

    tokens         the answer's tokens, or their number n for "t1 ", "t2 ", ... "tn "
    token_ms       how long each token takes
    prompt_tokens  how long the prompt is (else: its words)
    prefill_ms     how long the prefill takes, spread evenly over its slices
    bytes_split    true: each byte of a character outside ASCII is a token of its own
    see            true: the answer is the first digits of each image's SHA-256 instead
    recall         true: the answer is the turns before it, as JSON, instead
    crash_at       the process kills itself before this token (1 is the first; 0: in the prefill)
    hang_at        as a native call that never returns, before this token (0: in the prefill)
    fail_at        an exception of the runtime, before this token (0: in the prefill)
    leak_mb        memory that the job takes and the process keeps for ever

The path it is loaded from can carry faults too, as a query string: `load_ms=200&load_fail` or
`load_crash` or `load_hang`, after that time. With `vision` in it, the runtime says that it is a
vision model.

Images change nothing of the answer: each counts as one crop, 313 tokens of the prompt, whatever
it is and whatever the budget. None is decoded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import time
from typing import TYPE_CHECKING, Any, Never
from urllib.parse import parse_qs

from phid.errors import Code, Refused
from phid.jobs import EngineFacts, Job, Load, Loading
from phid.providers import PROVIDERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONTEXT = 4096
IMAGE_TOKENS = 313
_DIRECTIVE = "@script "
_WORDS = re.compile(r"\s*\S+\s*|\s+")
_KEYS = frozenset(
    (
        *("tokens", "token_ms", "prompt_tokens", "prefill_ms", "bytes_split", "see", "recall"),
        *("crash_at", "hang_at", "fail_at", "leak_mb"),
    )
)


def load(load: Load, report: Callable[[Loading], None]) -> ScriptedRuntime:
    """Get ready after the time, or fail in the way, that `load.path` says."""
    faults = parse_qs(load.path, keep_blank_values=True)
    began_s = time.monotonic()
    report(Loading("reading the script", 0.0))
    time.sleep(int(faults.get("load_ms", ["0"])[0]) / 1e3)
    if "load_crash" in faults:
        _crash()
    if "load_hang" in faults:
        _hang()
    if "load_fail" in faults:
        raise Refused(Code.INTERNAL, "the script says that loading fails")
    report(Loading("ready", 1.0))
    return ScriptedRuntime(load, load_ms=round((time.monotonic() - began_s) * 1e3))


class ScriptedRuntime:
    """Does what each job's last user turn says."""

    def __init__(self, load: Load, load_ms: int) -> None:
        self._slice = load.prefill_slice or PROVIDERS[load.provider].slice
        self._leaked: list[bytes] = []
        self.facts = EngineFacts(
            model=load.model,
            kind="vision" if "vision" in parse_qs(load.path, keep_blank_values=True) else "text",
            runtime="scripted",
            runtime_version="1",
            provider=load.provider,
            threads=load.threads or 1,
            context=min(load.max_context or CONTEXT, CONTEXT),
            kv_bytes_per_token=1024,
            load_ms=load_ms,
            placement={load.provider: 100.0},
            prefill_slice=self._slice,
        )

    def open(self, job: Job) -> ScriptedStream:
        """Read the job's script; refuses a wrong one and a prompt over the context."""
        asked = next((t.content for t in reversed(job.turns) if t.role == "user"), "")
        script = _read(asked)
        if script is None:
            script = {"tokens": _WORDS.findall(asked)}
        if job.sampling.schema is not None:
            # What a script says of tokens is left out: an answer is held to its schema.
            script = script | {"tokens": _WORDS.findall(_answer_to(job.sampling.schema))}
        if script.get("see"):
            hashes = (hashlib.sha256(image.data).hexdigest() for image in job.images)
            script = script | {"tokens": [f"{digits[:12]} " for digits in hashes]}
        if script.get("recall"):
            before = [[turn.role, turn.content] for turn in job.turns[:-1]]
            script = script | {"tokens": [json.dumps(before)]}
        if leak_mb := script.get("leak_mb"):
            self._leaked.append(b"x" * (leak_mb << 20))
        words = sum(len(_WORDS.findall(turn.content)) for turn in job.turns)
        text_tokens = script.get("prompt_tokens", words)
        stream = ScriptedStream(script, text_tokens, len(job.images), self._slice, self.facts)
        if stream.room <= 0:
            raise Refused(
                Code.TOO_LARGE,
                f"the prompt has {stream.prompt_tokens} tokens and the model takes"
                f" {self.facts.context - 1}",
                field="prompt",
            )
        return stream

    def close(self) -> None:
        """Nothing is held."""


class ScriptedStream:
    """One job's script being played."""

    def __init__(
        self,
        script: dict[str, Any],
        text_tokens: int,
        images: int,
        slice_tokens: int,
        facts: EngineFacts,
    ) -> None:
        self.crops, self.cached_tokens = images, 0
        self.image_tokens = images * IMAGE_TOKENS
        self.prompt_tokens = text_tokens + self.image_tokens
        self.room = facts.context - self.prompt_tokens
        self._script = script
        self._slice = slice_tokens
        self._tokens = iter(_pieces(script))
        self._count = 0

    def prefill(self) -> Iterator[int]:
        """As a real one: slices, each of which takes its share of the time."""
        self._fault()
        ends = [*range(self._slice, self.prompt_tokens, self._slice), self.prompt_tokens]
        for end in ends:
            time.sleep(self._script.get("prefill_ms", 0) / 1e3 / len(ends))
            yield end

    def step(self) -> bytes | None:
        """Play the script's next token."""
        self._count += 1
        self._fault()
        if pause_ms := self._script.get("token_ms"):
            time.sleep(pause_ms / 1e3)
        return next(self._tokens, None)

    def close(self) -> None:
        """Nothing is held."""

    def _fault(self) -> None:
        if self._script.get("crash_at") == self._count:
            _crash()
        if self._script.get("hang_at") == self._count:
            _hang()
        if self._script.get("fail_at") == self._count:
            raise RuntimeError("the script says that this step fails")


def _read(asked: str) -> dict[str, Any] | None:
    if not asked.startswith(_DIRECTIVE):
        return None
    try:
        script, _ = json.JSONDecoder().raw_decode(asked, len(_DIRECTIVE))
    except json.JSONDecodeError:
        script = None
    if not isinstance(script, dict) or script.keys() - _KEYS:
        known = " ".join(sorted(_KEYS))
        raise Refused(Code.BAD_REQUEST, f"@script takes a JSON object of: {known}", field="prompt")
    return script


def _pieces(script: dict[str, Any]) -> Iterator[bytes]:
    tokens = script.get("tokens", [])
    if isinstance(tokens, int):
        tokens = (f"t{n} " for n in range(1, tokens + 1))
    for token in tokens:
        piece = token.encode()
        if script.get("bytes_split"):
            # A run of ASCII, or one byte of a longer character.
            yield from re.findall(rb"[\x00-\x7f]+|[\x80-\xff]", piece)
        else:
            yield piece


def _answer_to(schema: str) -> str:
    whole = json.loads(schema)
    try:
        return json.dumps(_least(whole, whole), ensure_ascii=False)
    except (KeyError, RecursionError):
        says = "response_format: the schema cannot be held to: nothing satisfies it"
        raise Refused(Code.BAD_REQUEST, says, field="response_format") from None


def _least(schema: Any, whole: dict[str, Any]) -> Any:
    """The least value that the schema admits, of those that `formats` takes; roughly."""
    match schema:
        case bool():
            return {}
        case {"$ref": str() as at}:
            place: Any = whole
            for level in at.removeprefix("#").split("/")[1:]:
                place = place[level]
            return _least(place, whole)
        case {"const": value} | {"enum": [value, *_]}:
            return value
        case {"anyOf": [first, *_]}:
            return _least(first, whole)
        case {"type": [str() as first, *_]}:
            return _least(schema | {"type": first}, whole)
    return _least_of(schema.get("type", "object"), schema, whole)


def _least_of(kind: str, schema: dict[str, Any], whole: dict[str, Any]) -> Any:
    match kind:
        case "object":
            named = schema.get("properties", {})
            return {key: _least(named.get(key, True), whole) for key in schema.get("required", ())}
        case "array":
            return [_least(schema.get("items", True), whole)] * schema.get("minItems", 0)
        case "string":
            return "x" * schema.get("minLength", 0)
        case "integer" | "number":
            return schema.get("minimum", 0)
    return {"boolean": False, "null": None}[kind]


def _hang() -> Never:
    while True:
        time.sleep(3600)


def _crash() -> Never:
    """End as the OOM killer or a fault in native code would: at once, saying nothing."""
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
    raise AssertionError("unreachable")
