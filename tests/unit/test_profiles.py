"""The device profiles in config/profiles: settings that load, each with its reason, that fit."""

from __future__ import annotations

import itertools
import re
import tomllib
from pathlib import Path

import pytest

from phid import catalog, fit, memory, settings
from rig import ROOT

PROFILES = sorted((ROOT / "config" / "profiles").glob("*.toml"))
MIB = 1 << 20
BUILDS = {build.name: build for build in catalog.shipped()}
VIEWS_AT_HIGH = 17


def reckoned_mb(model: str, tokens: int, views: int) -> float:
    """The most an engine takes, in MiB, as `phid models fit` and the service reckon it."""
    needs = fit.of_build(BUILDS[model])
    asked_bytes = tokens * needs.kv_bytes_per_token + views * memory.VIEW_BYTES
    return (needs.loaded_bytes + asked_bytes) / MIB


@pytest.fixture(params=PROFILES, ids=[path.stem for path in PROFILES])
def profile(request: pytest.FixtureRequest) -> Path:
    path = request.param
    assert isinstance(path, Path)
    return path


def test_there_is_one_for_each_device_we_name() -> None:
    assert [path.stem for path in PROFILES] == [
        "jetson-agx-orin",
        "jetson-orin-nano",
        "raspberry-pi-5-16gb",
        "raspberry-pi-5-8gb",
        "x86-minipc",
    ]


def test_it_loads(profile: Path) -> None:
    loaded = settings.load(profile)
    assert loaded.engine.model in BUILDS
    assert loaded.health.pause_above_c > 0


def test_it_says_what_a_device_is_chosen_by(profile: Path) -> None:
    said = tomllib.loads(profile.read_text())
    assert {"model", "threads", "max_context", "memory_mb"} <= said["engine"].keys()
    assert {"max_tokens", "backlog", "per_client", "backlog_bytes"} <= said["limits"].keys()
    assert "pause_above_c" in said["health"]


def test_it_names_its_providers_and_runs_whatever_becomes_of_them(profile: Path) -> None:
    assert "providers" in tomllib.loads(profile.read_text())
    assert not settings.load(profile).require_provider


def test_each_line_has_its_reason(profile: Path) -> None:
    lines = profile.read_text().splitlines()
    for above, line in itertools.pairwise(lines):
        if re.match(r"\w+ = ", line):
            assert above.startswith("# "), f"{line}: no reason above it"


def test_the_budget_holds_the_context_and_its_pictures(profile: Path) -> None:
    engine = settings.load(profile).engine
    # Of pictures at high no more than two go into 4096 tokens: 1921 each.
    pictures = engine.max_context // 1921 if engine.model == "phi-3.5-vision" else 0
    needed_mb = reckoned_mb(engine.model, engine.max_context, pictures * VIEWS_AT_HIGH)
    assert needed_mb < engine.memory_mb < needed_mb * 1.15


def test_the_budget_is_less_than_what_the_comment_says_is_left(profile: Path) -> None:
    found = re.search(r"^#   left +(\d+)$", profile.read_text(), re.MULTILINE)
    assert found is not None
    assert settings.load(profile).engine.memory_mb < int(found[1])


def test_the_sums_in_the_comments_are_right(profile: Path) -> None:
    text = profile.read_text()
    rows = re.findall(r"^#   (\S.*?) {2,}(?:about |- *)?(\d+)(?:[:,]|$)", text, re.MULTILINE)
    table = {what: int(number) for what, number in rows}
    seen, *taken = [n for what, n in table.items() if not re.match(r"left|Phi|\d|two", what)]
    assert table["left"] == seen - sum(taken)
    model = settings.load(profile).engine.model
    loaded_mb = reckoned_mb(model, 0, 0)
    for what, number in table.items():
        expected: float | None = None
        if what.startswith("Phi"):
            expected = loaded_mb
        elif tokens := re.match(r"(\d+) tokens x 0.75", what):
            expected = reckoned_mb(model, int(tokens[1]), 0) - loaded_mb
        elif what.startswith("two pictures at high"):
            expected = reckoned_mb(model, 0, 2 * VIEWS_AT_HIGH) - loaded_mb
        if expected is not None:
            assert number == pytest.approx(expected, abs=1), what


def test_the_readmes_table_says_what_they_say(profile: Path) -> None:
    (row,) = re.findall(
        rf"^\| \[{profile.stem}\].*$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    _, shown_model, context, peak, budget, _ = (cell.strip() for cell in row.strip("|").split("|"))
    engine = settings.load(profile).engine
    assert shown_model.lower() == engine.model
    assert int(context) == engine.max_context
    pictures = engine.max_context // 1921 if engine.model == "phi-3.5-vision" else 0
    peak_mb = reckoned_mb(engine.model, engine.max_context, pictures * VIEWS_AT_HIGH)
    assert peak == f"{peak_mb / 1024:.1f} GiB"
    assert budget == f"{engine.memory_mb / 1024:.1f} GiB"
