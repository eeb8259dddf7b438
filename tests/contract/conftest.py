"""The subjects of the contract suites, started and ended."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from contract.subjects import DEMO, EngineProcess, Subject, genai, scripted
from phid.jobs import Ready

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="session")
def demo_folder(models_dir: Path) -> Path:
    """The demo model's folder."""
    return models_dir / DEMO


@pytest.fixture(
    scope="session", params=["scripted", pytest.param("genai", marks=pytest.mark.model)]
)
def subject(request: pytest.FixtureRequest) -> Subject:
    if request.param == "scripted":
        return scripted()
    return genai(request.getfixturevalue("demo_folder"))


@pytest.fixture(scope="session")
def shared(subject: Subject) -> Iterator[EngineProcess]:
    """A loaded engine that tests leave as they found it: idle."""
    engine = EngineProcess()
    try:
        assert isinstance(engine.load(subject.load)[-1], Ready)
        yield engine
    finally:
        engine.close()


@pytest.fixture
def start() -> Iterator[Callable[[], EngineProcess]]:
    """Start engines that this test may break."""
    engines: list[EngineProcess] = []

    def start() -> EngineProcess:
        engines.append(EngineProcess())
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()
