"""The numbers that fleets watch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phid.health import KEYS, Health, percentile


def test_a_sample_is_of_known_keys_and_numbers(tmp_path: Path) -> None:
    health = Health(tmp_path / "not" / "there" / "yet")
    health.job_measured(ttft_ms=5, tokens_per_s=10, job_s=1, tokens=3)
    numbers = health.sample((os.getpid(),))
    assert numbers.keys() <= KEYS.keys()
    assert {type(n) for n in numbers.values()} <= {int, float}
    assert {"disk_free_mb", "engine_rss_mb", "ttft_ms_p50"} <= numbers.keys()


def test_what_cannot_be_told_is_absent(tmp_path: Path) -> None:
    numbers = Health(tmp_path).sample((2**22 + 1,))
    assert numbers.keys().isdisjoint({"engine_rss_mb", "ttft_ms_p50", "tokens_per_s_p50"})


def test_every_counter_is_there_from_the_start(tmp_path: Path) -> None:
    numbers = Health(tmp_path).sample(())
    assert {key for key in KEYS if key.endswith("_total")} <= numbers.keys()


def test_every_key_is_a_legal_metric_name() -> None:
    assert all(key.isidentifier() and key.islower() and key.isascii() for key in KEYS)


def test_the_wait_is_by_what_jobs_took_lately(tmp_path: Path) -> None:
    health = Health(tmp_path)
    assert health.wait_ms(3) is None
    for seconds in [100.0] * 5 + [2.0] * 16:
        health.job_measured(ttft_ms=1, tokens_per_s=1, job_s=seconds, tokens=1)
    assert health.wait_ms(3) == 6000


def test_a_job_without_a_token_is_no_sample_of_speed(tmp_path: Path) -> None:
    health = Health(tmp_path)
    health.job_measured(ttft_ms=1, tokens_per_s=0.0, job_s=1, tokens=0)
    assert health.sample(()).keys().isdisjoint({"ttft_ms_p50", "tokens_per_s_p50"})


def test_samples_are_of_the_last_256(tmp_path: Path) -> None:
    health = Health(tmp_path)
    for n in range(1000):
        health.job_measured(ttft_ms=n, tokens_per_s=1, job_s=1, tokens=1)
    assert health.sample(())["ttft_ms_p50"] == 744 + 127


@given(st.lists(st.floats(-1e9, 1e9), min_size=1), st.floats(0.01, 1))
def test_a_percentile_is_a_sample_that_enough_do_not_exceed(
    samples: list[float], share: float
) -> None:
    value = percentile(samples, share)
    assert value in samples
    assert sum(s <= value for s in samples) >= share * len(samples) - 1e-9
    assert sum(s < value for s in samples) < share * len(samples) + 1e-9


@pytest.mark.parametrize(("share", "value"), [(0.5, 2), (0.95, 4), (0.01, 1), (1, 4)])
def test_percentiles_of_four(share: float, value: float) -> None:
    assert percentile([4, 1, 3, 2], share) == value
