"""What a machine in the field has wrong: settings half written, state not ours, disks not to be
written, credentials that are missing. Each is a sentence, and the daemon goes on.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from rig import Daemon, DaemonFactory, Mosquitto, until
from wire import BASE, Requester

pytestmark = pytest.mark.mosquitto

WHOLE = "[limits]\nmax_tokens = 7\n[log]\nlevel = 'info'\n"


# Settings.


def test_settings_half_written_change_nothing_and_are_told_as_an_event(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    daemon = start_daemon()
    events = f"{BASE}/dut/out/event"
    requester.listen(events)

    def reload(text: str) -> dict[str, object]:
        """The event that a reload of this is told with."""
        daemon.config.write_text(text)
        before = len(requester.heard)
        daemon.signal(signal.SIGHUP)
        return dict(
            requester.wait(
                lambda h: h.topic == events and h.type == "reload" and h in requester.heard[before:]
            ).json
        )

    assert reload(WHOLE)["changed"] == ["limits.max_tokens"]
    for kept in (0, 5, 20, len(WHOLE) - 3):
        event = reload(WHOLE[:kept].replace("7", "9"))
        assert event["ok"] is False
        assert str(daemon.config) in str(event["reason"])
        assert requester.ask("x", max_tokens=8)["field"] == "max_tokens"
    assert requester.ask("x", max_tokens=7)["type"] == "result"
    event = reload(WHOLE.replace("7", "9"))
    assert (event["ok"], event["changed"]) == (True, ["limits.max_tokens"])
    assert requester.ask("x", max_tokens=9)["type"] == "result"
    assert daemon.logged("state_changed", state="degraded") == []


# State.


def test_state_of_a_later_version_is_set_aside_and_told(
    start_daemon: DaemonFactory, requester: Requester, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    later = {name: json.dumps({"schema": 2, "of": "tomorrow"}) for name in ("brokers", "watches")}
    for name, content in later.items():
        (state / f"{name}.json").write_text(content)
    daemon = start_daemon()
    assert requester.ask("x")["text"] == "x"
    requester.ctl("watch", name="yard", topic="cam/+", prompt="What?")
    for name, content in later.items():
        path = str(state / f"{name}.json")
        (told,) = daemon.logged("state_set_aside", path=path, level="error")
        assert "a later version of phid: its schema is 2, ours 1" in told["reason"]
        assert Path(told["kept"]).read_text() == content
    daemon.stop()
    assert json.loads((state / "watches.json").read_text())["watches"][0]["name"] == "yard"
    daemon.start()
    until(lambda: len(daemon.logged("model_loaded")) == 2)
    assert len(daemon.logged("state_set_aside")) == 2


@pytest.mark.namespace
def test_a_state_folder_that_cannot_be_written_is_told_and_nothing_is_promised(
    mosquitto: Mosquitto, requester: Requester, tmp_path: Path
) -> None:
    daemon = Daemon(mosquitto.port, tmp_path)
    state = tmp_path / "state"
    state.mkdir()
    mount = f"mount -t tmpfs -o ro none {state} && exec {sys.executable} -m phid run"
    root = [] if os.geteuid() == 0 else ["--map-root-user"]
    daemon.start(["unshare", "--mount", *root, "sh", "-c", mount])
    try:
        requester.listen(f"{BASE}/dut/out/status")
        reason = requester.status("degraded")["reason"]
        assert "what is accepted cannot be kept" in reason
        assert str(state) in reason
        error = requester.ask("x", id="kept")
        assert (error["code"], error["message"]) == ("busy", reason)
        assert error["retry_after_ms"] > 0
        # What asks for no such promise is served, and so is whoever looks after it.
        requester.request({"prompt": "at QoS 0", "id": "light"}, qos=0)
        assert requester.outcome("light")["text"] == "at QoS 0"
        assert requester.ctl("ping")["data"]["state"] == "degraded"
        answer = requester.ctl("watch", name="yard", topic="cam/+", prompt="What?")
        assert answer["data"]["state"] == "on"
        until(lambda: daemon.logged("notebook_not_written"))
        assert daemon.stop() == 0
    finally:
        daemon.close()
    assert "Traceback" not in daemon.log
    assert list(state.iterdir()) == []


# Credentials.


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("password_file", "No such file"),
        ("ca_file", "mqtt.ca_file"),
        ("cert_file", "mqtt.cert_file"),
    ],
)
def test_a_credential_that_is_missing_is_named_and_waited_for(
    mosquitto: Mosquitto, requester: Requester, tmp_path: Path, name: str, says: str
) -> None:
    missing = tmp_path / "credentials" / "missing"
    tls = {} if name == "password_file" else {"mqtt__tls": "true"}
    daemon = Daemon(
        *(mosquitto.port, tmp_path),
        **{f"mqtt__{name}": missing, "mqtt__username": "dut", "mqtt__reconnect_max_s": "1"},
        **tls,
    )
    daemon.start()
    try:
        away = until(lambda: daemon.logged("broker_away", level="error"), what="the word")[0]
        assert says in away["reason"]
        assert str(missing) in away["reason"]
        assert "Traceback" not in daemon.log
        if name == "password_file":
            missing.parent.mkdir()
            missing.write_text("secret\n")
            requester.listen(f"{BASE}/dut/out/status")
            assert requester.status("online")
            assert "secret" not in daemon.log
        assert daemon.stop() == 0
    finally:
        daemon.close()
        print(daemon.log[-3000:])
