"""How many threads a native runtime may use here: CPU affinity and cgroup quota together."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from phid import cgroups

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def usable_cpus() -> int:
    """Count the CPUs this process may really use, at least 1.

    Hyper-threads count as CPUs: which of them share a core is not looked up.
    """
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    return within(allowed, _quotas())


def within(allowed: int, quotas: Iterable[str]) -> int:
    """Put `allowed` CPUs under every quota: texts as in cpu.max, "<quota|max> <period>".

    Part of a CPU is not counted: a thread too many is throttled in the middle of a step, and
    the others wait for it. A text of another form limits nothing.
    """
    for text in quotas:
        match text.split():
            case [quota, period] if quota.isdecimal() and period.isdecimal() and int(period):
                allowed = min(allowed, int(quota) // int(period))
            case _:
                pass
    return max(1, allowed)


def _quotas() -> Iterator[str]:
    """Every quota over this process: its own group's and those of the groups above it."""
    groups = cgroups.own(cgroups.read(cgroups.OF_THIS_PROCESS))
    if "" in groups:
        for folder in cgroups.folders(cgroups.ROOT, groups[""]):
            yield cgroups.read(folder / "cpu.max")
    if "cpu" in groups:
        for folder in cgroups.folders(cgroups.ROOT / "cpu", groups["cpu"]):
            quota = cgroups.read(folder / "cpu.cfs_quota_us").strip()
            yield f"{quota} {cgroups.read(folder / 'cpu.cfs_period_us')}"
