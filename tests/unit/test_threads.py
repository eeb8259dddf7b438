from __future__ import annotations

import os

import pytest

from phid import threads


@pytest.mark.parametrize(
    ("allowed", "quotas", "usable"),
    [
        (8, [], 8),
        (8, ["max 100000"], 8),
        (8, ["200000 100000"], 2),
        (8, ["250000 100000\n"], 2),
        (8, ["50000 100000"], 1),
        (8, ["max 100000", "400000 100000", "800000 100000"], 4),
        (2, ["800000 100000"], 2),
        (4, ["-1 100000"], 4),
        (4, ["", " ", "100000", "max", "a b c", "100000 0"], 4),
        (0, [], 1),
    ],
)
def test_the_smallest_quota_counts(allowed: int, quotas: list[str], usable: int) -> None:
    assert threads.within(allowed, quotas) == usable


def test_this_machine_has_at_least_one() -> None:
    assert 1 <= threads.usable_cpus() <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity here")
def test_the_affinity_counts() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert threads.usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)
