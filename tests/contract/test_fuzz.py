"""Every decoder takes or refuses whatever comes, in time; scripts/fuzz runs as many as wanted."""

from __future__ import annotations

import importlib.util
import sys
import time
from types import ModuleType

import pytest

from phid import messages, requests
from phid.errors import Refused
from phid.requests import Request
from rig import ROOT

LIMIT_BYTES = 1_048_576
COUNT = 20_000
SEED = 20_261_123


@pytest.fixture(scope="module")
def fuzzer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_fuzz", ROOT / "scripts" / "_fuzz.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["_fuzz"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_nothing_escapes(fuzzer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHID_CONFIG", "")  # the fuzzer clears PHID_*: put back afterwards
    tally = fuzzer.fuzz(COUNT, SEED)
    assert tally.escapes == []
    assert sum(tally.runs.values()) == COUNT
    # A fuzzer whose inputs are all refused at the door tests only the door.
    for name in ("request", "intake", "frame", "command", "answer", "fleet", "settings", "topic"):
        assert tally.taken[name] > 0.02 * tally.runs[name], name


def test_the_same_seed_gives_the_same_inputs(fuzzer: ModuleType) -> None:
    one, other = fuzzer.Source(7), fuzzer.Source(7)
    assert [one.inbound() for _ in range(100)] == [other.inbound() for _ in range(100)]


def test_an_escape_is_seen(fuzzer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object) -> None:
        raise KeyError("id")

    monkeypatch.setattr(fuzzer.requests, "decode_cancel", fault)
    escapes = fuzzer.fuzz(300, 1).escapes
    assert escapes
    assert all(escape["escape"].startswith("KeyError") for escape in escapes)


BRACKETS = (b"[],", b"{},", b"[1],", b'["x"],', b'{"a":1},', b'"[",', b'"\\"{",', b'"["')
HEADS = (b'{"stop":[', b'{"messages":[', b'{"tags":{"a":[', b'{"prompt":"x","model":[', b'"')


@pytest.mark.parametrize("unit", BRACKETS)
@pytest.mark.parametrize("head", HEADS)
def test_a_megabyte_of_brackets_does_not_hold_the_interpreter(head: bytes, unit: bytes) -> None:
    payload = head + unit * ((LIMIT_BYTES - len(head) - 2) // len(unit)) + b"1]"
    times = []
    for _ in range(3):  # somebody else may have had the CPU
        began = time.perf_counter()
        with pytest.raises(Refused):
            requests.decode_request(payload, LIMIT_BYTES)
        requests.salvage(payload, LIMIT_BYTES)
        times.append(time.perf_counter() - began)
    assert min(times) < 0.25


@pytest.mark.parametrize("quoted", ["[", '["{', "\\[", '\\"[', "[\n"])
def test_a_prompt_may_quote_as_many_brackets_as_it_likes(quoted: str) -> None:
    request = Request(prompt=quoted * 20_000, stop=("]", "["))
    assert requests.decode_request(messages.encode(request), LIMIT_BYTES) == request
