"""How soon the scheduler lets a thread that wakes have a processor that others fill."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

# sched_setattr(2) by its number: neither Python nor the C library of Debian 12 has it.
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
_KEEP_POLICY = 0x08
_SHORTEST_NS = 100_000
# struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period.
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")


def shorten() -> bool:
    """Give this thread, and those it will start, the shortest slice; True if the system took it.

    Whoever has a shorter slice than the one that computes is let in as soon as it wakes. From Linux
    6.12 on (sched_setattr(2), `sched_runtime`); an older one says yes and does nothing.
    """
    return _set(_SHORTEST_NS)


def restore() -> bool:
    """Give this thread the system's own slice, whatever its parent had; True as for `shorten`."""
    return _set(0)


def _set(slice_ns: int) -> bool:
    number = _SCHED_SETATTR.get(platform.machine())
    if sys.platform != "linux" or number is None:
        return False
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, 0, _KEEP_POLICY, nice, 0, slice_ns, 0, 0)
    try:
        syscall = ctypes.CDLL(None).syscall
    except (OSError, AttributeError):  # a Python without shared libraries
        return False
    return bool(syscall(number, 0, attributes, 0) == 0)
