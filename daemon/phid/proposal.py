"""What this machine should run: proposed in words, as JSON, and to whoever names no model."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from phid import bandwidth, catalog, fit, graphs, memory, packages, selection, soundness, store
from phid.fit import Fitting, Machine
from phid.jobs import Load
from phid.proven import Recall
from phid.settings import Settings
from phid.store import StoredModel

Kind = Literal["text", "vision"]


@dataclass(frozen=True, slots=True)
class Proposal:
    """Every model that was looked at, and the one to run; `here` are the names of those present."""

    machine: Machine
    fittings: tuple[Fitting, ...]
    chosen: Fitting | None
    here: frozenset[str]
    tokens: int


def machine(providers: tuple[str, ...], *, measured: bool) -> Machine:
    """This machine, as models are fitted to it. Raises Unmeasurable if it cannot be `measured`.

    `providers` are those that it could run on here.
    """
    speed = bandwidth.measure() if measured else None
    return Machine(memory.total_bytes(), memory.available_bytes(), providers, speed)


def proven(settings: Settings) -> tuple[str, ...]:
    """The providers that the daemon or the doctor has proven here, and the CPU last."""
    wanted = settings.wanted
    # The small model's trials read nothing of this but the threads.
    recall = Recall(Load("genai", "", "", settings.engine.threads), wanted)
    return selection.usable(wanted, recall, packages.installed, windows=sys.platform == "win32")


def preferred(
    settings: Settings,
    kind: Kind,
    *,
    measured: bool = True,
    here: Sequence[StoredModel] | None = None,
) -> StoredModel | None:
    """The model to run for this kind where none is named; of another kind if none of it fits.

    It is one of `here`, by default of all in the models folder. Takes about a second where there
    are several and the machine is to be `measured`.
    """
    if here is None:
        here = store.models(settings.models_dir)
    if len(here) < 2:
        return here[0] if here else None
    providers = proven(settings)
    try:
        this = machine(providers, measured=measured)
    except bandwidth.Unmeasurable:
        this = machine(providers, measured=False)
    builds = catalog.builds(settings.catalog)
    alike = [model for model in here if model.kind == kind]
    return fit.preferred(alike, builds, this) or fit.preferred(here, builds, this)


def make(
    settings: Settings,
    *,
    kind: Kind | None,
    tokens: int,
    least_tokens_s: float,
    providers: tuple[str, ...],
) -> Proposal:
    """Measure, and judge every model that is known or here. Raises Unmeasurable.

    `providers` are those that it could run on here.
    """
    this = machine(providers, measured=True)
    here = {model.name: model for model in store.models(settings.models_dir)}
    builds = {build.name: build for build in catalog.builds(settings.catalog)}
    needs = []
    for name in dict.fromkeys([*here, *builds]):
        model = here.get(name)
        try:
            if model is not None:
                needs.append(fit.of_folder(model, builds.get(name)))
            else:
                needs.append(fit.of_build(builds[name]))
        except (soundness.NoModel, graphs.NotOnnx, OSError):
            continue  # `verify` and `doctor` say what is wrong with it
    fittings = tuple(
        fit.judge(one, this, tokens=tokens, least_tokens_s=least_tokens_s)
        for one in needs
        if kind in (None, one.kind)
    )
    return Proposal(this, fittings, fit.best(fittings), frozenset(here), tokens)


def as_json(made: Proposal) -> str:
    """For programs."""
    this = made.machine
    assert this.speed is not None
    content = {
        "machine": {
            "memory_bytes": this.memory_bytes,
            "usable_bytes": this.usable_bytes,
            "available_bytes": this.available_bytes,
            "providers": list(this.providers),
            "threads": this.speed.threads,
            "bandwidth_bytes_s": round(this.speed.bytes_s),
        },
        "tokens": made.tokens,
        "chosen": made.chosen.needs.name if made.chosen else None,
        "models": [
            {
                "name": f.needs.name,
                "kind": f.needs.kind,
                "provider": f.provider,
                "memory_bytes": f.memory_bytes,
                "tokens_s": round(f.tokens_s, 2) if f.tokens_s else None,
                "here": f.needs.name in made.here,
                "refusal": f.refusal or None,
            }
            for f in made.fittings
        ],
    }
    return json.dumps(content)


def as_text(made: Proposal) -> str:
    """For people: the machine, every model in the order of preference, and what to do."""
    this, chosen = made.machine, made.chosen
    assert this.speed is not None
    memory_gb, usable_gb = this.memory_bytes / 1e9, this.usable_bytes / 1e9
    speed = f"{this.speed.bytes_s / 1e9:.1f} GB/s read by {this.speed.threads} threads"
    room = f"{memory_gb:.1f} GB of memory ({usable_gb:.1f} for a model)"
    lines = [f"{room}, {speed}, on {', '.join(this.providers)}"]
    order = sorted(
        made.fittings, key=lambda f: (bool(f.refusal), -f.needs.rank, -(f.tokens_s or 0))
    )
    width = max((len(f.needs.name) for f in order), default=0)
    for f in order:
        rate = f"{f.tokens_s:5.1f} tokens/s" if f.tokens_s else " " * 14
        says = f.refusal or ("is here" if f.needs.name in made.here else "")
        room = f"{f.memory_bytes / 1e9:5.1f} GB"
        mark = "->" if f is chosen else "  "
        lines.append(f"{mark} {f.needs.name.ljust(width)}  {room}  {rate}  {says}".rstrip())
    if chosen is None:
        lines.append("nothing fits: a smaller --context or --least may help")
        return "\n".join(lines)
    lines.append(
        f"{chosen.needs.name}: the first by rank that fits: {chosen.memory_bytes / 1e9:.1f} GB at"
        f" {made.tokens} tokens of context. The rates are expected ones, from the bandwidth."
    )
    if chosen.memory_bytes > this.available_bytes:
        free = this.available_bytes / 1e9
        lines.append(f"only {free:.1f} GB are free just now: end what else takes memory")
    if chosen.needs.name not in made.here:
        lines.append(f"get it: phid models pull {chosen.needs.name}")
    return "\n".join(lines)
