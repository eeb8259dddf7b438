"""A task for a process of its own: whatever that process does, the errand ends with an answer."""

from __future__ import annotations

import os
import sys
import time

import pytest

from phid import channel, errand, prover
from phid.jobs import EngineFacts, Load, Loading
from phid.probes import Verdict, start_engine
from phid.prover import try_out
from rig import child_pids
from wire import PATIENCE

SCRIPTED = Load("scripted", "m", "")
# A pipe holds 64 KB.
CHATTY = """\
import os, runpy
for _ in range(2_000):
    os.write(2, b"a native library says what it does " * 3 + b"\\n")
runpy.run_module("phid.engine", run_name="__main__")
"""
LEAVES_THE_LINE = """\
import time
from phid import channel
line = channel.inherited()
line.recv()
line.close()
time.sleep(3600)
"""
DIES_TALKING = """\
import os, signal
from phid import channel
channel.inherited().recv()
for n in range(100):
    os.write(2, b"word %d\\n" % n)
os.kill(os.getpid(), signal.SIGKILL)
"""


def runs(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def started(code: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Verdict, list[EngineFacts]]:
    """What the doctor finds of an engine that is this program."""
    monkeypatch.setattr(channel, "ENGINE", runs(code))
    heard: list[EngineFacts] = []
    return start_engine(SCRIPTED, 20 * PATIENCE, heard.append), heard


def test_a_sound_engine_that_prints_much_while_it_loads_is_sound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    verdict, heard = started(CHATTY, monkeypatch)
    assert verdict.verdict == "ok", verdict
    assert [facts.model for facts in heard] == ["m"]


def test_an_engine_that_leaves_the_line_and_stays_is_bad_and_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = set(child_pids(os.getpid()))
    verdict, _ = started(LEAVES_THE_LINE, monkeypatch)
    assert verdict.verdict == "bad"
    assert "left its line and did not end" in verdict.says
    assert set(child_pids(os.getpid())) <= before


def test_the_last_words_of_one_that_dies_are_heard() -> None:
    came = errand.run(runs(DIES_TALKING), "go", 20 * PATIENCE)
    assert came.answer is None
    assert came.died.startswith("was ended by SIGKILL")
    assert came.printed.splitlines()[-1] == "word 99"


def test_who_has_waited_long_enough_ends_the_errand_and_proves_nothing() -> None:
    before = set(child_pids(os.getpid()))

    def enough(loading: Loading) -> None:
        raise TimeoutError(loading.stage)

    began = time.monotonic()
    with pytest.raises(TimeoutError, match="reading the script"):
        try_out(Load("scripted", "m", "load_hang"), 4, 600, enough)
    assert time.monotonic() - began < 20 * PATIENCE
    assert set(child_pids(os.getpid())) <= before
    assert prover.try_out(SCRIPTED, 4, 20 * PATIENCE, lambda _: None).ran
