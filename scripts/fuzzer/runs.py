"""So many inputs through the decoders, in this process or in several, and what came of it."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzzer.decoders import LARGE_EVERY, SHARES, Decoders
from fuzzer.source import Source

SLOW_MS = 250.0


@dataclass
class Tally:
    """What came of it."""

    runs: Counter[str] = field(default_factory=Counter)
    taken: Counter[str] = field(default_factory=Counter)
    slowest_ms: dict[str, float] = field(default_factory=dict)
    escapes: list[dict[str, str]] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.runs += other.runs
        self.taken += other.taken
        self.escapes += other.escapes
        for name, ms in other.slowest_ms.items():
            self.slowest_ms[name] = max(ms, self.slowest_ms.get(name, 0.0))


def fuzz(count: int, seed: int) -> Tally:
    """Run so many inputs, the same ones for the same seed."""
    source, tally = Source(seed), Tally()
    for name in [name for name in os.environ if name.startswith("PHID_")]:
        del os.environ[name]
    with tempfile.TemporaryDirectory(prefix="phid-fuzz-") as folder:
        cases = Decoders(source, Path(folder)).cases()
        names = list(SHARES)
        for n in range(count):
            name = source.dice.choices(names, weights=list(SHARES.values()))[0]
            if n % LARGE_EVERY == LARGE_EVERY - 1:
                name = "large"
            make, decode = cases[name]
            data = make()
            began = time.thread_time()
            try:
                taken = decode(data)
            except Exception as error:  # noqa: BLE001 - that is what is looked for
                escape = f"{type(error).__name__}: {error}"[:300]
                tally.escapes.append({"decoder": name, "escape": escape, "data": repr(data)[:2000]})
                taken = False
            ms = (time.thread_time() - began) * 1e3
            # Of its own time, but others use the same caches: what is slow is slow thrice.
            if ms > SLOW_MS and (again := _quickest_ms(decode, data)) > SLOW_MS:
                text = f"{again:.0f} ms"
                tally.escapes.append({"decoder": name, "escape": text, "data": repr(data)[:200]})
            tally.runs[name] += 1
            tally.taken[name] += taken
            tally.slowest_ms[name] = max(ms, tally.slowest_ms.get(name, 0.0))
    return tally


def _quickest_ms(decode: Callable[[Any], bool], data: Any) -> float:
    times = []
    for _ in range(3):
        began = time.thread_time()
        decode(data)
        times.append((time.thread_time() - began) * 1e3)
    return min(times)


def in_parts(count: int, seed: int, processes: int) -> Tally:
    """The same in several processes, a seed for each part."""
    part = 25_000
    sizes = [min(part, count - at) for at in range(0, count, part)]
    whole = Tally()
    with ProcessPoolExecutor(processes) as pool:
        for done, tally in enumerate(pool.map(fuzz, sizes, range(seed, seed + len(sizes))), 1):
            whole.add(tally)
            print(f"{min(count, done * part)} done, {len(whole.escapes)} escapes", file=sys.stderr)
    return whole
