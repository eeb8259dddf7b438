"""How many threads a native runtime may use here: CPU affinity and cgroup quota together."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_CGROUPS = Path("/sys/fs/cgroup")


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


def own_groups(proc_cgroup: str) -> dict[str, PurePosixPath]:
    """Read the text of /proc/self/cgroup: "" is v2's group, "cpu" the v1 controller's."""
    groups = {}
    for line in proc_cgroup.splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            groups[""] = PurePosixPath(path)
        elif "cpu" in controllers.split(","):
            groups["cpu"] = PurePosixPath(path)
    return groups


def _quotas() -> Iterator[str]:
    """Every quota over this process: its own group's and those of the groups above it."""
    groups = own_groups(_read(Path("/proc/self/cgroup")))
    if "" in groups:
        for folder in _with_parents(_CGROUPS, groups[""]):
            yield _read(folder / "cpu.max")
    if "cpu" in groups:
        for folder in _with_parents(_CGROUPS / "cpu", groups["cpu"]):
            quota = _read(folder / "cpu.cfs_quota_us").strip()
            yield f"{quota} {_read(folder / 'cpu.cfs_period_us')}"


def _with_parents(root: Path, group: PurePosixPath) -> Iterator[Path]:
    # In a container the path can lie outside what is mounted here; the root's own file counts then.
    inside = PurePosixPath(*group.parts[1:])
    for path in (inside, *inside.parents):
        yield root / path


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
