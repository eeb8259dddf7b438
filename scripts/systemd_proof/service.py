"""What phid.service promises: started, stopped, killed, starved, misled."""

from __future__ import annotations

import json
import os
import pwd
import re
import signal
import subprocess
import time
from pathlib import Path

from systemd_proof.machine import (
    CONFIG,
    UNIT,
    MemoryGroup,
    drop_in,
    engine_pid,
    install,
    online,
    pid,
    requester,
    run,
    show,
    start_anew,
    until,
    words,
)

MOST_EXPOSED = 1.5
"""Of 10, by systemd-analyze."""


def it_runs_as_its_own_user_without_rights_and_behind_the_filter() -> str:
    user = pwd.getpwnam("phid").pw_uid
    for process in (pid(), engine_pid()):
        status = Path(f"/proc/{process}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert fields["Uid"].split() == [str(user)] * 4, fields["Uid"]
        assert fields["NoNewPrivs"] == "1"
        assert fields["Seccomp"] == "2"
        assert int(fields["CapBnd"], 16) == int(fields["CapEff"], 16) == 0
    # When memory runs out, the engine goes first, and systemd does not end the service for it.
    for process, score in ((pid(), "0"), (engine_pid(), "800")):
        assert Path(f"/proc/{process}/oom_score_adj").read_text().strip() == score
    assert show("OOMPolicy") == "continue"
    # The engine steps behind the service, by a call that the filter has to let through.
    nice = [os.getpriority(os.PRIO_PROCESS, process) for process in (pid(), engine_pid())]
    assert nice == [5, 10], nice
    exposure = run("systemd-analyze", "security", "--no-pager", UNIT).splitlines()[-1]
    level = re.search(r"exposure level for \S+: ([0-9.]+)", exposure)
    assert level is not None, exposure
    assert float(level[1]) <= MOST_EXPOSED
    return exposure.strip("→ 🙂")


def it_answers() -> str:
    with requester() as client:
        text = client.ask("What is the capital of France?", max_tokens=16)["text"]
    assert "Paris" in text, text
    return repr(text)


def the_journal_has_fields_and_priorities() -> str:
    lines = [json.loads(line) for line in words(0, "-o", "json").splitlines()]
    ours = [line for line in lines if line.get("_COMM") in ("phid", "python")]
    events = {}
    for line in ours:
        content = json.loads(line["MESSAGE"])
        events[content["event"]] = line
        assert line["_SYSTEMD_UNIT"] == UNIT
        assert line["SYSLOG_IDENTIFIER"] == "phid"
    assert {"service_started", "broker_connected", "model_loaded"} <= events.keys(), events.keys()
    assert events["model_loaded"]["PRIORITY"] == "6"
    # Nothing that the runtime complains of: a system call that it missed, say.
    assert "engine_output" not in events, events["engine_output"]["MESSAGE"]
    return f"{len(ours)} lines, {len(events)} kinds of event"


def warnings_are_warnings_in_the_journal() -> str:
    began = time.time()
    run("systemctl", "stop", "mosquitto")
    run("systemctl", "start", "mosquitto")
    online()
    told = [
        line
        for line in words(began - 1, "-o", "json", "-p", "warning").splitlines()
        if "broker_away" in json.loads(line)["MESSAGE"]
    ]
    assert told
    return "a broker that was away is a warning: journalctl -p warning -u phid"


def a_reload_takes_new_settings_without_a_new_process() -> str:
    before, began = pid(), time.time()
    run("systemctl", "reload", UNIT)
    until(lambda: "settings_reloaded" in words(began - 1), what="the reload")
    assert pid() == before
    return "SIGHUP"


def a_restart_by_command_keeps_the_process() -> str:
    before, restarts = pid(), show("NRestarts")
    with requester() as client:
        client.ctl("restart", what="service")
        client.status("offline")
        client.status("online", 60)
    # Longer than TimeoutStopSec: systemd must not take it for a service that stops.
    time.sleep(65)
    assert (pid(), show("NRestarts"), show("SubState")) == (before, restarts, "running")
    return "and systemd lets it live"


def a_service_that_stands_still_is_killed_and_started_again() -> str:
    before, began, wall = pid(), time.monotonic(), time.time()
    restarts = int(show("NRestarts"))
    os.kill(before, signal.SIGSTOP)
    until(lambda: pid() not in (0, before), 90, "the watchdog's restart")
    took_s = time.monotonic() - began
    online()
    assert int(show("NRestarts")) == restarts + 1
    assert "Watchdog timeout" in words(wall)
    return f"another process after {took_s:.0f} s, then online"


def an_engine_that_is_killed_leaves_the_service_up() -> str:
    before, restarts = pid(), show("NRestarts")
    with requester() as client:
        os.kill(engine_pid(), signal.SIGKILL)
        client.wait(lambda h: '"degraded"' in h.payload.decode(), 20, "degraded")
        client.status("online", 30)
        assert client.ask("Say hello.", max_tokens=4)["type"] == "result"
    assert pid() == before
    assert show("NRestarts") == restarts
    return "the same service, another engine"


def a_kernel_that_ends_the_engine_for_memory_leaves_the_service_up() -> str:
    group = MemoryGroup()
    if not group.there:
        return "LEFT OUT here: this machine's kernel gives its containers no memory controller"
    with requester() as client:
        client.status("online")
        client.ask("Say hello.", max_tokens=4)
        service, engine, wall, killed = pid(), engine_pid(), time.time(), group.killed
        client.request({"id": "at-work", "prompt": "Count to one hundred.", "max_tokens": 200})
        time.sleep(0.3)
        # A request that is too large for the limit is refused: it is another who wants memory. (A
        # limit below what is used lets the kernel go on to the service before the engine is gone.)
        limit = group.used_bytes + (32 << 20)
        run("systemctl", "set-property", "--runtime", UNIT, f"MemoryMax={limit}")
        try:
            with group.glutton((96 << 20) + group.reclaimable_bytes):
                until(lambda: group.killed > killed, what="the kernel's kill")
        finally:
            run("systemctl", "set-property", "--runtime", UNIT, "MemoryMax=infinity")
        outcome = client.outcome("at-work", 120)
        client.status("online", 60)
    assert outcome["type"] == "result", outcome
    assert pid() == service
    assert engine_pid() != engine
    said = words(wall - 1, "-o", "cat").splitlines()
    assert any("killed by the OOM killer" in line for line in said), said
    told, *_ = [json.loads(line) for line in said if '"engine_ended"' in line]
    assert "SIGKILL (out of memory" in told["why"], told
    return (
        f"at MemoryMax={limit >> 20}M the engine {told['why']}; the same service, another engine,"
        " and the request that it was at has its result"
    )


def a_stop_answers_what_was_accepted() -> str:
    with requester() as client:
        client.status("online")
        client.request({"id": "last", "prompt": "Count to one hundred.", "max_tokens": 200})
        client.wait(lambda h: h.topic.endswith("/out/status") and h.json["queue"] >= 0)
        time.sleep(0.3)
        began, wall = time.monotonic(), time.time()
        run("systemctl", "stop", UNIT)
        took_s = time.monotonic() - began
        outcome = client.outcome("last", 5)
        client.status("offline", 5)
    assert outcome["type"] == "result", outcome
    assert show("Result") == "success"
    assert show("ExecMainStatus") == "0"
    assert "service_stopped" in words(wall - 1)
    run("systemctl", "start", UNIT)
    online()
    return f"{outcome['usage']['output_tokens']} tokens, stopped after {took_s:.1f} s"


def wrong_settings_end_it_with_78_and_it_is_not_tried_again() -> str:
    good, wall = CONFIG.read_text(), time.time()
    CONFIG.write_text(good + "\n[mqtt\nhost = ")
    try:
        run("systemctl", "restart", UNIT, check=False)
        until(lambda: show("ActiveState") == "failed", what="the end")
        time.sleep(4)  # twice RestartSec
        assert show("ExecMainStatus") == "78"
        assert show("NRestarts") == "0"
        said = words(wall)
        assert "/etc/phid/phid.toml" in said, said
        assert "Traceback" not in said, said
    finally:
        CONFIG.write_text(good)
    start_anew()
    return re.search(r"phid\[\d+\]: phid: (.*)", said)[1]  # type: ignore[index]


def a_rival_ends_it_with_75_and_it_is_not_tried_again() -> str:
    # Of two, the one with the greater name gives way; it is drawn at each start.
    rival_argv = ["/opt/phid/.venv/bin/phid", "run", "--config", str(CONFIG)]
    state = {"PHID_STATE_DIR": "/tmp/rival", "PHID_MODELS_DIR": "/tmp/none"}  # noqa: S108
    for _ in range(20):
        rival = subprocess.Popen(rival_argv, env=os.environ | state, stderr=subprocess.DEVNULL)
        until(
            lambda rival=rival: rival.poll() is not None or show("ActiveState") == "failed",
            200,  # the pauses between connections grow to a minute
            "one of the two giving way",
        )
        if rival.poll() is None:
            break
        assert rival.returncode == 75
        start_anew()  # to draw another: a low one would outlast rival after rival
    else:
        raise AssertionError("the rival gave way twenty times")
    time.sleep(4)
    assert show("ExecMainStatus") == "75"
    assert show("ActiveState") == "failed"
    rival.terminate()
    rival.wait(20)
    start_anew()
    return "the rival stayed"


def a_read_only_disk_is_told() -> str:
    wall = time.time()
    with drop_in("[Service]\nReadOnlyPaths=/var/lib/phid\n"), requester() as client:
        run("systemctl", "restart", UNIT)
        client.status("degraded", 30)
        reason = client.status("degraded")["reason"]
        assert "cannot be kept" in reason, reason
        assert "Traceback" not in words(wall)
        # An error is one in the journal, too: journalctl -p err.
        assert "journal_not_written" in words(wall - 1, "-p", "err")
    start_anew()
    return str(reason)


def a_start_that_always_fails_is_given_up_and_taken_up_again() -> str:
    wall = time.time()
    with drop_in("[Service]\nExecStart=\nExecStart=/bin/false\n"):
        run("systemctl", "reset-failed", UNIT)  # earlier starts count as well
        run("systemctl", "restart", UNIT, check=False)
        until(lambda: show("ActiveState") == "failed", 120, "the end of trying")
        tried = int(show("NRestarts"))  # with the last one, which is refused
    assert "Start request repeated too quickly" in words(wall - 1)
    assert tried == 10, tried
    began = time.monotonic()
    status, said = install()
    assert status == 0, said
    online()
    took_s = time.monotonic() - began
    return f"after {tried} starts; mended, scripts/install has it online in {took_s:.0f} s"
