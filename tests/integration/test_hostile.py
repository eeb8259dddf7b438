"""Hostile clients get their due, and a good one beside them is served all the while."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flood import Flooder, GoodClient, flooder_of, rss_kb
from rig import Daemon, Mosquitto, serving
from wire import BASE, PATIENCE, Requester

pytestmark = pytest.mark.mosquitto

# On a machine with nothing else to do it is a tenth of this.
BOUND_S = 10.0
# FLOOD=100000 takes minutes; so does scripts/fuzz --flood 100000.
FLOOD = int(os.environ.get("FLOOD", "5000"))


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with serving(tmp_path_factory.mktemp("hostile"), log__level="warning") as daemon:
        yield daemon


@contextmanager
def good_client(daemon: Daemon) -> Iterator[GoodClient]:
    """Somebody who must be served in time, whatever happens in the block."""
    with GoodClient(daemon.port) as good:
        yield good
    assert good.faults == []
    assert good.times_s
    assert good.slowest_s < BOUND_S, good.times_s


def script(**directive: object) -> str:
    return "@script " + json.dumps(directive, ensure_ascii=False)


@pytest.mark.timeout(900)
def test_a_flood_of_bad_requests_is_refused_in_flat_memory(daemon: Daemon) -> None:
    with flooder_of(daemon) as flooder:
        flooder.flood(max(2000, FLOOD // 10))
        before = rss_kb(daemon)
        with good_client(daemon):
            flooder.flood(FLOOD)
        growth = (rss_kb(daemon) - before) / before
    assert growth < 0.02, f"{growth:.1%} of {before} kB"


@pytest.mark.timeout(300)
def test_a_flood_that_does_not_wait_for_its_answers(daemon: Daemon) -> None:
    flooder = Flooder(daemon.port, "hurried")
    with Requester(daemon.port) as watcher:
        for _ in range(20_000):
            flooder._client.publish(f"{BASE}/dut/in/text/hurried", b"{", 0)
        assert watcher.ask("after the flood", timeout=120)["text"] == "after the flood"
        assert watcher.ctl("ping")["ok"]
    flooder.close()


def test_a_client_that_never_reads_its_answers(daemon: Daemon) -> None:
    reader = subprocess.Popen(
        [
            *("mosquitto_sub", "-V", "5", "-p", str(daemon.port), "-i", "deaf", "-q", "1"),
            *("-v", "-t", f"{BASE}/dut/out/#"),
        ],
        stdout=subprocess.PIPE,
    )
    assert reader.stdout is not None
    assert reader.stdout.readline()  # retained ones: it is subscribed
    reader.send_signal(signal.SIGSTOP)
    try:
        with Requester(daemon.port, name="deaf-asker") as asker, good_client(daemon):
            before = rss_kb(daemon)
            for n in range(200):
                # On the default topic the deaf one is sent it all, too.
                asker.request(
                    {
                        "prompt": script(tokens=["x" * 2000] * 10),
                        "id": f"d{n}",
                        "stream": "delta",
                    },
                    reply_to=None,
                )
                time.sleep(0.01)
            asker.listen(f"{BASE}/dut/out/res/deaf-asker/+")
            assert asker.ask("still here")["text"] == "still here"
        assert rss_kb(daemon) - before < 20_000
    finally:
        reader.kill()
        reader.wait()
        reader.stdout.close()


def test_a_client_that_opens_a_thousand_ids(daemon: Daemon) -> None:
    slow = script(tokens=5, token_ms=10)
    with Requester(daemon.port) as greedy, good_client(daemon):
        for n in range(1000):  # faster than any of them could be answered
            greedy.request({"prompt": slow, "id": f"g{n}"}, wait=False)
        outcomes = Counter(
            outcome.get("code", "result")
            for outcome in (greedy.outcome(f"g{n}", 60) for n in range(1000))
        )
        assert outcomes["busy"] > 500
        assert outcomes["result"] >= 16
        assert outcomes.keys() == {"busy", "result"}
        assert all(len(greedy.outcomes(f"g{n}")) == 1 for n in range(0, 1000, 100))


def test_a_client_that_cancels_everything(daemon: Daemon) -> None:
    with Requester(daemon.port) as vandal, Requester(daemon.port) as victim:
        victim.request({"prompt": script(tokens=50, token_ms=20), "id": "mine", "max_tokens": 60})
        with good_client(daemon):
            for n in range(500):
                for request_id in ("mine", "*", "#", "", f"good{n}", None, {"all": True}):
                    vandal._client.publish(
                        f"{BASE}/dut/in/cancel/{vandal.name}", json.dumps({"id": request_id}), 1
                    )
            vandal.publish(f"{BASE}/dut/in/cancel", {"id": "mine"})
            vandal.publish(f"{BASE}/dut/in/cancel/+".replace("+", "all"), {"id": "mine"})
        assert victim.outcome("mine")["finish"] == "stop"
        assert vandal.ask("and it is still served itself", timeout=60)["finish"] == "stop"


def test_a_client_that_cancels_its_own_as_fast_as_it_asks(daemon: Daemon) -> None:
    with Requester(daemon.port) as fickle, good_client(daemon):
        for n in range(200):
            prompt = script(tokens=50, token_ms=20)
            fickle.request({"prompt": prompt, "id": f"f{n}", "stream": "delta"})
            fickle.cancel(f"f{n}")
        for n in range(200):
            outcome = fickle.outcome(f"f{n}", 60)
            assert (outcome.get("finish") or outcome["code"]) in ("cancelled", "busy")


def test_whoever_writes_into_the_inbox_of_phid_ask_does_not_disturb_it(daemon: Daemon) -> None:
    forged = {"type": "error", "id": "other", "code": "internal", "status": 500, "message": "no"}
    garbage = (b"", b"\xff", b"[]", b'{"type":"x"}', b"{" * 100_000, json.dumps(forged).encode())
    with Requester(daemon.port) as vandal:
        vandal.listen(f"{BASE}/dut/in/text/+")
        asking = subprocess.Popen(
            [
                *(sys.executable, "-m", "phid", "ask", "--device", "dut", "--host", "127.0.0.1"),
                *("--port", str(daemon.port), script(tokens=["one ", "two"], token_ms=300)),
            ],
            env=daemon._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        topic = vandal.wait(lambda h: "/in/text/cli-" in h.topic, 20, "its request").topic
        for payload in garbage:
            vandal.publish(f"{BASE}/client/{topic.rpartition('/')[2]}/rx", payload)
        out, err = asking.communicate(timeout=30 * PATIENCE)
    assert (asking.returncode, out) == (0, "one two\n"), err


# Text of every kind, in and out.

TEXTS = {
    "CJK": "日本語の文章 한국어 漢字𠮷",
    "right to left": "שלום עולם مرحبا",
    "direction marks": "\u202eabc\u202c \u200f",
    "emoji of many code points": "👩\u200d🚀 👨\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈 🇩🇪 👍🏽",
    "combining": "e\u0301 Z\u0351\u036b\u0343 n\u0303",
    "decomposed": unicodedata.normalize("NFD", "Ürümqi"),
    "beyond the BMP": "\U0001d54f \U0010fffd \U00020000",
    "no characters": "\ufffe \uffff \ufeff",
    "controls": "a\tb\nc\x1b[31m\x7f\x85",
    "separators": "a\u2028b\u2029c\u00a0d\u3000e",
    "JSON's own": '"\\/\b\f{}[]',
    "replacement character": "\ufffd",
}


@pytest.mark.parametrize("said", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("bytes_split", [False, True], ids=["whole", "split"])
def test_text_comes_back_as_it_went_in(daemon: Daemon, said: str, *, bytes_split: bool) -> None:
    prompt = script(tokens=[said, " ", said], bytes_split=bytes_split)
    with Requester(daemon.port) as asker:
        result = asker.ask(prompt, stream="delta", tags={"said": said[:64]})
        assert result["text"] == f"{said} {said}"
        deltas = [h.json["text"] for h in asker.of(result["id"]) if h.type == "delta"]
        assert result["text"].startswith("".join(deltas))
        assert all(unicodedata.category(c) != "Cs" for c in "".join(deltas))


@pytest.mark.parametrize("said", TEXTS.values(), ids=TEXTS.keys())
def test_escaped_and_plain_json_are_the_same_request(daemon: Daemon, said: str) -> None:
    request = {"prompt": said, "id": f"j{abs(hash(said))}", "system": said, "stop": [said + "!"]}
    with Requester(daemon.port) as asker:
        asker.request(json.dumps(request, ensure_ascii=True))
        first = asker.outcome(request["id"])
        asker.request(json.dumps(request, ensure_ascii=False), correlation=b"again")
        again = asker.wait(lambda h: h.correlation == b"again").json
        assert first["text"] == said
        assert again == first | {"duplicate": True}


@pytest.mark.parametrize(
    "payload",
    [
        rb'{"prompt": "\ud83d"}',
        rb'{"prompt": "\ude00\ud83d"}',
        b'{"prompt": "\xed\xa0\xbd\xed\xb8\x80"}',
        b'{"prompt": "\xc0\x80"}',
        b'{"prompt": "\xf0\x9f\x98"}',
        rb'{"prompt": "a\u0000b"}',
        b'{"prompt": "a\x00b"}',
        b'\xef\xbb\xbf{"prompt": "x"}',
        '{"prompt": "x", "\N{LATIN SMALL LETTER DOTLESS I}d": 1}'.encode(),
        '{"prompt": "x", "pr\u200bompt": "y"}'.encode(),
        '{"prompt": "x", "id": "\N{CYRILLIC SMALL LETTER A}1"}'.encode(),
        '{"prompt": "x", "max_tokens": ٣}'.encode(),
    ],
)
def test_what_is_no_text_is_refused(daemon: Daemon, payload: bytes) -> None:
    with Requester(daemon.port) as asker:
        asker.request(payload, correlation=b"c")
        error = asker.wait(lambda h: h.correlation == b"c").json
        assert (error["type"], error["code"]) == ("error", "bad_request")
        assert asker.ask("still here")["text"] == "still here"


@pytest.mark.parametrize("said", ["👩\u200d🚀", "日本", "שלום"])
def test_a_client_level_of_any_alphabet_is_told_to_be_none(daemon: Daemon, said: str) -> None:
    with Requester(daemon.port) as asker:
        asker.listen(f"{BASE}/dut/out/res/anon/+")
        asker.publish(f"{BASE}/dut/in/text/{said}", {"prompt": "x", "id": "u"}, correlation=b"u")
        assert asker.wait(lambda h: h.correlation == b"u").json["code"] == "not_found"


# Clocks that are wrong.


def site_of(folder: Path, now: float) -> Path:
    """A folder that sets a Python program's clock: what it says starts at `now`."""
    (folder / "sitecustomize.py").write_text(
        f"import time\n_real, _began = time.time, time.time()\n"
        f"time.time = lambda: {now} + (_real() - _began)\n"
    )
    return folder


@pytest.mark.parametrize("now", [-86_400.0, 0.0, 2.0**31 - 2, 2.0**32 + 1, 32_503_680_000.0])
def test_a_daemon_works_whatever_its_clock_says(
    mosquitto: Mosquitto, requester: Requester, tmp_path: Path, now: float
) -> None:
    daemon = Daemon(mosquitto.port, tmp_path)
    path = daemon._environment["PYTHONPATH"]
    daemon._environment["PYTHONPATH"] = f"{site_of(tmp_path, now)}{os.pathsep}{path}"
    requester.listen(f"{BASE}/dut/out/#")
    daemon.start()
    requester.status("online")
    assert requester.ask("what time is it?")["text"] == "what time is it?"
    status = requester.status("online")
    assert abs(status["ts"] - now) < 60
    event = requester.wait(lambda h: h.topic.endswith("/out/event") and h.type == "job").json
    assert abs(event["ts"] - now) < 60
    assert requester.ctl("discover")["ok"]
    assert daemon.stop() == 0, daemon.log
    assert requester.status("offline")["reason"] == "stopped"


def test_times_of_a_fleet_with_every_clock(daemon: Daemon, monkeypatch: Any) -> None:
    from phid import fleet

    monkeypatch.setattr("time.time", lambda: 0.0)
    seen = fleet.Seen("porch", status={"state": "online", "ts": 2**32})
    assert seen.row()["seen_s_ago"] == 0
