"""The values that cross between the service and an engine: jobs and commands in, events out."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from phid.errors import Code


class Finish(StrEnum):
    """Why a job that started has ended with a result."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen and when to stop; temperature 0 is greedy.

    `schema` is a JSON Schema, as text, that the answer is held to; None: plain text.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 50
    seed: int | None = None
    stop: tuple[str, ...] = ()
    schema: str | None = None


# Commands: service -> engine.


@dataclass(frozen=True, slots=True)
class Load:
    """Load this model; the first command an engine gets, answered by Ready or LoadFailed.

    `threads` 0 means: as many as the CPU affinity and the cgroup quota allow; `prefill_slice` 0: as
    many tokens as suit the provider. `max_context` caps the model's own context (tokens), 0 leaves
    it. `processor` says who makes a vision model's pixels: phid, within a job's budget of crops, or
    the runtime's own, always up to 16. `memory_bytes` is the most the process may take in all; 0:
    what the machine has. An answer whose last `loop_tokens` repeat themselves ends there; 0: it
    goes on. With `prefix_cache` a text model keeps the cache of a job for the next one that begins
    alike. `provider` is one of `providers` and `options` are its own. `proven` is the placement
    measured when it was chosen (percent of kernel time by provider), for models that cannot be
    measured while they warm up; `profile` has every session write a profile from its beginning,
    which is for a trial only.
    """

    runtime: Literal["genai", "scripted"]
    model: str
    path: str
    threads: int = 0
    prefill_slice: int = 0
    max_context: int = 0
    processor: Literal["phid", "stock"] = "phid"
    memory_bytes: int = 0
    loop_tokens: int = 0
    prefix_cache: bool = False
    provider: str = "cpu"
    options: tuple[tuple[str, str], ...] = ()
    proven: tuple[tuple[str, float], ...] = ()
    profile: str = ""


@dataclass(frozen=True, slots=True)
class Image:
    """An encoded picture as it came: `data` is a JPEG, PNG, WebP or BMP file."""

    data: bytes
    label: str = ""


@dataclass(frozen=True, slots=True)
class Gate:
    """Lets a job pass if its last image differs from the last one answered under this key.

    By at least `min_change_pct` of the full range of grey, where the two differ most.
    """

    key: str
    min_change_pct: float


@dataclass(frozen=True, slots=True)
class Job:
    """One request as the engine sees it.

    `budget_s` is what is left of the deadline when the job is handed over: clocks are not
    shared between processes. `crops` is the most 336x336 crops each of `images` may be cut into
    beside its global view, 1 to 16. With a `gate` it may end as Unchanged. Its first token is sent
    at once, those that follow in no more than one message in `gather_s`. `history` are the turns of
    its conversation before `turns`, without a system turn: the newest of them, as many as there is
    room for, are put before its own. None: no later request goes on with it.
    """

    id: str
    turns: tuple[Turn, ...]
    sampling: Sampling = field(default_factory=Sampling)
    budget_s: float | None = None
    images: tuple[Image, ...] = ()
    crops: int = 4
    gate: Gate | None = None
    gather_s: float = 0.0
    history: tuple[Turn, ...] | None = None


@dataclass(frozen=True, slots=True)
class Cancel:
    """End this job at the next token or prefill slice; unknown ids are ignored."""

    job_id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Release the model and exit with status 0."""


Command = Load | Job | Cancel | Stop


# Events: engine -> service.


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine knows about itself once its model is loaded.

    `context` in tokens; `kv_bytes_per_token` is what the cache takes for one token of
    max_length; `placement` is the percent of kernel time by provider, measured, and `provider` the
    one with most of it, or "unknown"; `tokens_per_s` is what a few tokens gave while warming up;
    `crops_padded` says that the vision graph takes no fewer than 17 views, so that a small budget
    saves tokens but no work in that graph. `estimate_mb` is the memory it takes by its files, MiB,
    before any job's cache. `prefill_slice` is how many tokens of a prompt one call takes.
    """

    model: str
    kind: Literal["text", "vision"]
    runtime: str
    runtime_version: str
    provider: str
    threads: int
    context: int
    kv_bytes_per_token: int
    load_ms: int
    crops_padded: bool = False
    estimate_mb: int = 0
    placement: dict[str, float] = field(default_factory=dict)
    tokens_per_s: float | None = None
    prefill_slice: int = 64


@dataclass(frozen=True, slots=True)
class Loading:
    """The model is being loaded: a stage in words, and the share done where it is known."""

    stage: str
    fraction: float | None = None


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded and warmed up: jobs are taken."""

    facts: EngineFacts


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """The model cannot be loaded; the engine exits after this."""

    code: Code
    message: str


@dataclass(frozen=True, slots=True)
class Started:
    """The job's prompt fits and its prefill begins.

    `image_tokens` of the `prompt_tokens` are its images, and `cached_tokens` are computed already.
    `history` is how many turns of the job's history are in the prompt.
    """

    job_id: str
    prompt_tokens: int
    image_tokens: int = 0
    cached_tokens: int = 0
    history: int = 0


@dataclass(frozen=True, slots=True)
class Prefilled:
    """So many of the prompt's tokens are in the cache: a sign of life.

    When all are, the first Tokens (or the end) says so, and no Prefilled.
    """

    job_id: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """So many more tokens were generated: one, or those of a job's `gather_s`.

    `text` is what they add to the answer: empty while bytes of a character or the start of a
    possible stop string are held back.
    """

    job_id: str
    text: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one job, named as OpenAI names them where they mean the same.

    `image_tokens` and `cached_tokens` are part of `prompt_tokens`. `crops` is how many its images
    were cut into altogether, beside the global view of each.
    """

    prompt_tokens: int = 0
    image_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    crops: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """The job has ended with an answer; `text` is the whole of it, equal to the joined tokens.

    `ttft_ms` runs from the hand-over to the first token, `prefill_ms` and `decode_ms` are the
    time spent in each phase. `looped` says that it was cut for repeating itself.
    """

    job_id: str
    finish: Finish
    text: str
    usage: Usage
    prefill_ms: float
    ttft_ms: float
    decode_ms: float
    looped: bool = False


@dataclass(frozen=True, slots=True)
class Failed:
    """The job has ended without an answer; `text` is what was generated before that."""

    job_id: str
    code: Code
    message: str
    field: str | None = None
    text: str = ""


@dataclass(frozen=True, slots=True)
class Unchanged:
    """The job has ended before it began: its gate did not let it pass."""

    job_id: str
    change_pct: float


Event = Loading | Ready | LoadFailed | Started | Prefilled | Tokens | Finished | Failed | Unchanged
RunEvent = Started | Prefilled | Tokens | Finished | Failed
