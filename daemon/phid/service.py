"""The service: one mailbox, one loop that takes from it and owns all state."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from phid import control, log, notify, reports
from phid import settings as settings_module
from phid.broker import BrokerEvent, Connected, Disconnected, Endpoint, Inbound, Sent, Session
from phid.bulletin import Bulletin
from phid.desk import Desk
from phid.errors import Code, Failure, Refused
from phid.health import Health
from phid.intake import (
    Arrival,
    ArrivalRefused,
    CancelArrived,
    CommandArrived,
    Intake,
    RequestArrived,
)
from phid.jobs import Load, LoadFailed, Ready
from phid.outbox import Outbox
from phid.settings import Settings, SettingsError
from phid.worker import EngineEnded, EngineSaid, Worker, describe_exit

RESTART_STATUS = -1
"""What `run` returns when the service is to be started anew by its caller."""

# The loop looks around at least this often, whatever the mailbox says.
_IDLE_S = 1.0
_FAREWELL_S = 2.0
_log = log.get("service")


@dataclass(frozen=True, slots=True)
class Arrived:
    """Something to decide on; `decided` lets paho's thread acknowledge it to the broker."""

    arrival: Arrival
    decided: threading.Event


@dataclass(frozen=True, slots=True)
class Signalled:
    """The operating system wants something: SIGTERM, SIGINT or SIGHUP."""

    name: str


Mail = BrokerEvent | EngineSaid | EngineEnded | Arrived | Signalled


class Service:
    """phid run. `run` is the owner thread; everything else only posts into its mailbox.

    `read_settings` reads them again for a reload; it raises SettingsError.
    """

    def __init__(
        self, settings: Settings, read_settings: Callable[[], Settings], model: Load | None
    ) -> None:
        self._settings = settings
        self._read_settings = read_settings
        self._mailbox: queue.SimpleQueue[Mail] = queue.SimpleQueue()
        self._intake = _intake(settings)
        self._outbox = Outbox()
        self._health = Health(settings.models_dir)
        self._worker = (
            Worker(model, self._mailbox.put, restart_max_s=settings.engine.restart_max_s)
            if model is not None
            else None
        )
        self._bulletin = Bulletin(settings, self._outbox, self._health, self._worker)
        self._desk = Desk(
            settings, self._worker, self._outbox, self._health, self._bulletin.publish_event
        )
        self._session = Session(self._endpoint(), self._mailbox.put, self._receive)
        self._connections = 0
        self._paused = False
        self._draining = False
        self._stop_by: float | None = None
        self._exit_status = 0
        self._ended = False
        # When each thing is next to be done; monotonic seconds.
        self._due: dict[str, float] = {}

    def post_signal(self, name: str) -> None:
        """Have the loop act on a signal; safe in a signal handler."""
        self._mailbox.put(Signalled(name))

    def run(self) -> int:
        """Serve until stopped: the exit status, or RESTART_STATUS."""
        _log.info("service_started", device=self._settings.device, version=reports.VERSION)
        try:
            self._start()
            while not self._ended:
                self._turn()
            self._farewell()
        finally:
            self._ended = True
            self._session.stop()
            if self._worker is not None:
                self._worker.stop()
        _log.info("service_stopped")
        return self._exit_status

    # The loop.

    def _start(self) -> None:
        now = time.monotonic()
        self._due["health"] = now + self._settings.health.interval_s
        self._due["heartbeat"] = now + self._settings.health.heartbeat_s
        if (interval := notify.watchdog_interval_s()) is not None:
            self._due["watchdog"] = now + interval
        if self._worker is not None:
            self._worker.start()
        self._look(now)
        self._session.start()
        notify.notify("READY=1")

    def _turn(self) -> None:
        now = time.monotonic()
        times = [now + _IDLE_S, *self._due.values()]
        times += [t for t in (self._desk.due_at, self._stop_by) if t is not None]
        if self._worker is not None and self._worker.retry_at is not None:
            times.append(self._worker.retry_at)
        try:
            mail = self._mailbox.get(timeout=max(0.0, min(times) - now))
        except queue.Empty:
            mail = None
        now = time.monotonic()
        if mail is not None:
            self._take(mail, now)
        self._tick(now)

    def _take(self, mail: Mail, now: float) -> None:
        match mail:
            case EngineSaid():
                self._engine_said(mail, now)
            case Sent():
                self._outbox.sent(mail)
            case Arrived(arrival, decided):
                try:
                    self._decide(arrival, now)
                finally:
                    decided.set()
            case Connected():
                self._connected(mail)
            case Disconnected(reason, retry_s):
                self._outbox.disconnect()
                self._desk.connection_lost()
                _log.warning("broker_away", reason=reason, retry_s=round(retry_s, 1))
            case EngineEnded():
                self._engine_ended(mail, now)
            case Signalled(name):
                self._signalled(name, now)

    def _tick(self, now: float) -> None:
        self._desk.tick(now)
        if self._worker is not None:
            self._worker.tick(now)
        for name in [name for name, at in self._due.items() if at <= now]:
            self._do(name, now)
        self._look(now)
        if self._stop_by is not None and (self._desk.idle or now >= self._stop_by):
            self._ended = True

    def _do(self, name: str, now: float) -> None:
        match name:
            case "health":
                self._due[name] = now + self._settings.health.interval_s
                self._bulletin.publish_health(self._desk.backlog, paused=self._paused)
            case "heartbeat":
                self._due[name] = now + self._settings.health.heartbeat_s
                self._bulletin.publish_status(self._desk.backlog)
            case "watchdog":
                interval = notify.watchdog_interval_s()
                assert interval is not None
                self._due[name] = now + interval
                notify.notify("WATCHDOG=1")
            case "discover":
                del self._due[name]
                self._bulletin.publish_all(self._desk.backlog, paused=self._paused)
            case "log":
                del self._due[name]
                self._configure_log(self._settings.log.level)

    # What happens.

    def _receive(self, inbound: Inbound) -> None:
        """On paho's thread: decode, and wait until the owner has decided.

        That is what bounds the mailbox: a client that floods is slowed down by TCP.
        """
        arrival = self._intake.read(inbound)
        if arrival is None:
            return
        decided = threading.Event()
        self._mailbox.put(Arrived(arrival, decided))
        while not decided.wait(0.1) and not self._ended:
            pass

    def _decide(self, arrival: Arrival, now: float) -> None:
        match arrival:
            case RequestArrived():
                self._desk.take(arrival, now)
            case CancelArrived(client, request_id):
                self._desk.cancel(client, request_id, now)
            case CommandArrived():
                reply = control.execute(self, arrival)
                # A broadcast is answered by what is published, not by a message from each.
                if not arrival.broadcast:
                    self._outbox.answer(arrival.reply, reply)
            case ArrivalRefused(_, request_id, failure, reply_to, verb):
                if verb is None:
                    self._desk.refuse(reply_to, request_id, failure)
                else:
                    self._outbox.answer(reply_to, control.refusal(request_id, verb, failure))

    def _connected(self, connected: Connected) -> None:
        self._bulletin.session = connected.session
        self._bulletin.refused_filters = connected.refused
        self._connections += 1
        if self._connections > 1:
            self._health.count("reconnects")
        _log.info("broker_connected", resumed=connected.resumed, refused=connected.refused)
        self._outbox.connect(connected)
        self._bulletin.publish_status(self._desk.backlog)
        self._bulletin.publish_info()

    def _engine_said(self, said: EngineSaid, now: float) -> None:
        assert self._worker is not None
        event = self._worker.take(said)
        match event:
            case None:
                return
            case Ready(facts):
                _log.info("model_loaded", model=facts.model, ms=facts.load_ms)
                self._look(now)
                self._bulletin.publish_info()
            case LoadFailed(code, message):
                self._look(now)
                self._desk.end_waiting(Failure(Code.LOADING, f"{code}: {message}"), now)
            case _:
                pass
        self._desk.engine_said(event, now)

    def _engine_ended(self, ended: EngineEnded, now: float) -> None:
        assert self._worker is not None
        if self._worker.ended(ended, now):
            self._health.count("engine_restarts")
            self._desk.engine_lost(f"the engine {describe_exit(ended.returncode)}", now)

    def _signalled(self, name: str, now: float) -> None:
        if name == "SIGHUP":
            try:
                self.reload()
            except Refused as refused:
                _log.error("reload_failed", reason=refused.failure.message)
            return
        if self._stop_by is not None:  # the second one means it
            self._stop_by = now
            return
        self._stop(now)

    # The commands of control.Operated.

    def ping(self) -> dict[str, Any]:
        """State and uptime."""
        return {
            "state": self._bulletin.state.name,
            "queue": len(self._desk.backlog),
            "uptime_s": round(self._health.uptime_s),
            "version": reports.VERSION,
        }

    def pause(self) -> dict[str, Any]:
        """Refuse new requests, hold the waiting ones."""
        self._paused = self._desk.held = True
        return self._changed()

    def resume(self) -> dict[str, Any]:
        """Take requests again; a service that stops cannot be held up."""
        self._paused = self._desk.held = False
        self._draining = self._stop_by is not None
        self._desk.dispatch(time.monotonic())
        return self._changed()

    def drain(self) -> dict[str, Any]:
        """Refuse new requests, finish the accepted ones."""
        self._draining = True
        return self._changed()

    def discover(self) -> dict[str, Any]:
        """Publish everything again, soon: a whole fleet is asked at the same moment."""
        spread = random.uniform(0, self._settings.health.discover_spread_s)  # noqa: S311
        self._due["discover"] = time.monotonic() + spread
        return {"within_s": round(spread, 3)}

    def set_log_level(self, level: str, for_s: float | None) -> dict[str, Any]:
        """Log at another level."""
        self._configure_log(level)
        self._due.pop("log", None)
        if for_s is not None:
            self._due["log"] = time.monotonic() + for_s
        return {"level": level}

    def reload(self) -> dict[str, Any]:
        """Take over what can change while running; name what needs a restart."""
        try:
            fresh = self._read_settings()
        except SettingsError as error:
            raise Refused(Code.BAD_REQUEST, str(error)) from None
        changed = settings_module.differences(self._settings, fresh)
        later = [name for name in changed if not reports.is_live(name)]
        self._settings = settings_module.merge(self._settings, fresh, reports.is_live)
        self._bulletin.settings = self._settings
        self._configure_log(self._settings.log.level)
        self._intake = _intake(self._settings)
        limits = self._settings.limits
        self._desk.backlog.limit, self._desk.backlog.per_client = limits.backlog, limits.per_client
        self._desk.ledger.keep_s = limits.dedupe_s
        self._desk.ledger.keep_entries = limits.dedupe_entries
        self._desk.delta_interval_s = self._settings.stream.delta_interval_ms / 1000
        self._bulletin.publish_info()
        _log.info("settings_reloaded", changed=changed, restart_needed=later)
        return {"changed": changed, "restart_needed": later}

    def restart(self, what: str) -> dict[str, Any]:
        """Kill the engine, or drain and start over."""
        if what == "service":
            self._exit_status = RESTART_STATUS
            self._stop(time.monotonic())
        elif self._worker is not None:
            self._worker.restart()
        return {"restarting": what}

    # What follows from what has changed.

    def _look(self, now: float) -> None:
        """Bring what is told, and who is let in, in line with the facts."""
        backlog = self._desk.backlog
        self._desk.closed = reports.closed(
            worker=self._worker, paused=self._paused, draining=self._draining
        )
        if self._bulletin.look(paused=self._paused, draining=self._draining, backlog=backlog):
            self._desk.dispatch(now)

    def _changed(self) -> dict[str, Any]:
        self._look(time.monotonic())
        return {"state": self._bulletin.state.name}

    # The end.

    def _stop(self, now: float) -> None:
        _log.info("service_stopping", open=len(self._desk.ledger.open_tickets))
        notify.notify("STOPPING=1")
        self._draining = True
        self._paused = self._desk.held = False
        self._stop_by = now + self._settings.limits.drain_s
        self._look(now)

    def _farewell(self) -> None:
        """Answer what is still open, say goodbye, and see both acknowledged."""
        now = time.monotonic()
        self._desk.end_running(now)
        self._desk.end_waiting(Failure(Code.DRAINING, "the device was stopped"), now)
        self._bulletin.farewell(self._desk.backlog)
        late = now + _FAREWELL_S
        while len(self._outbox) and self._outbox.connected and time.monotonic() < late:
            try:
                mail = self._mailbox.get(timeout=0.1)
            except queue.Empty:
                continue
            if isinstance(mail, Sent):
                self._outbox.sent(mail)
            elif isinstance(mail, Disconnected):
                self._outbox.disconnect()
            elif isinstance(mail, Arrived):
                self._decide(mail.arrival, time.monotonic())
                mail.decided.set()

    def _configure_log(self, level: str) -> None:
        log.configure(level, self._settings.log.format)

    def _endpoint(self) -> Endpoint:
        mqtt = self._settings.mqtt
        return Endpoint(
            host=mqtt.host,
            port=mqtt.port,
            client_id=self._settings.client_id,
            filters=self._settings.topics.filters,
            username=mqtt.username,
            password=settings_module.password(mqtt),
            keepalive_s=mqtt.keepalive_s,
            session_expiry_s=mqtt.session_expiry_s,
            packet_bytes=mqtt.packet_bytes,
            reconnect_max_s=mqtt.reconnect_max_s,
            will=self._bulletin.will,
        )


def _intake(settings: Settings) -> Intake:
    limits = settings.limits
    return Intake(
        settings.topics,
        payload_bytes=limits.payload_bytes,
        max_tokens=limits.max_tokens,
        deadline_ms=limits.deadline_ms,
        reply_allow=settings.mqtt.reply_allow,
    )
