"""Every decoder takes or refuses whatever comes, in time; scripts/fuzz runs as many as wanted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fuzzer import looker
from fuzzer.payloads import Payloads
from fuzzer.pixels import fuzz_pixels
from fuzzer.runs import fuzz
from fuzzer.seeds import seeds
from fuzzer.source import Source
from phid import commands, messages, requests
from phid.errors import Refused
from phid.requests import Request
from rig import ROOT

LIMIT_BYTES = 1_048_576
COUNT = 20_000
PICTURES = int(os.environ.get("PHID_TEST_IMAGES", "3000"))
SEED = 20_261_123


def test_nothing_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHID_CONFIG", "")  # the fuzzer clears PHID_*: put back afterwards
    tally = fuzz(COUNT, SEED)
    assert tally.escapes == []
    assert sum(tally.runs.values()) == COUNT
    # A fuzzer whose inputs are all refused at the door tests only the door.
    for name in set(tally.runs) - {"salvage", "cancel", "large"}:
        assert tally.taken[name] > 0.02 * tally.runs[name], name


def test_the_same_seed_gives_the_same_inputs() -> None:
    one, other = Source(7), Source(7)
    assert [one.inbound() for _ in range(100)] == [other.inbound() for _ in range(100)]


def test_an_escape_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object) -> None:
        raise KeyError("id")

    monkeypatch.setattr(commands, "decode_cancel", fault)
    escapes = fuzz(300, 1).escapes
    assert escapes
    assert all("KeyError" in escape["escape"] for escape in escapes)


BRACKETS = (b"[],", b"{},", b"[1],", b'["x"],', b'{"a":1},', b'"[",', b'"\\"{",', b'"["')
HEADS = (b'{"stop":[', b'{"messages":[', b'{"tags":{"a":[', b'{"prompt":"x","model":[', b'"')


@pytest.mark.parametrize("unit", BRACKETS)
@pytest.mark.parametrize("head", HEADS)
def test_a_megabyte_of_brackets_does_not_hold_the_interpreter(head: bytes, unit: bytes) -> None:
    payload = head + unit * ((LIMIT_BYTES - len(head) - 2) // len(unit)) + b"1]"
    times = []
    for _ in range(3):
        began = time.thread_time()  # somebody else may have the CPU
        with pytest.raises(Refused):
            requests.decode_request(payload, LIMIT_BYTES)
        requests.salvage(payload, LIMIT_BYTES)
        times.append(time.thread_time() - began)
    assert min(times) < 0.25


@pytest.mark.parametrize("quoted", ["[", '["{', "\\[", '\\"[', "[\n"])
def test_a_prompt_may_quote_as_many_brackets_as_it_likes(quoted: str) -> None:
    request = Request(prompt=quoted * 20_000, stop=("]", "["))
    assert requests.decode_request(messages.encode(request), LIMIT_BYTES) == request


# Pictures, in a process that may die of them.


def test_no_picture_harms_the_decoder() -> None:
    seen = fuzz_pixels(PICTURES, SEED)
    assert (seen.escapes, seen.deaths, seen.words) == ([], 0, "")
    assert seen.clean
    assert seen.runs == PICTURES
    # Enough get beyond the header, and enough are pictures still.
    for kind in ("jpeg", "png", "webp", "bmp"):
        assert seen.came[f"shown {kind}"] > 0.01 * PICTURES, kind
        assert seen.came[f"body {kind} unsupported"] > 0.01 * PICTURES, kind


def test_each_seed_is_a_picture_or_refused_for_what_it_is() -> None:
    odd = ("12 bits", "arithmetic", "animated", "gif", "pdf", "half", "bomb", "text", "nothing")
    for name, data in seeds().items():
        came = looker.look(data, 1)
        refused = any(word in name for word in odd) and name not in {
            *("png animated late", "png text"),  # the one has its first picture, the other a note
        }
        assert came.startswith("shown") is not refused, (name, came)


def test_the_same_number_gives_the_same_picture_file() -> None:
    one, other = Payloads(7), Payloads(7)
    assert [one.payload(n) for n in range(50)] == [other.payload(n) for n in range(50)]
    assert one.payload(3) == other.payload(3)


FAULTS = """
import ctypes, json
from fuzzer import looker, pixels
from fuzzer.payloads import Payloads
look, fatal, wrong, slow = looker.look, *(Payloads(3).payload(n) for n in (5, 7, 8))
pixels.HUNG_S = 3.0

def faulty(data, crops):
    if data == fatal:
        ctypes.string_at(0)
    if data == wrong:
        raise KeyError("id")
    while data == slow:
        pass
    return look(data, crops)

looker.look = faulty  # in the process that looks too: it imports this file
if __name__ == "__main__":
    seen = pixels.fuzz_pixels(20, 3)
    escapes = [[escape["payload"], escape["escape"]] for escape in seen.escapes]
    print(json.dumps([seen.runs, seen.clean, seen.deaths, escapes]))
"""


def test_a_crash_a_hang_and_an_exception_are_seen(tmp_path: Path) -> None:
    script = tmp_path / "faults.py"
    script.write_text(FAULTS)
    env = os.environ | {"PYTHONPATH": str(ROOT / "scripts")}
    done = subprocess.run(
        [sys.executable, str(script)], env=env, check=True, capture_output=True, text=True
    )
    runs, clean, deaths, escapes = json.loads(done.stdout)
    assert (runs, clean, deaths) == (20, False, 2)
    assert escapes == [[5, "SIGSEGV"], [7, "KeyError: 'id'"], [8, "hung for 3 s"]]
