"""So many picture files through the decoder in processes of their own, and what came of them."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

from fuzzer import looker
from fuzzer.looker import Looks
from fuzzer.payloads import Payloads

# A payload that is in hand for so long hangs, however busy the machine is.
HUNG_S = 60.0
START_S = 120.0
# After so many payloads a process has what it keeps; from there on its memory stays.
WARM = 5000
GROWTH_MB = 24.0
# The largest picture allowed takes 450 at 16 bits with alpha; none of the payloads is one.
PEAK_MB = 400.0


@dataclass
class Seen:
    """What came of all payloads; `rss_mb` has the memory of the process after each stretch."""

    seed: int = 0
    runs: int = 0
    came: Counter[str] = field(default_factory=Counter)
    escapes: list[dict[str, Any]] = field(default_factory=list)
    slowest_s: float = 0.0
    slowest_n: int = 0
    rss_mb: list[float] = field(default_factory=list)
    peak_mb: float = 0.0
    handles: set[int] = field(default_factory=set)
    deaths: int = 0
    words: str = ""

    def add(self, looks: Looks) -> None:
        self.runs += looks.runs
        self.came += looks.came
        self.peak_mb = max(self.peak_mb, looks.peak_mb)
        if looks.slowest_s > self.slowest_s:
            self.slowest_s, self.slowest_n = looks.slowest_s, looks.slowest_n
        self.rss_mb.append(looks.rss_mb)
        self.handles.add(looks.handles)
        self.escapes += [_escape(n, text, self.seed) for n, text in looks.escapes]

    @property
    def growth_mb(self) -> float:
        """How much more memory the process has at its end than when it was warm; 0 if too few."""
        warm = self.rss_mb[WARM // looker.TELL_EVERY :]
        if len(warm) < 8:
            return 0.0
        quarter = len(warm) // 4
        return sorted(warm[-quarter:])[quarter // 2] - sorted(warm[:quarter])[quarter // 2]

    @property
    def clean(self) -> bool:
        """Nothing crashed, hung, escaped, spoke, grew, took too much or was left open."""
        grown = self.growth_mb > GROWTH_MB or self.peak_mb > PEAK_MB or len(self.handles) > 1
        return not (self.escapes or self.deaths or self.words or grown)


def fuzz_pixels(count: int, seed: int) -> Seen:
    """Look at so many payloads one after another; a process that dies or hangs is replaced."""
    seen, first = Seen(seed), 0
    with tempfile.TemporaryDirectory(prefix="phid-fuzz-") as folder:
        words = Path(folder) / "words"
        while first < count:
            first, fault = _one_process(seen, seed, first, count, words)
            if fault:
                seen.deaths += 1
                seen.escapes.append(_escape(first - 1, fault, seed))
                if seen.deaths >= 20:
                    break
        seen.words = words.read_text("utf-8", "replace")[:2000]
    return seen


def _one_process(seen: Seen, seed: int, first: int, end: int, words: Path) -> tuple[int, str]:
    """Run a process from `first`: (the next payload, what it died of or nothing)."""
    # Not a fork: a fresh heap is what an engine has.
    context = multiprocessing.get_context("spawn")
    at = context.Value("q", first - 1, lock=False)
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=looker.serve, args=(theirs, at, seed, first, end, words))
    child.start()
    theirs.close()
    told, hung = first, True
    try:
        told, hung = _heard(seen, ours, at, first, end)
    finally:
        if hung:  # or this process is interrupted
            child.kill()
        child.join()
        ours.close()
    if told >= end and child.exitcode == 0:
        return end, ""
    seen.runs += at.value + 1 - told
    code = child.exitcode or 0
    died = signal.Signals(-code).name if code < 0 else f"status {code}"
    return at.value + 1, f"hung for {HUNG_S:.0f} s" if hung else died


def _heard(
    seen: Seen, line: Connection, at: Synchronized[int], first: int, end: int
) -> tuple[int, bool]:
    """Take what a process tells until it ends: (the first payload not told of, whether it hung)."""
    told, in_hand, since_s = first, at.value, time.monotonic()
    while told < end:
        try:
            if line.poll(1.0):
                looks = line.recv()
                told += looks.runs
                seen.add(looks)
                print(f"{told} done, {len(seen.escapes)} escapes", file=sys.stderr)
        except EOFError:
            break
        if at.value != in_hand:
            in_hand, since_s = at.value, time.monotonic()
        if time.monotonic() - since_s > (START_S if in_hand < first else HUNG_S):
            return told, True
    return told, False


def _escape(n: int, text: str, seed: int) -> dict[str, Any]:
    return {"payload": n, "escape": text, "data": Payloads(seed).payload(n).hex()[:4000]}


def figures(seen: Seen, seconds: float) -> dict[str, Any]:
    """What is printed of it."""
    return {
        "count": seen.runs,
        "clean": seen.clean,
        "escapes": len(seen.escapes),
        "deaths": seen.deaths,
        "seconds": round(seconds, 1),
        "came": dict(sorted(seen.came.items())),
        "slowest_ms": round(seen.slowest_s * 1e3, 1),
        "slowest_payload": seen.slowest_n,
        "rss_mb": {
            "median": round(sorted(seen.rss_mb)[len(seen.rss_mb) // 2], 1),
            "peak": round(seen.peak_mb, 1),
            "growth": round(seen.growth_mb, 1),
        },
        "handles": sorted(seen.handles),
        "words": seen.words,
        "examples": seen.escapes[:20],
    }
