"""What the doctor finds out by trying: the broker, the daemon behind it, an engine's start."""

from __future__ import annotations

import os
import shlex
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from phid import channel, credentials, errand, messages
from phid.client import Client, Unreachable
from phid.commands import Command
from phid.jobs import EngineFacts, Load, LoadFailed, Ready
from phid.messages import CtlReply
from phid.sections import Mqtt
from phid.settings import Settings
from phid.topics import ANON
from phid.traffic import Inbound

_CONNECT_S = 2.0
_ANSWER_S = 2.0
_OLD_PROTOCOL = "3.1.1"
# How a daemon's reason begins when it has no model, or not the one it should have.
_NO_MODEL = ("there is no model", "not_found: ")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found of one thing; `mend` is the line that helps where it is not ok."""

    name: str
    verdict: Literal["ok", "warn", "bad"]
    says: str
    mend: str | None = None


@dataclass(frozen=True, slots=True)
class Reached:
    """How far a ping came. `status` and `info` are the daemon's retained words, if they came."""

    broker: Verdict
    daemon: Verdict
    status: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    answered: bool = False

    @property
    def facts(self) -> dict[str, Any]:
        """What the daemon says of the model it has loaded; empty if it has none, or is away."""
        model = self.info.get("model")
        loaded = self.answered and self.status.get("provider") and isinstance(model, dict)
        return dict(model) if loaded and model else {}


def ping(settings: Settings, version: str) -> Reached:
    """Ask the configured device for a sign of life, as a client of our own; takes seconds at most.

    It has a client id of its own: using the daemon's would end the daemon's session.
    """
    mqtt = settings.mqtt
    try:
        return _ping(settings, version)
    except Unreachable as error:
        away = error
    if mqtt.protocol == "auto" and not away.refused and "MQTT" in str(away):
        # A daemon falls back after three attempts, for which there is no time here.
        try:
            mqtt = mqtt.model_copy(update={"protocol": _OLD_PROTOCOL})
            return _ping(settings.model_copy(update={"mqtt": mqtt}), version)
        except Unreachable as error:
            away = error
    if "certificate" in str(away):
        mend = "mqtt.ca_file: who signed it; mqtt.host: the name in it; this machine's clock: date"
    elif away.refused:
        mend = "mqtt.username, mqtt.password_file, mqtt.ca_file: as this broker knows them"
    else:
        mend = "mqtt.host, mqtt.port: where a broker runs (for a try: phid broker)"
    return Reached(
        Verdict("broker", "bad", str(away), mend),
        Verdict("daemon", "bad", "cannot be asked without a broker", "mend the broker first"),
    )


def _ping(settings: Settings, version: str) -> Reached:
    mqtt, topics = settings.mqtt, settings.topics
    command = Command(id=uuid.uuid4().hex[:12])
    # The default reply topic is the device's own: its user may read it, whatever the ACL.
    answers = topics.res(ANON, command.id or "")
    outs = {topics.status: "status", topics.info: "info"}
    said: dict[str, dict[str, Any]] = {"status": {}, "info": {}}
    began = time.monotonic()
    with Client(mqtt, (answers, *outs), name=f"doctor-{uuid.uuid4().hex[:8]}") as client:
        client.connect(_CONNECT_S, once=True)
        connected_ms = (time.monotonic() - began) * 1000
        asked = time.monotonic()
        client.publish(topics.ctl("ping"), messages.encode(command))
        answer, late = None, asked + _ANSWER_S
        while answer is None and (inbound := client.receive(late)) is not None:
            if inbound.topic in outs:
                said[outs[inbound.topic]] = _report(inbound)
            else:
                answer = _answer(inbound, command)
        round_trip_ms = (time.monotonic() - asked) * 1000
        # Retained messages come with the subscription, but in no order with the answer.
        late = time.monotonic() + 0.3
        while answer is not None and not all(said.values()):
            if (inbound := client.receive(late)) is None:
                break
            if inbound.topic in outs:
                said[outs[inbound.topic]] = _report(inbound)
        refused = client.refused_filters
    return Reached(
        _broker_verdict(mqtt, refused, connected_ms),
        _daemon_verdict(settings, answer, said["status"], round_trip_ms, version),
        **said,
        answered=answer is not None and answer.ok,
    )


def _report(inbound: Inbound) -> dict[str, Any]:
    try:
        return messages.decode_report(inbound.payload)
    except ValueError:
        return {}


def _answer(inbound: Inbound, command: Command) -> CtlReply | None:
    try:
        answer = messages.decode_answer(inbound.payload)
    except ValueError:
        return None
    return answer if isinstance(answer, CtlReply) and answer.id == command.id else None


def _broker_verdict(mqtt: Mqtt, refused: tuple[str, ...], connected_ms: float) -> Verdict:
    where = mqtt.host if mqtt.transport == "unix" else f"{mqtt.host}:{mqtt.port}"
    if refused:
        says = f"{where} does not let us subscribe to {', '.join(refused)}"
        return Verdict("broker", "warn", says, "the broker's ACL: let this user read these topics")
    says = f"{where} took us in {connected_ms:.0f} ms"
    if mqtt.protocol == _OLD_PROTOCOL:
        says += f", speaking MQTT {_OLD_PROTOCOL}"
    return Verdict("broker", "ok", says)


def _daemon_verdict(
    settings: Settings,
    answer: CtlReply | None,
    status: dict[str, Any],
    round_trip_ms: float,
    version: str,
) -> Verdict:
    device = settings.device
    if answer is None:
        return _silent(settings, status)
    if not answer.ok:
        says = (answer.error or {}).get("message", "no reason given")
        return Verdict("daemon", "bad", f"{device} refuses our ping: {says}", "see its log")
    data = answer.data or {}
    state, reason = data.get("state"), status.get("reason")
    says = f"{device} answers in {round_trip_ms:.0f} ms: {state}" + (
        f", {reason}" if reason else ""
    )
    restart = _command(settings, "restart", '{"what":"service"}')
    match state:
        case "online" if data.get("version") == version:
            return Verdict("daemon", "ok", says)
        case "online":
            says += f"; it is phid {data.get('version')}, this is {version}"
            return Verdict("daemon", "warn", says, restart)
        case "paused" | "draining":
            return Verdict("daemon", "warn", says, _command(settings, "resume", "{}"))
        case "loading":
            return Verdict("daemon", "warn", says, "wait: requests are queued meanwhile")
        case _ if str(reason).startswith(_NO_MODEL):
            mend = "see `model`: the daemon finds one that is brought by itself"
            return Verdict("daemon", "bad", says, mend)
        case _:
            return Verdict("daemon", "bad", says, "mend what the reason names, then: " + restart)


def _command(settings: Settings, verb: str, payload: str) -> str:
    """The shell line that sends the daemon a command, through the broker that we used.

    It authenticates as we did, and names the file of the password, never the password.
    """
    mqtt, topic = settings.mqtt, settings.topics.ctl(verb)
    if mqtt.transport == "websockets":  # which mosquitto_pub does not speak
        return f"publish {payload} to {topic}"
    words = ["mosquitto_pub", "-h", mqtt.host, "-p", str(mqtt.port)]
    if mqtt.transport == "unix":
        words[1:] = ["--unix", mqtt.host]
    if mqtt.protocol != _OLD_PROTOCOL:
        words += ["-V", "5"]
    cert = None
    if mqtt.tls:
        ca, cert, key = (credentials.find(mqtt, f"{n}_file") for n in ("ca", "cert", "key"))
        words += ["--cafile", str(ca)] if ca else ["--tls-use-os-certs"]
        words += ["--cert", str(cert), "--key", str(key or cert)] if cert else []
        words += ["--tls-alpn", mqtt.alpn[0]] if mqtt.alpn else []
    line, username = shlex.join(words), credentials.username(mqtt)
    if username:
        line += f" -u {shlex.quote(username)}"
        if (password := credentials.find(mqtt, "password_file")) is not None:
            line += f' -P "$(cat {shlex.quote(str(password))})"'
    line += f" -q 1 -t {topic} -m {shlex.quote(payload)}"
    # With the rights of `phid acl` a daemon's own user may not command it.
    return line + "  # where the broker has an ACL: as an operator" * bool(username or cert)


def _silent(settings: Settings, status: dict[str, Any]) -> Verdict:
    device, state = settings.device, status.get("state")
    start = f"phid run --device {device}, or: systemctl start phid"
    if state is None:
        says = f"nobody answers as {device!r}: it never ran on this broker, or has another name"
        return Verdict("daemon", "bad", says, start + " (who is there: phid fleet --once)")
    if state == "offline":
        why = {"lwt": "its connection was lost", "stopped": "it was stopped"}
        reason = status.get("reason")
        says = f"{device} is offline: {why.get(str(reason), reason)}"
        return Verdict("daemon", "bad", says, start)
    says = (
        f"{device} says it is {state} but does not answer: "
        "the broker keeps our ping from it or its answer from us"
    )
    mend = (
        f"the broker's ACL: this user writes {settings.topics.ctl('ping')}, "
        f"the daemon reads it, and both have {settings.topics.res(ANON, '+')}"
    )
    return Verdict("daemon", "bad", says, mend)


def start_engine(load: Load, wait_s: float, heard: Callable[[EngineFacts], None]) -> Verdict:
    """Start an engine as the service would, have it load the model, and end it.

    `heard` gets what the engine says of itself, once it is ready.
    """
    came = errand.run(channel.ENGINE, load, wait_s)
    match came.answer:
        case Ready(facts):
            heard(facts)
            return Verdict("engine", "ok", f"started {_described(facts)}")
        case LoadFailed(code, message):
            mend = "engine.model: another model; or fetch this one's files again"
            return Verdict("engine", "bad", f"{code}: {message}", mend)
    if came.died:
        words = " / ".join(came.printed.strip().splitlines()[:3])[:300]
        says = f"the engine {came.died} while loading: {words}"
        return Verdict("engine", "bad", says, "another engine.model, or build of onnxruntime-genai")
    says = f"not ready after {wait_s:g} s ({came.stage}): a large model takes longer"
    return Verdict("engine", "warn", says, "phid doctor --wait 120")


def _described(facts: EngineFacts) -> str:
    return (
        f"{facts.model} in {facts.load_ms} ms, on {facts.provider}, "
        f"{facts.threads} of {os.cpu_count()} CPUs"
    )
