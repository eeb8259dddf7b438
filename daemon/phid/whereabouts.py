"""What the doctor finds out of providers: where the model runs, or would run, and why there."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any

from phid import devices, packages, prover
from phid.jobs import EngineFacts, Load, Loading
from phid.probes import Reached, Verdict
from phid.proofs import Prove, Selection
from phid.providers import CPU, PROVIDERS
from phid.settings import Settings


class Whereabouts:
    """The provider that was asked for, the one that runs the model, and what was found of each."""

    def __init__(self) -> None:
        self._told: dict[str, Any] = {
            "installed": [name for name in PROVIDERS if not packages.missing(name)],
            "requested": [],
            "actual": None,
            "placement": {},
            "tokens_per_s": None,
            "report": [],
        }
        self._selection: Selection | None = None
        self._settings: Settings | None = None

    def told(self) -> dict[str, Any]:
        """As `phid doctor --json` has it; `actual` is measured, or null.

        `installed` are the providers whose packages are in this environment.
        """
        return self._told

    def find(self, settings: Settings, load: Load | None, reached: Reached, late: float) -> Verdict:
        """Ask the daemon that runs, or else prove it here, until `late` (monotonic) at most.

        What was refused before is looked at again. `load` is None where no model can be run.
        """
        self._settings = settings
        self._told["requested"] = list(settings.providers)
        if isinstance(said := reached.info.get("provider"), dict) and reached.facts:
            self._told |= {name: said[name] for name in self._told if name in said}
            return self._verdict("the daemon's model runs")
        if settings.engine.runtime == "scripted":
            return Verdict("provider", "ok", "the scripted engine needs none")
        if load is None:
            says = "cannot be tried without a model"
            return Verdict("provider", "warn", says, "mend what is bad above first")
        return self._prove(settings, load, late)

    def place(self, load: Load) -> Load:
        """The command that loads the model where it was chosen to run."""
        chosen = self._selection
        if chosen is None or chosen.chosen is None or self._settings is None:
            return load
        return replace(
            load,
            provider=chosen.chosen,
            options=self._settings.wanted.options_of(chosen.chosen),
            proven=tuple(chosen.report.placement.items()) if chosen.report else (),
        )

    def measured(self, facts: EngineFacts) -> None:
        """Take note of where an engine has run."""
        self._told |= {
            "actual": facts.provider,
            "placement": facts.placement,
            "tokens_per_s": facts.tokens_per_s,
        }

    def _prove(self, settings: Settings, load: Load, late: float) -> Verdict:
        def in_time(stage: Loading) -> None:
            if time.monotonic() > late:
                raise TimeoutError(stage.stage)

        task = Prove(load, settings.wanted, doubt_refusals=True)
        try:
            self._selection = found = prover.prove(task, in_time)
        except TimeoutError as stage:
            says = f"not proven in time ({stage}): a large model takes longer"
            return Verdict("provider", "warn", says, "phid doctor --wait 600")
        self._told["report"] = [asdict(report) for report in found.reports]
        report = found.report
        if report is None:
            return self._verdict("no provider passes that may run the model")
        # What the CPU does is measured by an engine, which has not been started yet.
        self._told["placement"] = report.placement
        self._told["tokens_per_s"] = report.tokens_per_s
        self._told["actual"] = found.chosen if report.placement else None
        return self._verdict("the model would run", on=found.chosen)

    def _verdict(self, begins: str, on: str | None = None) -> Verdict:
        actual = on or self._told["actual"]
        lines = [begins + (f" on {_shown(actual)}" if actual else "") + _shares(self._told)]
        refused = [r for r in self._told["report"] if not r["passed"]]
        lines += [f"{_shown(r['provider'])}: {r['says']}" for r in refused]
        says = "\n".join(lines)
        if board := devices.jetson():
            says += f"\n{board.says()}"
        # A provider that nobody asked for by name is not missed.
        missed = [r for r in refused if r["provider"] in self._told["requested"]]
        if not missed and actual:
            return Verdict("provider", "ok", says)
        first = (missed or refused)[0] if refused else {}
        mend = board.wheel() if board and first.get("provider") == "cuda" else first.get("mend")
        mend = mend or "providers = one that passes"
        return Verdict("provider", "warn" if actual else "bad", says, mend)


def _shown(name: str) -> str:
    return PROVIDERS[name].shown if name in PROVIDERS else name


def _shares(told: dict[str, Any]) -> str:
    if not told["placement"]:
        return "" if told["actual"] != CPU else " (not measured)"
    shares = ", ".join(f"{_shown(name)} {pct:g} %" for name, pct in told["placement"].items())
    speed = f", {told['tokens_per_s']:g} tokens/s" if told["tokens_per_s"] else ""
    return f" ({shares} of kernel time{speed})"
