"""How fast this machine reads memory and computes: measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from statistics import quantiles

from phid import programs, threads

_BYTES_PER_THREAD = 96 << 20  # beyond any cache
_PIECES = 6
_LEAST_SAMPLES = 20
_MEASURE_S = 0.7
_TIMEOUT_S = 30.0


class Unmeasurable(Exception):  # noqa: N818 - it is an answer
    """The measurement failed; the message says why."""


@dataclass(frozen=True, slots=True)
class Speed:
    """What was measured: bytes a second that `threads` threads read, and the time of a fixed sum.

    `pace_s` is how long one core takes to add up the numbers below 2000 in Python: it scales the
    cost of a layer, which was measured on another processor.
    """

    bytes_s: float
    pace_s: float
    threads: int


@cache
def measure(count: int = 0) -> Speed:
    """Measure with so many threads, or all that may be used; takes about a second, once.

    In a process of its own, for it takes memory, and numpy. Raises Unmeasurable.
    """
    wanted = count or threads.usable_cpus()
    command = [*programs.command("phid.bandwidth"), str(wanted)]
    try:
        done = subprocess.run(  # noqa: S603 - our own command
            command,
            env=programs.environment(),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=True,
        )
        bytes_s, pace_s = json.loads(done.stdout)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise Unmeasurable(f"the bandwidth could not be measured: {last}") from None
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise Unmeasurable(f"the bandwidth could not be measured: {error}") from None
    return Speed(float(bytes_s), float(pace_s), wanted)


def rates(count: int, seconds: float) -> tuple[float, float]:
    """The bytes_s and pace_s of `Speed`, measured in this process.

    The best seen (95th percentile, and least): other programs may have been at work. Reads blocks
    that no cache holds, in pieces short enough to fall between two turns of other programs.
    """
    import numpy as np  # noqa: PLC0415 - only whoever measures needs it

    blocks = [np.ones(_BYTES_PER_THREAD // 8) for _ in range(count)]
    turns = list(zip(*(np.array_split(block, _PIECES) for block in blocks), strict=True))
    found: list[float] = []
    paces: list[float] = []
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(np.add.reduce, blocks))  # the threads, and the pages, are there now
        end = time.perf_counter() + seconds
        while (began := time.perf_counter()) < end or len(found) < _LEAST_SAMPLES:
            list(pool.map(np.add.reduce, turns[len(found) % _PIECES]))
            took = time.perf_counter() - began
            found.append(count * _BYTES_PER_THREAD / _PIECES / took)
            began = time.perf_counter()
            sum(range(2000))
            paces.append(time.perf_counter() - began)
    return quantiles(found, n=20)[-1], min(paces)


def main() -> int:
    """Measure in this process, and print it."""
    print(json.dumps(rates(int(sys.argv[1]), _MEASURE_S)))  # noqa: T201 - its answer
    return 0


if __name__ == "__main__":
    sys.exit(main())
