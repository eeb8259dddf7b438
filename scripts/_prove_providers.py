"""Have phid choose where the demo model runs, in the venv that this runs in; print what it says.

_prove_providers.py [--json FILE] LABEL PROVIDER [OPTION=VALUE...]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import queue
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "daemon"))

from phid import log, packages, prover  # noqa: E402 - the path comes first
from phid.jobs import Load, LoadFailed, Loading, Ready  # noqa: E402
from phid.proofs import Wanted  # noqa: E402
from phid.settings import default_models_dir  # noqa: E402
from phid.worker import EngineSaid, Worker, WorkerEvent  # noqa: E402

MODEL = default_models_dir() / "smollm2-135m-instruct"


def start(wanted: Wanted, stages: list[str]) -> tuple[Worker, float, float]:
    """A worker whose engine is ready or has failed, how long its start held the caller, and all.

    What it went through on the way is added to `stages`.
    """
    events: queue.SimpleQueue[WorkerEvent] = queue.SimpleQueue()
    worker = Worker(Load("genai", "demo", str(MODEL)), events.put, restart_max_s=30, wanted=wanted)
    began = time.monotonic()
    worker.start()
    held_s = time.monotonic() - began
    while worker.state not in ("ready", "pausing"):
        event = events.get(timeout=600)
        if isinstance(event, EngineSaid):
            said = worker.take(event)
            if isinstance(said, Loading | LoadFailed):
                print(f"    {time.monotonic() - began:6.1f} s  {said}", file=sys.stderr)
                stages.append(said.stage if isinstance(said, Loading) else said.message)
            if isinstance(said, Ready):
                break
        else:
            worker.ended(event, time.monotonic())
    return worker, held_s, time.monotonic() - began


def proven(wanted: Wanted) -> dict[str, Any]:
    """What a first start found and what a warm one needed; both are printed."""
    figures: dict[str, Any] = {"versions": packages.versions()}
    for what in ("first start", "warm start"):
        stages: list[str] = []
        worker, held_s, took_s = start(wanted, stages)
        print(f"   {what}: {took_s:.1f} s, of which {held_s * 1e3:.0f} ms hold the service")
        facts, selection = worker.facts, worker.placing.selection
        worker.stop()
        assert selection is not None
        if what == "first start":
            for report in selection.reports:
                verdict = "passed" if report.passed else "refused"
                print(f"   {report.provider}: {verdict}: {report.says}")
                if report.mend:
                    print(f"       -> {report.mend}")
                if report.placement:
                    print(f"       {report.placement}, {report.tokens_per_s} tokens/s")
        if facts is not None:
            print(f"   engine: {facts.provider}, {facts.placement}, {facts.tokens_per_s} tokens/s")
        figures[what] = {
            "took_s": took_s,
            "held_s": held_s,
            "stages": stages,
            "chosen": selection.chosen,
            "reports": [dataclasses.asdict(report) for report in selection.reports],
            "engine": None
            if facts is None
            else {"provider": facts.provider, "placement": facts.placement},
        }
    return figures


def main() -> None:
    """Prove, then start again with what was proven."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, help="where the figures go")
    for name in ("label", "provider"):
        parser.add_argument(name)
    parser.add_argument("options", nargs="*", metavar="OPTION=VALUE")
    asked = parser.parse_args()
    log.configure("error", "text")
    print(f"== {asked.label}: providers = [{asked.provider!r}] {' '.join(asked.options)}")
    print(f"   {packages.versions()}")
    pairs = tuple((name, value) for name, _, value in (o.partition("=") for o in asked.options))
    with tempfile.TemporaryDirectory() as state:
        memory = Path(state) / "providers.json"
        options = ((asked.provider, pairs),) if pairs else ()
        wanted = Wanted((asked.provider,), options, memory=memory)
        apart = dataclasses.replace(wanted, memory=None)
        usable = prover.usable(Load("genai", "", ""), apart, lambda _: None)
        print(f"   for models that are still to come: {', '.join(usable)}")
        figures = {"usable": usable} | proven(wanted)
    if asked.json is not None:
        asked.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
