"""What the device says of itself: state, status, info, health; made from values, sent by others."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

from phid import __version__, memory, messages
from phid.backlog import Backlog
from phid.crew import Crew
from phid.errors import Code, Failure
from phid.health import PLACEMENT, Health
from phid.jobs import EngineFacts
from phid.messages import Info, Provider, ProviderReport, Status
from phid.outbox import Outbox
from phid.settings import Settings
from phid.worker import Worker

VERSION = __version__
NO_MODEL = (
    "there is no model: `phid models fit` says which to pull, `phid models pull NAME` does it"
)
_RETRY_MS = 5000

StateName = Literal["loading", "online", "degraded", "paused", "draining", "offline"]


@dataclass(frozen=True, slots=True)
class State:
    """The device's state with the reason, where there is one to tell."""

    name: StateName
    reason: str | None = None


def state_of(
    *,
    crew: Crew,
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
    worker = crew.lead
    if worker is None:
        return State("degraded", NO_MODEL)
    if crew.failure is not None:
        return State("degraded", f"{crew.failure.code}: {crew.failure.message}")
    # `stopped`: the model was unloaded, and comes back when it is wanted.
    if worker.state not in ("ready", "stopped"):
        return State("loading", worker.recycling and f"the engine was {worker.recycling}")
    if refused_filters:
        return State("degraded", f"the broker refuses us {', '.join(refused_filters)}")
    if silenced:
        return State(
            "degraded", "requests do not reach us: see the broker's ACL for our in/ topics"
        )
    if unkept is not None:
        return State("degraded", f"what is accepted cannot be kept: {unkept}")
    if (reason := heat or worker.placing.demotion) is not None:
        return State("degraded", reason)
    return State("online")


def closed(*, crew: Crew, paused: bool, draining: bool) -> Failure | None:
    """Why new requests are refused; None while they are taken."""
    if draining:
        return Failure(Code.DRAINING, "the device finishes what it has")
    if paused:
        return Failure(Code.PAUSED, "the device is paused", retry_after_ms=_RETRY_MS)
    return Failure(Code.NOT_FOUND, NO_MODEL) if crew.lead is None else None


def status(state: State, *, session: str, since: float, queue: int, crew: Crew) -> Status:
    """The message for out/status."""
    worker = crew.lead
    facts = worker.facts if worker else None
    return Status(
        state=state.name,
        session=session,
        since=round(since),
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


def info(settings: Settings, crew: Crew) -> Info:
    """The message for out/info."""
    facts = crew.lead.facts if crew.lead else None
    capabilities = ["text"]
    if any(one.kind == "vision" for one in crew.facts):
        capabilities.append("frame")
    if settings.sessions.most:
        capabilities.append("session")
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
        model=_model(crew.lead, facts) if crew.lead and facts else None,
        provider=provider(crew.lead) if crew.lead else None,
        models=crew.names,
        loaded=[one.model for one in crew.facts],
        limits={
            "backlog": limits.backlog,
            "per_client": limits.per_client,
            "payload_bytes": limits.payload_bytes,
            "frame_bytes": limits.frame_bytes,
            "max_images": settings.vision.max_images,
            "max_tokens": limits.max_tokens,
            "deadline_ms": limits.deadline_ms,
        },
        capabilities=capabilities,
    )


def _model(worker: Worker, facts: EngineFacts) -> dict[str, Any]:
    """A model's facts and the memory it takes, without what is told of its provider anyway."""
    told = asdict(facts)
    del told["placement"], told["tokens_per_s"]
    loaded = worker.loaded_bytes
    return told if loaded is None else told | {"loaded_mb": loaded >> 20}


def provider(worker: Worker) -> Provider:
    """Where the worker's model runs, and what was found of the providers before that one."""
    facts, selection = worker.facts, worker.placing.selection or worker.placing.refused
    return Provider(
        requested=list(worker.placing.requested),
        actual=facts.provider if facts else None,
        placement=facts.placement if facts else {},
        tokens_per_s=facts.tokens_per_s if facts else None,
        report=[
            ProviderReport(
                provider=r.provider,
                passed=r.passed,
                says=r.says,
                mend=r.mend,
                placement=r.placement or None,
                tokens_per_s=r.tokens_per_s,
            )
            for r in (selection.reports if selection else ())
        ],
    )


def health(
    counts: Health,
    *,
    crew: Crew,
    backlog: Backlog,
    paused: bool,
    outbox: Outbox,
) -> dict[str, float]:
    """The numbers for out/health."""
    counts.counts["messages_dropped"] = outbox.dropped
    counts.counts["messages_refused"] = outbox.refused
    numbers = counts.sample(crew.pids)
    oldest = backlog.oldest_arrival
    numbers |= {
        "connected": int(outbox.connected),
        "model_loaded": int(crew.lead is not None and crew.lead.state == "ready"),
        "models_loaded": len(crew.facts),
        "paused": int(paused),
        "queue_depth": len(backlog),
        "queue_oldest_ms": round((time.monotonic() - oldest) * 1000) if oldest else 0,
    }
    facts = crew.lead.facts if crew.lead else None
    for name, pct in facts.placement.items() if facts else ():
        numbers[f"{PLACEMENT}{name}"] = pct
    return numbers


def numbers_payload(numbers: dict[str, float]) -> bytes:
    """The payload for numbers: one flat JSON object."""
    return json.dumps(numbers, separators=(",", ":")).encode()
