"""Links that break in the worst of moments."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from cable import Cable
from integration.test_frames_wire import digits, png
from rig import Daemon, Mosquitto, until
from wire import BASE, PATIENCE, Requester

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
