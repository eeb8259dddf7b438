"""ONNX Runtime's profiles: where the kernels ran, and for how long."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from phid.providers import of_kernels

# Their time is that of the nodes in their branches and bodies, which have events of their own.
_CONTROL_FLOW = {"If", "Loop", "Scan"}


def kernel_times(text: str) -> Counter[str]:
    """Microseconds of kernel time by provider, from one profile.

    A kernel counts for one microsecond at least: the shortest are told as 0. Control flow does not
    count beside what it runs. Raises ValueError for what is no profile. Source: ORT's profiler
    writes Chrome's trace events; those of kernels have the category Node and name their provider in
    `args`.
    """
    events = json.loads(text)
    if not isinstance(events, list):
        raise ValueError("a profile is a list of events")  # noqa: TRY004 - as for wrong JSON
    times: Counter[str] = Counter()
    for event in events:
        kernels, took_us = _kernel(event)
        if kernels:
            times[of_kernels(kernels)] += max(1, took_us)
    return times


def _kernel(event: Any) -> tuple[str, int]:
    """The provider and the time of a kernel's event; of any other, nothing."""
    if not isinstance(event, dict) or event.get("cat") != "Node":
        return "", 0
    arguments = event.get("args")
    if not isinstance(arguments, dict) or arguments.get("op_name") in _CONTROL_FLOW:
        return "", 0
    kernels = arguments.get("provider")
    took_us = event.get("dur", 0)
    if not isinstance(kernels, str) or isinstance(took_us, bool) or not isinstance(took_us, int):
        return "", 0
    return kernels, took_us


def total(profiles: Iterable[Mapping[str, int]]) -> Counter[str]:
    """The times of several profiles together."""
    times: Counter[str] = Counter()
    for profile in profiles:
        times.update(profile)
    return times


def shares(times: Mapping[str, int]) -> dict[str, float]:
    """Percent of the time by provider, largest first, to a tenth; they sum to 100.0 exactly.

    Empty where there is no time at all.
    """
    whole = sum(times.values())
    if whole <= 0:
        return {}
    exact = {name: took * 1000 / whole for name, took in times.items() if took > 0}
    tenths = {name: int(share) for name, share in exact.items()}
    # The largest remainders get what rounding down has left over.
    by_remainder = sorted(exact, key=lambda name: (tenths[name] - exact[name], name))
    for name in by_remainder[: 1000 - sum(tenths.values())]:
        tenths[name] += 1
    ranked = sorted(tenths, key=lambda name: (-tenths[name], name))
    return {name: tenths[name] / 10 for name in ranked}


def main_provider(placement: Mapping[str, float]) -> str | None:
    """Where most of the time went; None where nothing was measured."""
    return max(placement, key=lambda name: placement[name], default=None)
