"""What a watch asks about a frame, and what it reports: the answer, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass

from phid import attachments
from phid.errors import Failure
from phid.jobs import Finished, Gate, Image, Job, Sampling, Turn
from phid.messages import Timing, UsageReport, WatchFailure, WatchResult
from phid.slots import Frame
from phid.watches import Watch

# How long a frame may take: a watch has no requester who would set a deadline.
_BUDGET_S = 600.0
# Nobody reads along: tokens are sent only as a sign of life.
_GATHER_S = 1.0


@dataclass(frozen=True, slots=True)
class Sighting:
    """The frames of one question: `ts` is when the newest was taken, or came (Unix seconds)."""

    watch: Watch
    topic: str
    newest: Frame
    ts: float
    frames: int


def job(
    job_id: str, watch: Watch, topic: str, pictures: tuple[Image, ...], most_tokens: int
) -> Job:
    """The watch's question about these pictures, as the engine gets it."""
    turns = [Turn("user", watch.question(topic))]
    if watch.system:
        turns.insert(0, Turn("system", watch.system))
    gate = None
    if watch.min_change_pct:
        # Another question about the same picture is no repetition.
        gate = Gate(f"{hash(watch.model_dump_json())} {topic}", watch.min_change_pct)
    return Job(
        job_id,
        tuple(turns),
        Sampling(
            max_tokens=min(watch.max_tokens, most_tokens),
            schema=watch.response_format.schema_text,
        ),
        budget_s=_BUDGET_S,
        images=pictures,
        crops=attachments.crops_of(watch.detail),
        gate=gate,
        gather_s=_GATHER_S,
    )


def result(
    seen: Sighting,
    event: Finished,
    handed: float,
    now: float,
    *,
    device: str,
    model: str,
    provider: str,
) -> WatchResult:
    """The answer, as it is told; `handed` is when the engine got it (monotonic seconds)."""
    usage = event.usage
    aged_ms = (handed - seen.newest.at) * 1000
    # As in a result: the first token belongs to the prefill.
    later = usage.output_tokens - 1
    rate = later / event.decode_ms * 1000 if later > 0 and event.decode_ms > 0 else 0.0
    return WatchResult(
        name=seen.watch.name,
        camera=seen.watch.camera(seen.topic),
        topic=seen.topic,
        ts=round(seen.ts, 3),
        frames=seen.frames,
        device=device,
        model=model,
        provider=provider,
        text=event.text,
        finish=event.finish,
        usage=UsageReport.of(usage),
        timing=Timing(
            queued_ms=round(aged_ms),
            prefill_ms=round(event.prefill_ms),
            ttft_ms=round(aged_ms + event.ttft_ms),
            decode_ms=round(event.decode_ms),
            total_ms=round((now - seen.newest.at) * 1000),
            tokens_per_s=round(rate, 2),
        ),
        looped=event.looped or None,
    )


def failure(seen: Sighting, why: Failure) -> WatchFailure:
    """Why there is no answer, as it is told."""
    return WatchFailure(
        name=seen.watch.name,
        camera=seen.watch.camera(seen.topic),
        topic=seen.topic,
        ts=round(seen.ts, 3),
        code=why.code,
        status=why.code.status,
        message=why.message,
        field=why.field,
    )
