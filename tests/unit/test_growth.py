from __future__ import annotations

import math
import random

import pytest

from phid.growth import Growth, leaked_bytes

MIB = 1 << 20


def after(held_mib: list[float], tokens: int = 100) -> Growth:
    growth = Growth()
    for mib in held_mib:
        growth.add(round(mib * MIB), tokens)
    return growth


def leaks(jobs: int, each: float, noise: float = 0.0, base: float = 200.0) -> list[float]:
    chance = random.Random(1)
    return [base + each * n + chance.uniform(0, noise) for n in range(jobs)]


@pytest.mark.parametrize(("each", "noise"), [(2.0, 0.0), (2.0, 8.0), (0.5, 8.0), (20.0, 40.0)])
def test_what_grows_with_each_job_is_a_leak(each: float, noise: float) -> None:
    jobs = max(64, round(100 / each))
    leaked = after(leaks(jobs, each, noise)).leaked_bytes() / MIB
    assert leaked == pytest.approx(each * (jobs - 8), rel=0.15)


def test_a_slow_leak_is_seen_in_time_and_in_bounded_memory() -> None:
    growth = after(leaks(20_000, 0.01, 16.0))
    assert growth.leaked_bytes() / MIB == pytest.approx(200, rel=0.1)
    assert len(growth._held) < 128


def test_a_few_jobs_prove_nothing() -> None:
    assert after(leaks(39, 10)).leaked_bytes() == 0
    assert after(leaks(40, 10)).leaked_bytes() > 0


@pytest.mark.parametrize(
    "held",
    [
        [500.0] * 300,
        leaks(300, 0.0, 50.0),
        [200.0] * 50 + [900.0] * 50,  # a step
        [200.0] * 30 + [400.0] * 30 + [900.0] * 40,
        [200 + 300 * (1 - math.exp(-n / 20)) for n in range(100)],  # pools that fill up
        [200 + 60 * math.log(n + 1) for n in range(140)],
        leaks(300, -1.0),
        leaks(64, 0.3, base=2000),  # too little to matter
    ],
    ids=["flat", "noise", "step", "steps", "saturating", "log", "shrinking", "little"],
)
def test_what_settles_is_no_leak(held: list[float]) -> None:
    assert after(held).leaked_bytes() == 0


def test_a_conversation_that_grows_is_no_leak() -> None:
    growth = Growth()
    for turn in range(300):
        growth.add((200 + turn) * MIB, 100 + turn)
        assert growth.leaked_bytes() == 0
    for _ in range(60):  # and at its end it counts again
        growth.add(500 * MIB, 400)
    assert growth.leaked_bytes() == 0


def test_pools_filled_by_jobs_of_random_sizes_are_no_leak() -> None:
    for seed in range(50):
        chance, growth, largest = random.Random(seed), Growth(), 0
        for _ in range(500):
            tokens = chance.randint(10, 2000)
            largest = max(largest, tokens)
            # The pool keeps what the largest job took, and something of this one.
            growth.add((200 + largest) * MIB + chance.randint(0, tokens) * MIB // 4, tokens)
            assert growth.leaked_bytes() == 0, seed


def test_the_line_is_the_least_squares_one() -> None:
    assert leaked_bytes([n * 1000 for n in range(32)]) == 31_000
    assert leaked_bytes([]) == 0
