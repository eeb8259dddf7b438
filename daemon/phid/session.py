"""The session with the broker: one connection after another, when, and in which protocol."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phid import log, statefile
from phid.broker import Connection
from phid.traffic import (
    BrokerEvent,
    Connected,
    Decision,
    Disconnected,
    End,
    Ended,
    Endpoint,
    Inbound,
    Protocol,
    TakenOver,
)

_SCHEMA = 1
_FIRST_PAUSE_S = 0.5
# A connection that held this long was a good one: the next failure starts from the first pause.
_GOOD_CONNECTION_S = 30.0
_TRIES_BEFORE_FALLBACK = 3
_TRIES_IF_KNOWN = 30
_TRY_5_AGAIN_S = 86_400.0
_FIXED = {"auto": None, "5": Protocol.V5, "3.1.1": Protocol.V311}
_log = log.get("session")


class Session:
    """Keeps one connection to the broker, for as long as it takes.

    `post` gets every BrokerEvent and `receive` every Inbound, both on a thread of its own. A
    publisher that writes its message itself also calls `post`, on its own thread, with what became
    of it: `post` must not wait. A message is acknowledged to the broker when `receive` returns, or
    when the decision that it returns says so. `process` is the first part of every connection's
    name.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        post: Callable[[BrokerEvent], None],
        receive: Callable[[Inbound], Decision | None],
        memory: Path | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._post = post
        self._receive = receive
        self._protocols = Protocols(endpoint, memory)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="session", daemon=True)
        self.process = f"{random.getrandbits(32):08x}"

    def start(self) -> None:
        """Connect, in the background; events follow."""
        self._thread.start()

    def stop(self, timeout_s: float = 2.0) -> None:
        """Disconnect so that the will is not sent; what is not yet written may be lost."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        failures = 0
        count = 0
        while not self._stopping.is_set():
            count += 1
            began = time.monotonic()
            protocol = self._protocols.choose()
            connection = Connection(
                self._endpoint, protocol, f"{self.process}-{count}", self._take, self._receive
            )
            ended = self._hold(connection)
            if self._stopping.is_set():
                return
            if ended.end is End.TAKEN_OVER:
                self._post(TakenOver(ended.reason))
                return
            if not connection.acknowledged:
                self._protocols.failed(protocol, ended.end)
            failures = 1 if time.monotonic() - began > _GOOD_CONNECTION_S else failures + 1
            pause = self._pause_s(failures, ended.end)
            self._post(Disconnected(ended.reason, pause, refused=ended.end is End.NOT_LET_IN))
            self._stopping.wait(pause)

    def _hold(self, connection: Connection) -> Ended:
        """How the connection ended; by a fault of ours, too: the next may be spared that."""
        try:
            return connection.run(self._stopping)
        except Exception as error:  # noqa: BLE001 - whichever it is
            fault = log.fault(error)
            _log.error("connection_failed", fault=fault)
            return Ended(End.UNREACHABLE, f"a fault of ours in the connection: {fault}")

    def _take(self, event: BrokerEvent) -> None:
        if isinstance(event, Connected):
            self._protocols.connected(event.protocol)
        self._post(event)

    def _pause_s(self, failures: int, end: End) -> float:
        ceiling = min(self._endpoint.mqtt.reconnect_max_s, _FIRST_PAUSE_S * 2 ** min(failures, 16))
        if end is End.NOT_LET_IN:
            # It does not get better by asking often, and brokers ban those who do.
            ceiling = self._endpoint.mqtt.reconnect_max_s
        # Half fixed, half random: a fleet that lost its broker together comes back apart.
        return float(ceiling / 2 + random.uniform(0, ceiling / 2))  # noqa: S311


class Protocols:
    """Which protocol to speak: as set, or MQTT 5 until a broker has shown three times it cannot.

    A broker that then takes 3.1.1 is remembered in a file, and MQTT 5 tried again by the first
    connect after a day; one that takes neither has other troubles, and MQTT 5 goes on. One that
    has spoken MQTT 5 before is most likely only down behind a proxy, which closes just the same:
    it has thirty tries, for falling back would silence requesters that rely on properties.
    """

    def __init__(
        self, endpoint: Endpoint, memory: Path | None, now: Callable[[], float] = time.time
    ) -> None:
        self._fixed = _FIXED[endpoint.mqtt.protocol]
        self._broker = endpoint.where
        self._memory = memory
        self._now = now
        self._strikes = 0
        self._on_trial = False
        known = self._recall()
        self._fell_back_at = _number(known.get("fell_back_at"))
        self._spoke_5_at = _number(known.get("spoke_5_at"))

    def choose(self) -> Protocol:
        """The protocol for the next connection."""
        if self._fixed is not None:
            return self._fixed
        return Protocol.V311 if self._on_trial or self._remembered else Protocol.V5

    def connected(self, protocol: Protocol) -> None:
        """Take note that a broker speaks this protocol."""
        self._strikes = 0
        if self._fixed is not None:
            return
        if protocol is Protocol.V5:
            if self._fell_back_at is not None or self._spoke_5_at is None:
                self._fell_back_at, self._spoke_5_at = None, self._now()
                self._keep()
        elif protocol is Protocol.V311 and self._on_trial:
            self._fell_back_at, self._spoke_5_at = self._now(), None
            self._keep()
            _log.warning("fell_back", broker=self._broker, protocol="3.1.1")
        self._on_trial = False

    def failed(self, protocol: Protocol, end: End) -> None:
        """Take note of a connection that was not made, and why."""
        if self._fixed is not None or end is End.UNREACHABLE:
            return
        if protocol is Protocol.V311:
            self._on_trial = False
            if end is End.NO_SUCH_PROTOCOL:
                self._fell_back_at = None
        elif end is End.NO_SUCH_PROTOCOL:
            self._strikes += 1
            # A broker that is known to speak 3.1.1 need not refuse MQTT 5 three times again.
            tries = _TRIES_BEFORE_FALLBACK if self._spoke_5_at is None else _TRIES_IF_KNOWN
            if self._strikes >= tries or self._fell_back_at is not None:
                self._strikes = 0
                self._on_trial = True

    @property
    def _remembered(self) -> bool:
        # A clock that was set back must not keep us at 3.1.1 for ever.
        at = self._fell_back_at
        return at is not None and 0 <= self._now() - at < _TRY_5_AGAIN_S

    def _recall(self) -> dict[str, Any]:
        entry = self._read().get(self._broker)
        return entry if isinstance(entry, dict) else {}

    def _keep(self) -> None:
        if self._memory is None:
            return
        known = self._read()
        known.pop(self._broker, None)
        if self._fell_back_at is not None:
            known[self._broker] = {"fell_back_at": round(self._fell_back_at)}
        elif self._spoke_5_at is not None:
            known[self._broker] = {"spoke_5_at": round(self._spoke_5_at)}
        # It costs three attempts to find out again: not worth failing for.
        with contextlib.suppress(OSError):
            statefile.write(self._memory, _SCHEMA, {"brokers": known})

    def _read(self) -> dict[str, Any]:
        if self._memory is None:
            return {}
        brokers = statefile.read(self._memory, _SCHEMA).get("brokers")
        return dict(brokers) if isinstance(brokers, dict) else {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
