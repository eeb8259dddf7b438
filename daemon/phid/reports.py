"""What the device says of itself: state, status, info, health; made from values, sent by others."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from typing import Literal

from phid import __version__, memory, messages
from phid.backlog import Backlog
from phid.errors import Code, Failure
from phid.health import Health
from phid.messages import Info, Status
from phid.outbox import Outbox
from phid.settings import Settings
from phid.worker import Worker

VERSION = __version__
NO_MODEL = (
    "there is no model: `phid models fit` says which to pull, `phid models pull NAME` does it"
)
_RETRY_MS = 5000

StateName = Literal["loading", "online", "degraded", "paused", "draining", "offline"]

# Settings that a reload takes over while running; the rest needs a restart.
_LIVE = (
    "limits.",
    "vision.max",
    "vision.camera",
    "vision.image",
    "vision.parts",
    "health.",
    "log.",
    "stream.",
    "mqtt.reply_allow",
    "watches",
)


@dataclass(frozen=True, slots=True)
class State:
    """The device's state with the reason, where there is one to tell."""

    name: StateName
    reason: str | None = None


def is_live(name: str) -> bool:
    """True for a setting that a reload takes over."""
    return name.startswith(_LIVE)


def state_of(
    *,
    worker: Worker | None,
    paused: bool,
    draining: bool,
    refused_filters: tuple[str, ...],
    silenced: bool,
    unkept: str | None,
    heat: str | None,
) -> State:
    """The state that the facts amount to."""
    if draining:
        return State("draining")
    if paused:
        return State("paused")
    if worker is None:
        return State("degraded", NO_MODEL)
    if worker.failure is not None:
        return State("degraded", f"{worker.failure.code}: {worker.failure.message}")
    if worker.state != "ready":
        return State("loading")
    if refused_filters:
        return State("degraded", f"the broker refuses us {', '.join(refused_filters)}")
    if silenced:
        return State(
            "degraded", "requests do not reach us: see the broker's ACL for our in/ topics"
        )
    if unkept is not None:
        return State("degraded", f"what is accepted cannot be kept: {unkept}")
    if heat is not None:
        return State("degraded", heat)
    return State("online")


def closed(*, worker: Worker | None, paused: bool, draining: bool) -> Failure | None:
    """Why new requests are refused; None while they are taken."""
    if draining:
        return Failure(Code.DRAINING, "the device finishes what it has")
    if paused:
        return Failure(Code.PAUSED, "the device is paused", retry_after_ms=_RETRY_MS)
    if worker is None:
        return Failure(Code.LOADING, NO_MODEL)
    if worker.hopeless and worker.failure is not None:
        says = f"{worker.failure.code}: {worker.failure.message}"
        return Failure(Code.LOADING, says, retry_after_ms=_RETRY_MS)
    return None


def status(
    state: State, *, session: str, since: float, queue: int, worker: Worker | None
) -> Status:
    """The message for out/status."""
    facts = worker.facts if worker else None
    return Status(
        state=state.name,
        session=session,
        since=int(since),
        ts=int(time.time()),
        reason=state.reason,
        queue=queue,
        model=worker.load.model if worker else None,
        provider=facts.provider if facts else None,
        version=VERSION,
    )


def will_payload(session: str) -> bytes:
    """What the broker says for us when the connection is lost."""
    now = int(time.time())
    will = Status(
        state="offline", session=session, since=now, ts=now, reason="lwt", version=VERSION
    )
    return messages.encode(will)


def info(settings: Settings, worker: Worker | None) -> Info:
    """The message for out/info."""
    facts = worker.facts if worker else None
    limits = settings.limits
    return Info(
        device=settings.device,
        version=VERSION,
        hardware={
            "machine": platform.machine(),
            "os": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
            "cpus": os.cpu_count() or 1,
            "ram_mb": memory.total_bytes() >> 20,
        },
        model=asdict(facts) if facts else None,
        models=[worker.load.model] if worker else [],
        limits={
            "backlog": limits.backlog,
            "per_client": limits.per_client,
            "payload_bytes": limits.payload_bytes,
            "frame_bytes": limits.frame_bytes,
            "max_images": settings.vision.max_images,
            "max_tokens": limits.max_tokens,
            "deadline_ms": limits.deadline_ms,
        },
        capabilities=["text", "frame"] if facts and facts.kind == "vision" else ["text"],
    )


def health(
    counts: Health,
    *,
    worker: Worker | None,
    backlog: Backlog,
    paused: bool,
    outbox: Outbox,
) -> dict[str, float]:
    """The numbers for out/health."""
    counts.counts["messages_dropped"] = outbox.dropped
    counts.counts["messages_refused"] = outbox.refused
    numbers = counts.sample(worker.pid if worker else None)
    oldest = backlog.oldest_arrival
    numbers |= {
        "connected": int(outbox.connected),
        "model_loaded": int(worker is not None and worker.state == "ready"),
        "paused": int(paused),
        "queue_depth": len(backlog),
        "queue_oldest_ms": round((time.monotonic() - oldest) * 1000) if oldest else 0,
    }
    return numbers


def numbers_payload(numbers: dict[str, float]) -> bytes:
    """The payload for numbers: one flat JSON object."""
    return json.dumps(numbers, separators=(",", ":")).encode()
