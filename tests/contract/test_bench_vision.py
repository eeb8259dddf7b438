"""scripts/bench --vision tells what each budget of crops costs, of the tiny model here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rig import ROOT
from wire import PATIENCE

BENCH = ROOT / "scripts" / "_bench.py"
TINY = ROOT / "tests" / "models" / "tiny-phi3v"


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=100 * PATIENCE, check=False
    )


@pytest.mark.measures
def test_the_bench_tells_what_each_budget_costs(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = bench("--vision", TINY, "--quick", "--json", file)
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    tokens = {name: figures[f"vision.{name}.image_tokens"] for name in ("1", "4", "16", "stock")}
    assert tokens == {"1": 313, "4": 757, "16": 1921, "stock": 1921}
    ttft_ms = {name: figures[f"vision.{name}.ttft_ms"] for name in tokens}
    # Six times the views and the tokens cannot cost less, however busy the machine is.
    assert 0 < ttft_ms["1"] < ttft_ms["16"]
    assert ttft_ms["1"] < ttft_ms["stock"]
    # One round: then the median of the rounds' ratios is the ratio of the medians.
    for word, name in (("low", "1"), ("auto", "4")):
        ratio = ttft_ms["stock"] / ttft_ms[name]
        assert figures[f"vision.{word}_speedup"] == pytest.approx(ratio, rel=0.02)
    # Pixels of 17 views alone are 23 MB.
    assert figures["vision.1.peak_rss_mb"] + 20 < figures["vision.stock.peak_rss_mb"]
    assert figures["vision.loaded.rss_mb"] < figures["vision.16.peak_rss_mb"]
    assert 0 < figures["vision.preprocess_ms"] < 1000
    assert 0 < figures["vision.preprocess_large_ms"] < 3000
    printed = dict(line.split() for line in done.stdout.splitlines())
    assert printed == {key: str(value) for key, value in figures.items()}


def test_the_bench_says_why_it_cannot_measure(tmp_path: Path) -> None:
    for folder, why in ((tmp_path, "there is no genai_config.json"), (tmp_path / "x", "no folder")):
        done = bench("--vision", folder, "--quick")
        assert done.returncode == 1
        assert why in done.stderr
        assert "Traceback" not in done.stderr
