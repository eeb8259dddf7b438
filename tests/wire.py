"""A requester for tests, on plain paho: it shares nothing with the code under test."""

from __future__ import annotations

import json
import os
import queue
import socket
import ssl
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

BASE = "phid/v1"
# What a test allows where an emulated core would not keep it is so many times as much.
SLOWNESS = float(os.environ.get("TEST_PATIENCE", "1"))
# Every wait for what is to come is so many times as long as it says: what comes in time costs
# nothing, and a machine that is busy with other things brings it later.
PATIENCE = 3 * SLOWNESS


def held_to(schema: Any) -> dict[str, Any]:
    """The response_format of an answer that is to satisfy the schema."""
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@dataclass(frozen=True)
class Heard:
    """A message as it came; `json` is its payload decoded."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    correlation: bytes | None
    expiry_s: int | None
    user: dict[str, str]
    at: float = field(default_factory=time.monotonic)

    @property
    def json(self) -> Any:
        return json.loads(self.payload or b"{}")  # nothing clears what was retained

    @property
    def type(self) -> str:
        return str(self.json.get("type"))


class Requester:
    """An MQTT 5 client that asks a device and keeps everything it is told, in order."""

    def __init__(
        self,
        port: int,
        device: str = "dut",
        name: str | None = None,
        host: str = "127.0.0.1",
        session_expiry_s: int = 0,
        *,
        mqtt_5: bool = True,
        by_json: bool = False,
        username: str | None = None,
        password: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.device = device
        self.mqtt_5 = mqtt_5
        self.by_json = by_json or not mqtt_5
        self.name = name or f"t{uuid.uuid4().hex[:8]}"
        self.heard: list[Heard] = []
        self._news = threading.Condition()
        self._ready: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._client = paho.Client(
            paho.CallbackAPIVersion.VERSION2,
            client_id=self.name,
            clean_session=None if mqtt_5 else session_expiry_s == 0,
            protocol=paho.MQTTv5 if mqtt_5 else paho.MQTTv311,
        )
        if username is not None:
            self._client.username_pw_set(username, password)
        if tls is not None:
            self._client.tls_set_context(tls)
        self._client.reconnect_delay_set(1, 1)
        # Two small packets in a row would wait for each other: what is timed is the daemon.
        self._client.on_socket_open = lambda _client, _userdata, sock: sock.setsockopt(
            socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
        )
        self._filters: list[str] = [self.rx]
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = lambda *_: self._ready.put("subscribed")
        self._client.on_message = self._on_message
        self._said: dict[int, str] = {}
        self._told = -1
        self._client.on_publish = self._on_publish
        if mqtt_5:
            properties = Properties(PacketTypes.CONNECT)
            properties.SessionExpiryInterval = session_expiry_s
            clean = session_expiry_s == 0
            self._client.connect(host, port, 30, clean_start=clean, properties=properties)
        else:
            self._client.connect(host, port, 30)
        self._client.loop_start()
        self._ready.get(timeout=10 * PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def rx(self) -> str:
        return f"{BASE}/client/{self.name}/rx"

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()
        self._client._reset_sockets()  # else its own pair is left to the garbage collector

    def listen(self, *filters: str, qos: int = 1) -> None:
        """Subscribe to more, and wait until that holds."""
        self._filters += filters
        self._client.subscribe([(f, qos) for f in filters])
        self._ready.get(timeout=10 * PATIENCE)

    def publish(
        self,
        topic: str,
        payload: bytes | str | dict[str, Any],
        *,
        qos: int = 1,
        retain: bool = False,
        reply_to: str | None = None,
        correlation: bytes | None = None,
        expiry_s: int | None = None,
        user: Sequence[tuple[str, str]] = (),
        content_type: str | None = None,
        wait: bool = True,
    ) -> None:
        """Send it; without `wait` the broker need not have it when this returns (MQTT 5)."""
        if self.by_json and reply_to is not None and isinstance(payload, dict):
            payload = payload | {"reply_to": reply_to}  # what a property would say
        if not self.mqtt_5:
            data = json.dumps(payload) if isinstance(payload, dict) else payload
            self._client.publish(topic, data, qos, retain).wait_for_publish(20 * PATIENCE)
            return
        properties = Properties(PacketTypes.PUBLISH)
        if user:
            properties.UserProperty = list(user)
        if reply_to is not None:
            properties.ResponseTopic = reply_to
        if correlation is not None:
            properties.CorrelationData = correlation
        if expiry_s is not None:
            properties.MessageExpiryInterval = expiry_s
        if content_type is not None:
            properties.ContentType = content_type
        data = json.dumps(payload) if isinstance(payload, dict) else payload
        sent = self._client.publish(topic, data, qos, retain, properties)
        if wait:
            sent.wait_for_publish(20 * PATIENCE)

    def said_to(self, topic: str, payload: bytes | str = b"{}", *, retain: bool = False) -> str:
        """What the broker says to this publication, by MQTT 5's name for it."""
        mid = self._client.publish(topic, payload, 1, retain).mid
        with self._news:
            came = self._news.wait_for(lambda: mid in self._said, 10 * PATIENCE)
            assert came, f"no word on {topic}"
            return self._said[mid]

    def request(self, payload: bytes | str | dict[str, Any], **options: Any) -> None:
        """Send a text request, the answer wanted in our own inbox."""
        options.setdefault("reply_to", self.rx)
        self.publish(f"{BASE}/{self.device}/in/text/{self.name}", payload, **options)

    def ask(self, prompt: str, timeout: float = 30, **fields: Any) -> dict[str, Any]:
        """The outcome of a request."""
        request_id = fields.setdefault("id", uuid.uuid4().hex[:10])
        self.request({"prompt": prompt, **fields})
        return self.outcome(request_id, timeout)

    def cancel(self, request_id: str) -> None:
        self.publish(f"{BASE}/{self.device}/in/cancel/{self.name}", {"id": request_id})

    def ctl(self, verb: str, timeout: float = 10, **options: Any) -> dict[str, Any]:
        """The answer to a command."""
        command_id = uuid.uuid4().hex[:10]
        topic = f"{BASE}/{self.device}/in/ctl/{verb}"
        self.publish(topic, {"id": command_id, **options}, reply_to=self.rx)
        return self.wait(
            lambda h: h.type == "ctl" and h.json["id"] == command_id, timeout, f"ctl {verb}"
        ).json

    def outcome(self, request_id: str, timeout: float = 30) -> dict[str, Any]:
        return self.wait(
            lambda h: h.type in ("result", "error") and h.json["id"] == request_id,
            timeout,
            f"the outcome of {request_id}",
        ).json

    def outcomes(self, request_id: str) -> list[dict[str, Any]]:
        """Every outcome heard of a request, so far."""
        return [h.json for h in self.of(request_id) if h.type in ("result", "error")]

    def of(self, request_id: str) -> list[Heard]:
        """Everything heard of a request, so far."""
        with self._news:
            return [
                h
                for h in self.heard
                if '"id"' in h.payload.decode() and h.json.get("id") == request_id
            ]

    def status(self, state: str, timeout: float = 20) -> dict[str, Any]:
        """The device's status once it is in this state; needs listen() on it.

        It may have left it by now: nobody is woken as fast as an engine can be started. Of those
        that came before what this told last nothing is told again.
        """
        topic = f"{BASE}/{self.device}/out/status"
        timeout *= PATIENCE
        deadline = time.monotonic() + timeout
        with self._news:
            while True:
                seen = [(n, h.json) for n, h in enumerate(self.heard) if h.topic == topic]
                fit = [(n, told) for n, told in seen if told["state"] == state]
                if fit and fit[-1] == seen[-1]:
                    self._told, told = fit[-1]
                    return dict(told)
                for n, told in fit:
                    if n > self._told:
                        self._told = n
                        return dict(told)
                if not self._news.wait(max(0.0, deadline - time.monotonic())) and (
                    time.monotonic() >= deadline
                ):
                    last = seen[-1][1] if seen else None
                    raise AssertionError(f"not {state} within {timeout} s: {last}")

    def online(self, timeout: float = 20) -> dict[str, Any]:
        """The status once it is online and hears whatever it is to hear; needs listen() on it.

        It says that it is online before it subscribes to cameras; its answer to a ping comes after.
        """
        told = self.status("online", timeout)
        self.ctl("ping")
        return told

    def wait(self, wanted: Any, timeout: float = 30, what: str = "a message") -> Heard:
        """The first message, old or new, that is wanted."""
        timeout *= PATIENCE
        deadline = time.monotonic() + timeout
        position = 0
        with self._news:
            while True:
                for heard in self.heard[position:]:
                    if wanted(heard):
                        return heard
                position = len(self.heard)
                left = deadline - time.monotonic()
                if left <= 0:
                    raise AssertionError(f"{what} did not come within {timeout} s")
                self._news.wait(left)

    def _on_connect(self, client: paho.Client, *_: Any) -> None:
        client.subscribe([(f, 1) for f in self._filters])

    def _on_publish(
        self, _client: Any, _userdata: Any, mid: int, reason: Any, _properties: Any
    ) -> None:
        with self._news:
            self._said[mid] = str(reason)
            self._news.notify_all()

    def _on_message(self, _client: Any, _userdata: Any, message: paho.MQTTMessage) -> None:
        properties = message.properties
        heard = Heard(
            message.topic,
            bytes(message.payload),
            message.qos,
            message.retain,
            getattr(properties, "CorrelationData", None),
            getattr(properties, "MessageExpiryInterval", None),
            dict(getattr(properties, "UserProperty", ())),
        )
        with self._news:
            self.heard.append(heard)
            self._news.notify_all()
