"""The progress of long work: shown where somebody looks, and never in its way."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rig import ROOT

WORK = """
from phid.progress import Progress
show = Progress()
for fraction in (None, 0.25, 0.5, 1.0):
    show("fetching", fraction)
print("done")
"""
LOOK = """
from phid.progress import Progress
show = Progress()
show.end()
show("looking", None)
show.end()
show.end()
print("done")
"""


def work(stderr: int, program: str = WORK) -> str:
    """What the work says on stdout when it is over."""
    return subprocess.run(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE, stderr=stderr, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "daemon")},
    ).stdout.strip()  # fmt: skip


@pytest.fixture
def terminal() -> tuple[int, int]:
    """Who looks, and what is written to."""
    return os.openpty()


def test_on_a_terminal_one_line_is_written_anew(terminal: tuple[int, int]) -> None:
    looks, written = terminal
    assert work(written) == "done"
    shown = os.read(looks, 4096).decode()
    assert [line.strip() for line in shown.split("\r\x1b[K")[1:]] == [
        "fetching", "fetching  25%", "fetching  50%", "fetching 100%",
    ]  # fmt: skip
    os.close(looks)
    os.close(written)


def test_an_answer_has_a_line_of_its_own(terminal: tuple[int, int]) -> None:
    looks, written = terminal
    assert work(written, LOOK) == "done"
    assert os.read(looks, 4096).decode() == "\r\x1b[Klooking\r\n"
    os.close(looks)
    os.close(written)


def test_a_terminal_that_has_gone_does_not_stop_the_work(terminal: tuple[int, int]) -> None:
    looks, written = terminal
    os.close(looks)
    assert work(written) == "done"
    os.close(written)


def test_elsewhere_each_stage_is_one_line() -> None:
    read, write = os.pipe()
    assert work(write) == "done"
    os.close(write)
    with os.fdopen(read) as said:
        assert said.read() == "fetching\n"
