"""The device profiles in config/profiles: settings that load, each with its reason, that fit."""

from __future__ import annotations

import itertools
import re
import tomllib
from pathlib import Path

import pytest

from phid import settings
from rig import ROOT

PROFILES = sorted((ROOT / "config" / "profiles").glob("*.toml"))
# Before a line that only a later phid knows.
MARKER = "#when known: "
MIB = 1 << 20
# Microsoft's int4 builds for the CPU, bytes of all their files.
FILES = {"phi-3.5-mini": 2_782_186_064, "phi-3.5-vision": 3_220_612_860}
VIEWS_AT_HIGH = 17


def reckoned_mb(model: str, tokens: int, views: int) -> float:
    """Peak memory in MiB, by the rule in ARCHITECTURE's decision on memory."""
    return 1.226 * FILES[model] / MIB + 204 + 0.75 * tokens + 50.6 * views


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
    assert loaded.engine.model in FILES
    assert loaded.health.pause_above_c > 0


def test_what_a_later_phid_knows_is_toml_and_not_known_yet(profile: Path) -> None:
    text = profile.read_text()
    later = [line.removeprefix(MARKER) for line in text.splitlines() if line.startswith(MARKER)]
    assert later, "a profile names its providers"
    for line in later:
        (name,) = tomllib.loads(line)
        assert name not in settings.names(), f"{name} is known now: take away '{MARKER}'"


def test_each_line_has_its_reason(profile: Path) -> None:
    lines = profile.read_text().splitlines()
    for above, line in itertools.pairwise(lines):
        if re.match(rf"(?:{re.escape(MARKER)})?\w+ = ", line):
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
    for what, number in table.items():
        if tokens := re.match(r"(\d+) tokens x 0.75", what):
            assert number == int(tokens[1]) * 0.75
    model = settings.load(profile).engine.model
    said = next(number for what, number in table.items() if what.startswith("Phi"))
    assert said == pytest.approx(reckoned_mb(model, 0, 0), abs=1)
