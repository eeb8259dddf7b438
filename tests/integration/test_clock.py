"""A machine without a battery: its clock starts in 1970, and is set once there is a network."""

from __future__ import annotations

import base64
import os
import signal
import time
from pathlib import Path

import pytest

from acceptance.test_doctor import doctor
from authority import Authority
from integration.test_laws import script
from rig import Daemon, DaemonFactory, Mosquitto, free_port, until
from wire import BASE, Requester

pytestmark = pytest.mark.mosquitto

DAY_S = 86_400.0
SCENE = Path(__file__).parents[1] / "models" / "scene.jpg"


class SetClock:
    """The clock of the programs that have its folder on their path: off by what is in a file."""

    def __init__(self, folder: Path, off_s: float) -> None:
        self.folder = folder / "clock"
        self.folder.mkdir()
        self._file = self.folder / "off_s"
        self.set(off_s)
        (self.folder / "sitecustomize.py").write_text(
            f"import time\n_real = time.time\n"
            f"time.time = lambda: _real() + float(open({str(self._file)!r}).read())\n"
        )

    def set(self, off_s: float) -> None:
        fresh = self._file.with_suffix(".new")
        fresh.write_text(repr(off_s))
        fresh.replace(self._file)

    def rules(self, daemon: Daemon) -> None:
        path = daemon._environment["PYTHONPATH"]
        daemon._environment["PYTHONPATH"] = f"{self.folder}{os.pathsep}{path}"


@pytest.mark.parametrize(
    "off_s",
    [1000 - time.time(), -3 * DAY_S],
    ids=["in 1970", "as at the last shutdown"],
)
def test_a_clock_that_is_set_makes_nothing_late_not_even_after_a_kill(
    mosquitto: Mosquitto, tmp_path: Path, off_s: float
) -> None:
    clock = SetClock(tmp_path, off_s)
    daemon = Daemon(mosquitto.port, tmp_path, health__heartbeat_s=0.5)
    clock.rules(daemon)
    daemon.start()
    try:
        with Requester(mosquitto.port) as asker:
            asker.listen(f"{BASE}/dut/out/status")
            asker.status("online")
            assert asker.ask("before", id="before")["text"] == "before"
            asker.request({"prompt": script(tokens=900, token_ms=1000), "id": "runs"})
            asker.request({"prompt": "waits", "id": "waits", "deadline_ms": 300_000})
            assert asker.ctl("ping")["data"]["queue"] == 1
            clock.set(0.0)
            until(lambda: daemon.logged("clock_stepped"), what="the step")
            until(lambda: abs(asker.status("online")["ts"] - time.time()) < 30, what="the time")
            assert abs(asker.status("online")["since"] - time.time()) < 60
            assert asker.outcomes("runs") == asker.outcomes("waits") == []
            daemon.stop(signal.SIGKILL)
            daemon.start()
            until(lambda: len(daemon.logged("model_loaded")) == 2, what="the second start")
            assert asker.ctl("ping")["data"]["queue"] == 1
            asker.cancel("runs")
            over = asker.outcome("runs")
            assert (over.get("finish") or over["code"]) == "cancelled"
            assert asker.outcome("waits")["text"] == "waits"
            # What had ended before is remembered, and not run again.
            asker.request({"prompt": "before", "id": "before"}, correlation=b"again")
            again = asker.wait(lambda h: h.correlation == b"again").json
            assert (again["text"], again["duplicate"]) == ("before", True)
    finally:
        daemon.close()
        print(daemon.log[-4000:])


def test_cameras_are_looked_at_before_and_after_the_clock_is_set(
    mosquitto: Mosquitto, tmp_path: Path
) -> None:
    clock = SetClock(tmp_path, 1000 - time.time())
    daemon = Daemon(mosquitto.port, tmp_path, engine__model="eye?vision")
    daemon.config.write_text(
        '[[watches]]\nname = "yard"\ntopic = "cam/+"\nprompt = "What?"\nmin_interval_s = 0\n'
    )
    clock.rules(daemon)
    daemon.start()
    picture = base64.b64encode(SCENE.read_bytes()).decode()
    try:
        with Requester(mosquitto.port) as camera:
            camera.listen(f"{BASE}/dut/out/#")
            camera.online()
            for name in ("early", "late"):
                if name == "late":
                    clock.set(0.0)
                    until(lambda: daemon.logged("clock_stepped"), what="the step")
                camera.publish(f"cam/{name}", {"b64": picture, "ts": time.time()})
                camera.wait(
                    lambda h, n=name: h.type == "watch_result" and h.json["camera"] == n, 10, name
                )
    finally:
        daemon.close()
        print(daemon.log[-4000:])


def test_a_certificate_of_tomorrow_is_told_with_what_the_clock_says(
    tmp_path: Path, start_daemon: DaemonFactory
) -> None:
    authority = Authority(tmp_path / "ca")
    certificate, key = authority.issue("broker", host="127.0.0.1", begins="20900101000000Z")
    port = free_port()
    (tmp_path / "tls").mkdir()
    broker = Mosquitto(
        tmp_path / "tls",
        f"listener {port} 127.0.0.1\ncertfile {certificate}\nkeyfile {key}\nallow_anonymous true\n",
        head="per_listener_settings true\n",
    )
    broker.start()
    tls = {"mqtt__tls": "true", "mqtt__ca_file": str(authority.certificate)}
    today = time.strftime("%Y-%m-%d", time.gmtime())
    try:
        daemon = start_daemon("early", wait=False, **tls, mqtt__port=port)
        away = until(lambda: daemon.logged("broker_away"), what="a refusal")[0]
        examined = doctor(port, **tls)
    finally:
        broker.stop()
    for says in (away["reason"], examined.verdict("broker")["says"]):
        assert "certificate is not yet valid" in says
        assert f"this machine's clock, which says {today}" in says
        assert "timedatectl" in says
    # It is tried again as after a lost link, for nobody has refused us.
    assert away["retry_s"] < 5
    assert "clock" in examined.verdict("broker")["mend"]
    assert "Traceback" not in daemon.log
