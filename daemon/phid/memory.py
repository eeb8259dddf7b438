"""What a program may still take of the machine's memory, of its cgroup's, and of its own budget."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import psutil

from phid import cgroups
from phid.errors import Code, Refused

_MIB = 1 << 20
# Kept free: a machine that swaps answers nobody.
_RESERVE = 64 * _MIB
# This much is granted out of the reserve, unmeasured: measuring delays a first token by 0.4 ms.
_LITTLE = _RESERVE // 4
# What the program and the runtime take whatever the model is; a vision model is shown a frame of
# two views while it loads.
_RUNTIME = {"text": 123 * _MIB, "vision": 225 * _MIB}

VIEW_BYTES = 51 * _MIB
"""What a view of 336 x 336 pixels takes while Phi-3.5-vision looks at it, as measured on a twin of
its geometry. All else that a look takes is less than what loading has left free for reuse."""


def total_bytes() -> int:
    """The machine's memory."""
    return int(psutil.virtual_memory().total)


def available_bytes() -> int:
    """What this process may still take without the machine swapping or its cgroup being killed."""
    available = int(psutil.virtual_memory().available)
    room = _cgroup_room(cgroups.OF_THIS_PROCESS, cgroups.ROOT)
    return available if room is None else min(available, room)


def check(needed: int, budget: int) -> None:
    """Raises Refused (no_memory) if `needed` bytes more are not to be had.

    `budget` is the most that this process may take in all; 0: what there is.
    """
    if needed <= _LITTLE and not budget:
        return
    room = available_bytes() - _RESERVE
    if budget:
        room = min(room, budget - int(psutil.Process().memory_info().rss))
    if needed > room:
        says = f"it needs {needed // _MIB} MiB of memory and {max(room, 0) // _MIB} are free"
        raise Refused(Code.NO_MEMORY, says)


def model_bytes(files: int, block: int, kind: Literal["text", "vision"]) -> int:
    """What a model will take of memory, before any job's cache: by the bytes of its files.

    For its int4 kernels the runtime packs the weights anew, with two more numbers for each `block`
    of them. Measured at 32 and 128, on twins of Phi-3.5-mini's geometry and on SmolLM2.
    """
    times = 1.2 if block <= 32 else 1.1 if block < 128 else 1.0
    return round(times * files) + _RUNTIME[kind]


def resident_bytes(pid: int) -> int | None:
    """What a process has in memory now; None if it cannot be told."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except (OSError, psutil.Error):
        return None


def own_bytes(pid: int) -> int | None:
    """What a process has in memory, without mapped files where the system tells them apart."""
    try:
        info = psutil.Process(pid).memory_info()
    except (OSError, psutil.Error):
        return None
    # Pages of mapped files come and go as the kernel likes.
    return int(info.rss - getattr(info, "shared", 0))


def most_bytes(pid: int) -> int | None:
    """The most a process has had in memory, as the kernel says (proc(5)); else what it has now."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return resident_bytes(pid)


def _cgroup_room(membership: Path, root: Path) -> int | None:
    """What the tightest limit of our cgroup (version 2) and those above it leaves; None: no limit.

    The kernel gives back file pages before it kills, so they do not count as taken.
    """
    own = cgroups.own(cgroups.read(membership)).get("")
    if own is None:
        return None
    rooms = []
    for group in cgroups.folders(root, own):
        try:
            limit = (group / "memory.max").read_text(encoding="ascii").strip()
            if limit == "max":
                continue
            taken = int((group / "memory.current").read_text(encoding="ascii"))
            stat = (group / "memory.stat").read_text(encoding="ascii").split()
            files = dict(zip(stat[::2], stat[1::2], strict=False))
            rooms.append(int(limit) - taken + int(files.get("inactive_file", 0)))
        except (OSError, ValueError):
            continue
    return min(rooms, default=None)
