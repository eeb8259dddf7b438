"""scripts/prove-fit: what `phid models fit` expects of a model here, and what it does.

Bandwidth and decoding are measured in turns, a quarter of a second at a time, so that both see the
same machine. Each model stays loaded meanwhile: it needs memory for all of them at once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

from phid import fit, store
from phid.bandwidth import Speed

_SPEED = """
import json, sys
from phid.bandwidth import rates
for line in sys.stdin:
    print(json.dumps(rates(int(sys.argv[1]), 0.25)), flush=True)
"""
_DECODE = """
import json, sys, time
from phid import runtime
from phid.jobs import Job, Load, Sampling, Turn
loaded = runtime.load(Load("genai", "model", sys.argv[2], threads=int(sys.argv[1])), lambda _: None)
turns = (Turn("user", "Tell me a long story about a river and a town."),)
for line in sys.stdin:
    stream = loaded.open(Job("job", turns, Sampling(max_tokens=200)))
    list(stream.prefill())
    stream.step()
    print("begun", flush=True)
    sys.stdin.readline()
    end, took = time.perf_counter() + 0.25, []
    while not took or (time.perf_counter() < end and len(took) < 150):
        began = time.perf_counter()
        stream.step()
        took.append(time.perf_counter() - began)
    stream.close()
    print(json.dumps(took), flush=True)
"""


class Part:
    """A process that measures when it is told to."""

    def __init__(self, program: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def begin(self) -> None:
        self._say()
        assert self._hear() == "begun"

    def measure(self, *, realtime: bool) -> list[float]:
        self._turn(realtime)
        try:
            self._say()
            found: list[float] = json.loads(self._hear())
        finally:
            self._turn(False)
        return found

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _turn(self, realtime: bool) -> None:
        policy = os.SCHED_FIFO if realtime else os.SCHED_OTHER
        for thread in Path(f"/proc/{self._process.pid}/task").iterdir():
            if realtime or os.sched_getscheduler(int(thread.name)) != policy:
                os.sched_setscheduler(int(thread.name), policy, os.sched_param(int(realtime)))

    def _say(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def _hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/prove-fit", description=__doc__)
    parser.add_argument("folder", nargs="+", type=Path, help="of a model")
    parser.add_argument("--threads", type=int, nargs="+", default=[os.cpu_count() or 1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--realtime", action="store_true", help="as root, on a machine that others use meanwhile"
    )
    options = parser.parse_args()
    worst = 0.0
    for threads in options.threads:
        speed = Part(_SPEED, str(threads))
        parts = {folder: Part(_DECODE, str(threads), str(folder)) for folder in options.folder}
        speeds: list[list[float]] = []
        steps: dict[Path, list[float]] = {folder: [] for folder in parts}
        for _ in range(options.rounds):
            speeds.append(speed.measure(realtime=options.realtime))
            for folder, part in parts.items():
                part.begin()
                steps[folder].append(median(part.measure(realtime=options.realtime)))
        for part in (speed, *parts.values()):
            part.stop()
        seen = Speed(median(s[0] for s in speeds), median(s[1] for s in speeds), threads)
        print(f"{threads} threads: {seen.bytes_s / 1e9:.1f} GB/s, pace {seen.pace_s * 1e6:.1f} us")
        for folder, took in steps.items():
            worst = max(worst, _compare(folder, seen, 1 / median(took)))
    return int(worst > 0.25)


def _compare(folder: Path, speed: Speed, measured: float) -> float:
    model = store.read(folder)
    assert model is not None, folder
    expected = fit.of_folder(model).tokens_s(speed)
    assert expected is not None, folder
    off = expected / measured - 1
    print(f"  {folder.name}: expected {expected:.1f} tokens/s, measured {measured:.1f}, {off:+.0%}")
    return abs(off)


if __name__ == "__main__":
    sys.exit(main())
