"""A process that looks at pictures as the engine does, and may die of one."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import numpy as np

from fuzzer.payloads import Payloads
from phid import frames, images, messages
from phid.errors import Code, Refused

# Law of the service: what was told of a picture fits in one small message.
MAX_ERROR_BYTES = 2000
# What a worst legal picture (25 million pixels, 16 bits, alpha) takes on the slowest machine here.
SLOW_S = 2.0
TELL_EVERY = 250
_HANDLES = Path("/proc/self/fd")
_CROPS = (1, 1, 1, 1, 4, 16)
_ALLOWED = {Code.BAD_REQUEST, Code.TOO_LARGE, Code.UNSUPPORTED}


@dataclass
class Looks:
    """What came of a stretch of payloads; the rest is its process's at its end."""

    runs: int = 0
    came: Counter[str] = field(default_factory=Counter)
    escapes: list[tuple[int, str]] = field(default_factory=list)
    slowest_s: float = 0.0
    slowest_n: int = 0
    rss_mb: float = 0.0
    peak_mb: float = 0.0
    handles: int = 0


def look(data: bytes, crops: int) -> str:
    """Take one payload the engine's way: "shown jpeg", or where and why it was refused.

    Raises AssertionError where something does not hold that should.
    """
    came = "header"
    try:
        facts = images.inspect(data)
        came = f"body {facts.type}"
        cut = images.plan(*facts.upright, crops)
        pixels = frames.look(data, crops)
    except Refused as error:
        failure = error.failure
        told = messages.encode(messages.error_message("a1", failure))
        if failure.code not in _ALLOWED or len(told) > MAX_ERROR_BYTES:
            raise AssertionError(f"refused as {failure.code}: {failure.message}") from error
        return f"{came} {failure.code}"
    assert pixels.tokens == cut.tokens, "cut in another way than was planned"
    batch = frames.stack([pixels], np.float32)
    assert batch.pixels.shape == (1, cut.crops + 1, 3, images.CROP_SIDE, images.CROP_SIDE)
    # Cubic interpolation overshoots a little.
    assert np.abs(batch.pixels).max() < 3, "values that no picture has"
    picture = frames.decode(data)
    assert picture.shape == (*facts.upright[::-1], 3), "not of the size its header says"
    assert picture.dtype == np.uint8
    frames.thumbnail(data, facts)
    return f"shown {facts.type}"


def serve(
    line: Connection, at: Synchronized[int], seed: int, first: int, end: int, words: Path
) -> None:
    """Look at the payloads `first` to `end`; `at` says which one it has in hand.

    Tells what came of each stretch over `line`, and of an escape at once. What is written to stdout
    or stderr, which nothing should be, ends in the file `words`.
    """
    file = os.open(words, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    payloads, looks = Payloads(seed), Looks()
    for n in range(first, end):
        data = payloads.payload(n)
        at.value = n
        began_s = time.thread_time()
        try:
            looks.came[look(data, _CROPS[n % len(_CROPS)])] += 1
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            looks.escapes.append((n, f"{type(error).__name__}: {error}"[:300]))
        took_s = time.thread_time() - began_s
        if took_s > looks.slowest_s:
            looks.slowest_s, looks.slowest_n = took_s, n
        if took_s > SLOW_S:
            looks.escapes.append((n, f"{took_s:.1f} s"))
        looks.runs += 1
        if looks.escapes or looks.runs == TELL_EVERY or n == end - 1:
            looks.rss_mb, looks.handles = _resident_mb(), len([*_HANDLES.iterdir()])
            looks.peak_mb = _peak_mb()
            line.send(looks)
            looks = Looks()


def _peak_mb() -> float:
    # Not getrusage's ru_maxrss: over an exec that keeps what the parent had.
    status = Path("/proc/self/status").read_text("ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
