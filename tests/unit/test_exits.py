"""How a process ended, in words."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from phid.exits import describe_exit


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (signal.SIGILL, "SIGILL (this build needs instructions this CPU does not have)"),
        (signal.SIGKILL, "SIGKILL (out of memory, or killed by hand)"),
        (signal.SIGSEGV, "SIGSEGV (a fault in native code)"),
        (signal.SIGTERM, "SIGTERM"),
    ],
)
def test_the_end_of_a_real_process(number: signal.Signals, says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import os; os.kill(os.getpid(), {int(number)})"], check=False
    )
    assert describe_exit(done.returncode) == f"was ended by {says}"


def test_a_status_is_told_as_it_is() -> None:
    assert describe_exit(3) == "ended with status 3"
    assert describe_exit(-200) == "was ended by signal 200"
