"""Have phid choose where the demo model runs, in the venv that this runs in; print what it says.

_prove_providers.py LABEL PROVIDER [OPTION=VALUE...]
"""

from __future__ import annotations

import queue
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "daemon"))

from phid import log, packages  # noqa: E402 - the path comes first
from phid.jobs import Load, LoadFailed, Loading, Ready  # noqa: E402
from phid.proofs import Wanted  # noqa: E402
from phid.settings import default_models_dir  # noqa: E402
from phid.worker import EngineSaid, Worker, WorkerEvent  # noqa: E402

MODEL = default_models_dir() / "smollm2-135m-instruct"


def start(wanted: Wanted) -> tuple[Worker, float, float]:
    """A worker whose engine is ready or has failed, how long its start held the caller, and all."""
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
            if isinstance(said, Ready):
                break
        else:
            worker.ended(event, time.monotonic())
    return worker, held_s, time.monotonic() - began


def main() -> None:
    """Prove, then start again with what was proven."""
    label, provider, *options = sys.argv[1:]
    log.configure("error", "text")
    print(f"== {label}: providers = [{provider!r}] {' '.join(options)}")
    print(f"   {packages.versions()}")
    pairs = tuple((name, value) for name, _, value in (o.partition("=") for o in options))
    with tempfile.TemporaryDirectory() as state:
        memory = Path(state) / "providers.json"
        wanted = Wanted((provider,), ((provider, pairs),) if pairs else (), memory=memory)
        for what in ("first start", "warm start"):
            worker, held_s, took_s = start(wanted)
            print(f"   {what}: {took_s:.1f} s, of which {held_s * 1e3:.0f} ms hold the service")
            facts = worker.facts
            worker.stop()
            if what == "first start":
                for report in worker.placing.selection.reports:  # type: ignore[union-attr]
                    verdict = "passed" if report.passed else "refused"
                    print(f"   {report.provider}: {verdict}: {report.says}")
                    if report.mend:
                        print(f"       -> {report.mend}")
                    if report.placement:
                        print(f"       {report.placement}, {report.tokens_per_s} tokens/s")
            if facts is not None:
                print(
                    f"   engine: {facts.provider}, {facts.placement}, {facts.tokens_per_s} tokens/s"
                )


if __name__ == "__main__":
    main()
