"""The service: one mailbox, one loop that takes from it and owns all state."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from phid import control, deaths, exits, log, notify, reports, sensors
from phid.bulletin import Bulletin
from phid.crew import Crew
from phid.deaths import ThreadDied
from phid.desk import Desk
from phid.entries import JournalEvent, Left, NotWritten, Written
from phid.errors import Refused
from phid.health import Health
from phid.intake import (
    Arrival,
    ArrivalRefused,
    CancelArrived,
    CommandArrived,
    ForgetArrived,
    PartArrived,
    RequestArrived,
)
from phid.jobs import LoadFailed, Ready
from phid.journal import Journal
from phid.lineup import Lineup
from phid.lookout import Lookout
from phid.loopback import Loopback
from phid.mailbox import Mailbox
from phid.operations import RESTART_STATUS, Operations
from phid.outbox import Outbox
from phid.reception import Arrived, Received, Reception, StatusHeard
from phid.records import Records
from phid.rivals import Rivals
from phid.roster import Notebook, Roster
from phid.session import Session
from phid.settings import Settings
from phid.thermal import Thermal
from phid.traffic import (
    BrokerEvent,
    Connected,
    Decision,
    Disconnected,
    Endpoint,
    Sent,
    Subscribed,
    TakenOver,
)
from phid.worker import EngineEnded, EngineSaid, Worker

# The loop looks around at least this often, whatever the mailbox says.
_IDLE_S = 1.0
_FAREWELL_S = 2.0
_log = log.get("service")


@dataclass(frozen=True, slots=True)
class Signalled:
    """The operating system wants something: SIGTERM, SIGINT or SIGHUP."""

    name: str


Mail = Received | BrokerEvent | EngineSaid | EngineEnded | JournalEvent | Signalled | ThreadDied


class Service:
    """phid run. `run` is the owner thread; everything else only posts into its mailbox.

    `read_settings` reads them again for a reload; it raises SettingsError.
    """

    def __init__(
        self, settings: Settings, read_settings: Callable[[], Settings], lineup: Lineup
    ) -> None:
        self._mailbox: Mailbox[Mail] = Mailbox()
        self._outbox = Outbox()
        self._health = Health(settings.models_dir)
        self._crew = _crew(settings, lineup, self._mailbox.put)
        self._bulletin = Bulletin(settings, self._outbox, self._health, self._crew)
        self._crew.tell = self._bulletin.model_changed
        kept = settings.journal
        path = settings.state_dir / "journal.db"
        self._journal = (
            Journal(path, self._mailbox.put, max_bytes=kept.max_bytes) if kept.enabled else None
        )
        self._notebook = Notebook(settings.state_dir / "watches.json")
        roster = Roster(self._notebook, settings.mqtt.base)
        self._lookout = Lookout(settings, roster, self._crew, self._outbox, self._health)
        self._records = Records(self._journal, self._health)
        self._desk = Desk(
            settings,
            self._crew,
            self._outbox,
            self._health,
            self._bulletin.publish_event,
            self._lookout.gallery.picture,
            self._records,
        )
        self._operations = Operations(
            settings,
            read_settings,
            self._crew,
            self._desk,
            self._bulletin,
            self._health,
            self._lookout,
        )
        self._reception = Reception(
            settings.topics,
            lambda: self._operations.intake,
            self._lookout.see,
            self._mailbox.put,
        )
        self._session = Session(
            Endpoint(
                settings.mqtt,
                settings.client_id,
                (*settings.topics.filters, settings.topics.status),
                keep_session=True,
                will=self._bulletin.will,
            ),
            self._mailbox.put,
            self._reception.receive,
            memory=settings.state_dir / "brokers.json",
        )
        self._topics = settings.topics
        self._loopback = Loopback(self._topics)
        self._thermal = Thermal(sensors.heat)
        self._rivals = Rivals(self._session.process)
        self._connections = 0
        self._watchdog = notify.Watchdog()
        self._ended = self._told_to_end = False

    @property
    def _settings(self) -> Settings:
        return self._operations.settings

    def post_signal(self, name: str) -> None:
        """Have the loop act on a signal; safe in a signal handler."""
        # Whoever ends the process does not want it to start anew, however late the signal comes.
        self._told_to_end = self._told_to_end or name != "SIGHUP"
        self._mailbox.put(Signalled(name))

    def run(self) -> int:
        """Serve until stopped: the exit status, or RESTART_STATUS."""
        _log.info("service_started", device=self._settings.device, version=reports.VERSION)
        try:
            with deaths.told(self._mailbox.put):
                self._start()
                while not self._ended:
                    self._turn()
                self._farewell()
        finally:
            self._reception.close()
            if self._ended:  # else it is a fault, and the will is to tell of it
                self._session.stop()
            self._crew.stop()
            self._notebook.stop()
            if self._journal is not None:
                self._journal.stop()
        _log.info("service_stopped")
        if self._told_to_end and self._operations.exit_status == RESTART_STATUS:
            return 0
        return self._operations.exit_status

    # The loop.

    def _start(self) -> None:
        now = time.monotonic()
        self._crew.start()
        if self._journal is not None and (left := self._journal.open()) is not None:
            self._desk.recover(left, self._operations.intake, now, time.time())
        self._operations.look()
        self._session.start()
        notify.notify("READY=1")

    def _turn(self) -> None:
        now = time.monotonic()
        times = [now + _IDLE_S, *self._operations.due.values()]
        dues = (
            self._watchdog.due_at,
            self._bulletin.due_at,
            self._desk.due_at,
            self._loopback.due_at,
            self._operations.stop_by,
            self._lookout.due_at(allowed=self._desk.spares_the_engine),
        )
        times += [t for t in dues if t is not None]
        times += [w.retry_at for w in self._crew.workers if w.retry_at is not None]
        mail = self._mailbox.get(min(times) - now)
        now = time.monotonic()
        if mail is not None:
            self._take(mail, now)
        self._tick(now)
        self._records.commit()

    def _take(self, mail: Mail, now: float) -> None:  # noqa: C901, PLR0912 - one case for each mail
        match mail:
            case EngineSaid():
                self._engine_said(mail, now)
            case Sent():
                self._outbox.sent(mail)
                self._loopback.sent(mail)
            case Arrived(arrival, decided):
                being_written = False
                try:
                    being_written = self._decide(arrival, now, decided)
                finally:
                    if not being_written:
                        decided.set()
            case Left() if self._operations.stop_by is None:  # else it is the next start's
                self._desk.recover(mail, self._operations.intake, now, time.time())
            case Written() | NotWritten():
                self._desk.written(mail)
            case Connected():
                self._connected(mail, now)
            case Disconnected():
                self._disconnected(mail)
            case TakenOver(reason):
                self._give_way(reason)
            case StatusHeard(payload):
                if self._rivals.heard(payload, now):
                    self._give_way("another daemon speaks as this device")
            case EngineEnded():
                self._engine_ended(mail, now)
            case Signalled(name):
                self._signalled(name, now)
            case Subscribed():
                self._lookout.subscribed(mail)
            case ThreadDied(name, fault):  # what waits for that thread would wait for ever
                raise RuntimeError(f"the {name} thread died of {fault}")

    def _tick(self, now: float) -> None:
        self._desk.tick(now)
        self._loopback.tick(now)
        self._bulletin.silenced = self._loopback.silenced
        self._bulletin.unkept = self._records.failing
        self._thermal.tick(now, self._settings.health.pause_above_c)
        self._bulletin.heat, self._desk.cooling = self._thermal.reason, self._thermal.waits
        # Before the crew, which could give a default model the room made for a request that waits.
        self._desk.dispatch(now)
        self._crew.tick(now, quiet=self._desk.idle)
        self._watchdog.tick(now)
        self._bulletin.tick(now, self._desk.backlog, paused=self._operations.paused)
        self._operations.tick(now)
        self._operations.look()
        # Last: what is left of the engine's time when every request has had its turn.
        self._lookout.tick(now, allowed=self._desk.spares_the_engine)
        if self._operations.stop_by is not None and (
            self._desk.idle or now >= self._operations.stop_by
        ):
            self._ended = True

    # What happens.

    def _decide(self, arrival: Arrival, now: float, decided: Decision) -> bool:
        """True if `decided` will be set by the journal, for what was accepted is being written."""
        match arrival:
            case RequestArrived():
                return self._desk.take(arrival, now, decided)
            case PartArrived():
                return self._desk.take_part(arrival, now, decided)
            case CancelArrived(client, request_id):
                self._desk.cancel(client, request_id, now)
            case ForgetArrived(client, session):
                return self._desk.forget_session(client, session, now, decided)
            case CommandArrived() if self._loopback.heard(arrival.id):
                pass
            case CommandArrived():
                allow = self._settings.control.allow
                reply = control.execute(self._operations, arrival, allow)
                # A broadcast is answered by what is published, not by a message from each.
                if not arrival.broadcast:
                    self._outbox.answer(arrival.reply, reply)
            case ArrivalRefused(_, request_id, failure, reply_to, verb):
                if verb is None:
                    self._desk.refuse(reply_to, request_id, failure, decided)
                else:
                    self._outbox.answer(reply_to, control.refusal(request_id, verb, failure))
        return False

    def _disconnected(self, disconnected: Disconnected) -> None:
        self._outbox.disconnect()
        self._loopback.disconnect()
        self._lookout.disconnect()
        self._desk.connection_lost()
        tell = _log.error if disconnected.refused else _log.warning
        tell("broker_away", reason=disconnected.reason, retry_s=round(disconnected.retry_s, 1))

    def _give_way(self, reason: str) -> None:
        """End: to come back would throw the other one out, and so on for ever."""
        _log.error("taken_over", reason=reason, client_id=self._settings.client_id)
        self._outbox.disconnect()
        self._operations.exit_status, self._ended = exits.TAKEN_OVER, True

    def _connected(self, connected: Connected, now: float) -> None:
        self._bulletin.session = connected.session
        # Without our own status topic we only cannot see a rival: no reason to be degraded.
        ours = set(self._topics.filters)
        self._bulletin.refused_filters = tuple(f for f in connected.refused if f in ours)
        self._connections += 1
        if self._connections > 1:
            self._health.count("reconnects")
        _log.info(
            "broker_connected",
            protocol=connected.protocol.name,
            resumed=connected.resumed,
            refused=connected.refused,
        )
        self._outbox.connect(connected)
        self._loopback.connect(connected, now)
        self._bulletin.publish_info()
        self._bulletin.publish_status(self._desk.backlog)
        self._lookout.connect(connected)

    def _engine_said(self, said: EngineSaid, now: float) -> None:
        taken = self._crew.take(said)
        if taken is None:
            return
        worker, event = taken
        match event:
            case Ready(facts):
                self._health.count("model_loads")
                _log.info("model_loaded", model=facts.model, ms=facts.load_ms)
                self._bulletin.publish_provider(worker)
            case LoadFailed():
                self._bulletin.publish_provider(worker)
                if (failure := self._crew.refusal(worker.load.model)) is not None:
                    self._desk.end_waiting(worker.load.model, failure, now)
        self._lookout.engine_said(event, now)
        self._desk.engine_said(event, now)

    def _engine_ended(self, ended: EngineEnded, now: float) -> None:
        if (worker := self._crew.ended(ended, now)) is None:
            return
        self._health.count("engine_restarts")
        self._health.count("engine_recycles", worker.recycling is not None)
        self._desk.engine_lost(worker, now)
        self._lookout.engine_lost(worker, now)

    def _signalled(self, name: str, now: float) -> None:
        if name == "SIGHUP":
            try:
                self._operations.reload()
            except Refused as refused:
                _log.error("reload_failed", reason=refused.failure.message)
            return
        if self._operations.exit_status == RESTART_STATUS:  # now it is to end for good
            self._operations.exit_status = 0
        elif self._operations.stop_by is not None:  # a second signal: end at once
            self._operations.stop_by = now
            return
        self._operations.stop(now)

    # The end.

    def _farewell(self) -> None:
        """Answer what is still open, say goodbye, and see both acknowledged.

        Messages that come now are not decided on or acknowledged: they wait for the next start.
        """
        now = time.monotonic()
        self._desk.leave(now)
        self._bulletin.farewell(self._desk.backlog)
        self._records.commit()
        late = now + _FAREWELL_S
        while self._is_owed_something and time.monotonic() < late:
            mail = self._mailbox.get(0.1)
            if isinstance(mail, Arrived):
                mail.decided.owed = True
                mail.decided.set()
            elif isinstance(mail, Sent | Disconnected | Written | NotWritten):
                self._take(mail, time.monotonic())
                self._records.commit()

    @property
    def _is_owed_something(self) -> bool:
        return bool(self._desk.unpublished or (len(self._outbox) and self._outbox.connected))


def _crew(settings: Settings, lineup: Lineup, post: Callable[[Mail], None]) -> Crew:
    engine = settings.engine
    worker = partial(
        Worker,
        post=post,
        restart_max_s=engine.restart_max_s,
        hang_s=engine.hang_s,
        recycle_bytes=engine.recycle_mb << 20,
        wanted=settings.wanted if engine.runtime == "genai" else None,
    )
    return Crew(
        lineup,
        worker,
        keep_alive_s=engine.keep_alive_s,
        budget_bytes=engine.budget_mb << 20,
    )
