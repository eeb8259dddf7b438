"""Links that break in the worst of moments."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cable import Cable
from integration.test_frames_wire import digits, png
from integration.test_laws import joined, script, words
from rig import Daemon, Mosquitto, until
from wire import BASE, PATIENCE, SLOWNESS, Requester

pytestmark = pytest.mark.mosquitto


def test_a_frame_whose_upload_is_cut_in_the_middle_comes_whole_and_runs_once(
    mosquitto: Mosquitto, requester: Requester, tmp_path: Path
) -> None:
    with Cable(mosquitto.port) as cable:
        daemon = Daemon(cable.port, tmp_path, mqtt__reconnect_max_s=0.5)
        daemon.start()
        try:
            requester.listen(f"{BASE}/dut/out/status")
            requester.status("online")
            cut_uploads(cable, requester, daemon)
        finally:
            daemon.close()
            print(daemon.log[-4000:])


KEEPALIVE_S = 5


@pytest.fixture
def cabled(mosquitto: Mosquitto, tmp_path: Path) -> Iterator[tuple[Cable, Daemon]]:
    """A daemon that is online over a cable, and soon sees that one is dead."""
    with Cable(mosquitto.port) as cable, Requester(mosquitto.port) as watcher:
        settings = {"mqtt__keepalive_s": KEEPALIVE_S, "mqtt__reconnect_max_s": 0.5}
        daemon = Daemon(cable.port, tmp_path, **settings)  # type: ignore[arg-type]
        watcher.listen(f"{BASE}/dut/out/status")
        daemon.start()
        try:
            watcher.online()
            yield cable, daemon
        finally:
            daemon.close()
            print(daemon.log[-4000:])


def begin(requester: Requester) -> None:
    """A request of half a second, accepted."""
    requester.request({"prompt": script(tokens=10, token_ms=50), "id": "r", "stream": "delta"})
    requester.wait(lambda h: h.type == "accepted")


def check_came_back(daemon: Daemon, requester: Requester) -> None:
    """The link was lost and is there again, and the request has been run once, with one outcome.

    What was cut off before its acknowledgement comes again, and says so.
    """
    assert daemon.logged("broker_away")
    assert requester.ask("afterwards")["text"] == "afterwards"
    assert len(daemon.logged("job_ended", id="r")) == 1
    outcomes = (one | {"duplicate": None} for one in requester.outcomes("r"))
    assert len({json.dumps(one, sort_keys=True) for one in outcomes}) == 1


def test_the_outcome_of_a_request_whose_link_is_half_open_comes_over_a_new_one(
    cabled: tuple[Cable, Daemon], requester: Requester
) -> None:
    cable, daemon = cabled
    begin(requester)
    cable.abandon()
    abandoned = time.monotonic()
    told = requester.wait(lambda h: h.type == "result", 20, "the outcome")
    assert told.json["text"] == words(10)
    assert told.at - abandoned < 1.5 * KEEPALIVE_S + 1.5 * SLOWNESS, "to notice, and to connect"
    check_came_back(daemon, requester)


def test_an_outcome_comes_when_a_broker_that_accepted_and_said_nothing_speaks_again(
    cabled: tuple[Cable, Daemon], requester: Requester
) -> None:
    cable, daemon = cabled
    begin(requester)
    cable.mute(1.5)
    told = requester.wait(lambda h: h.type == "result", 20, "the outcome")
    assert told.json["text"] == words(10)
    check_came_back(daemon, requester)


def test_a_link_that_stalls_for_less_than_its_keepalive_is_kept(
    cabled: tuple[Cable, Daemon], requester: Requester
) -> None:
    cable, daemon = cabled
    begin(requester)
    cable.stall(0.8)
    assert requester.outcome("r")["text"] == words(10)
    assert joined(requester, "r") == words(10)
    assert not daemon.logged("broker_away")
    assert len(requester.outcomes("r")) == 1


def cut_uploads(cable: Cable, requester: Requester, daemon: Daemon) -> None:
    frame = png(640, 480) + bytes(n % 251 for n in range(4 << 20))
    cut: list[bool] = []
    for n in range(3):
        breaker = threading.Thread(
            target=lambda: cut.append(cable.cut_within(1 << 20, 20 * PATIENCE))
        )
        breaker.start()
        until(lambda: cable.armed)
        requester.publish(
            f"{BASE}/dut/in/frame/{requester.name}",
            frame,
            reply_to=requester.rx,
            user=[("id", f"f{n}"), ("prompt", '@script {"see": true}')],
        )
        breaker.join()
        assert requester.outcome(f"f{n}")["text"].split() == [digits(frame)]
    assert cut == [True] * 3
    for n in range(3):
        first, *again = requester.outcomes(f"f{n}")
        assert all(o == first | {"duplicate": True} for o in again)
        assert len(daemon.logged("job_ended", id=f"f{n}")) == 1
    assert len(daemon.logged("broker_away")) == 3
