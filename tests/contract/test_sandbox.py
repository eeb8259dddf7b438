"""The engine where a sandbox forbids what phid.service's does not."""

from __future__ import annotations

import platform
import sys

import pytest

from contract.subjects import EngineProcess, scripted
from phid import channel
from phid.jobs import Ready

SETPRIORITY = {"x86_64": 141, "aarch64": 140}
# A filter of system calls that answers one with EPERM, and then the engine: seccomp(2), bpf(4).
WITHOUT = """\
import ctypes, os, struct, sys
number, *engine = sys.argv[1:]
deny, allow = 0x50001, 0x7FFF0000
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, int(number)), (0x06, 0, 0, deny), (0x06, 0, 0, allow)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
program = struct.pack("HP", len(steps), ctypes.addressof(code))
libc = ctypes.CDLL(None, use_errno=True)
NO_NEW_PRIVS, SECCOMP, FILTER = 38, 22, 2
assert libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0) == libc.prctl(SECCOMP, FILTER, program) == 0
try:
    os.nice(0)
except PermissionError:
    os.execv(engine[0], engine)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux's")
def test_an_engine_that_may_not_step_back_works(monkeypatch: pytest.MonkeyPatch) -> None:
    number = str(SETPRIORITY[platform.machine()])
    monkeypatch.setattr(channel, "ENGINE", (sys.executable, "-c", WITHOUT, number, *channel.ENGINE))
    engine = EngineProcess()
    try:
        assert isinstance(engine.load(scripted().load)[-1], Ready)
    finally:
        engine.close()
