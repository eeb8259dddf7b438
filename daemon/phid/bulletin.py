"""The device's word about itself on the wire: its state kept, its reports published."""

from __future__ import annotations

import time

from phid import log, notify, reports
from phid.backlog import Backlog
from phid.crew import Crew, ModelState
from phid.health import Health
from phid.messages import JobEvent, ModelEvent, Provider, ProviderEvent, ReloadEvent, StateEvent
from phid.outbox import Outbox, Publication
from phid.reports import State
from phid.settings import Settings
from phid.traffic import Will
from phid.worker import Worker

EventMessage = JobEvent | ModelEvent | ProviderEvent | ReloadEvent | StateEvent

_log = log.get("bulletin")


class Bulletin:
    """Publishes status, info, health and events. Owner thread only; never waits.

    `session` names the connection that the status is told on, `refused_filters` are what the
    broker would not let us subscribe to, `silenced` says that messages to us do not arrive,
    `unkept` why the disk does not take what we accept, `heat` what the sensors say.
    """

    def __init__(
        self,
        settings: Settings,
        outbox: Outbox,
        health: Health,
        crew: Crew,
    ) -> None:
        self.settings = settings
        self.session = "none"
        self.refused_filters: tuple[str, ...] = ()
        self.silenced = False
        self.unkept: str | None = None
        self.heat: str | None = None
        self.state = State("loading")
        self._since = now = time.monotonic()
        self._health_at = now + settings.health.interval_s
        self._heartbeat_at = now + settings.health.heartbeat_s
        self._where: dict[str, Provider] = {}
        self._outbox = outbox
        self._health = health
        self._crew = crew

    @property
    def due_at(self) -> float:
        """When `tick` has something to do."""
        return min(self._health_at, self._heartbeat_at)

    def tick(self, now: float, backlog: Backlog, *, paused: bool) -> None:
        """Publish what is due: the numbers, and the state again before it expires."""
        if now >= self._health_at:
            self._health_at = now + self.settings.health.interval_s
            self.publish_health(backlog, paused=paused)
        if now >= self._heartbeat_at:
            self._heartbeat_at = now + self.settings.health.heartbeat_s
            self.publish_status(backlog)

    def look(self, *, paused: bool, draining: bool, backlog: Backlog) -> None:
        """Tell of the state if it has changed."""
        state = reports.state_of(
            crew=self._crew,
            paused=paused,
            draining=draining,
            refused_filters=self.refused_filters,
            silenced=self.silenced,
            unkept=self.unkept,
            heat=self.heat,
        )
        if state != self.state:
            self._change(state, backlog)

    def farewell(self, backlog: Backlog) -> None:
        """Publish `offline`, as the will would."""
        self._change(State("offline", "stopped"), backlog)

    def publish_all(self, backlog: Backlog, *, paused: bool) -> None:
        """Publish everything again."""
        self.publish_status(backlog)
        self.publish_info()
        self.publish_health(backlog, paused=paused)

    def publish_status(self, backlog: Backlog) -> None:
        """Publish the state, retained; only `offline` does not expire."""
        message = reports.status(
            self.state,
            session=self.session,
            # From its age: the wall clock may have been set since.
            since=time.time() - (time.monotonic() - self._since),
            queue=len(backlog),
            crew=self._crew,
        )
        expiry_s = max(1, round(3 * self.settings.health.heartbeat_s))
        self._outbox.put(
            Publication(
                self.settings.topics.status,
                message,
                retain=True,
                expiry_s=None if self.state.name == "offline" else expiry_s,
            )
        )

    def publish_info(self) -> None:
        """Publish what the device is, retained."""
        message = reports.info(self.settings, self._crew)
        self._outbox.put(Publication(self.settings.topics.info, message, retain=True))

    def publish_provider(self, worker: Worker) -> None:
        """Publish a line of where a model runs, and why, if that is news."""
        model, where = worker.load.model, reports.provider(worker)
        if where == self._where.get(model):
            return
        self._where[model] = where
        event = ProviderEvent(
            ts=int(time.time()),
            model=model,
            provider=where,
        )
        self.publish_event(event)

    def publish_health(self, backlog: Backlog, *, paused: bool) -> None:
        """Publish the numbers, if the network takes them."""
        numbers = reports.health(
            self._health,
            crew=self._crew,
            backlog=backlog,
            paused=paused,
            outbox=self._outbox,
        )
        payload = reports.numbers_payload(numbers)
        if not self._outbox.send_now(self.settings.topics.health, payload):
            self._outbox.dropped += 1

    def publish_event(self, event: EventMessage) -> None:
        """Publish a line of what has happened."""
        self._outbox.put(Publication(self.settings.topics.event, event))

    def model_changed(self, model: str, state: ModelState, reason: str | None) -> None:
        """Tell that a model is loaded, or is not any more."""
        event = ModelEvent(ts=int(time.time()), model=model, state=state, reason=reason)
        self.publish_event(event)
        self.publish_info()

    def will(self, session: str) -> Will:
        """What the broker says for us when this connection is lost."""
        return Will(self.settings.topics.status, reports.will_payload(session))

    def _change(self, state: State, backlog: Backlog) -> None:
        was, self.state, self._since = self.state, state, time.monotonic()
        _log.info("state_changed", state=state.name, was=was.name, reason=state.reason)
        notify.notify(f"STATUS={state.name}" + (f": {state.reason}" if state.reason else ""))
        self.publish_status(backlog)
        event = StateEvent(ts=int(time.time()), state=state.name, was=was.name, reason=state.reason)
        self.publish_event(event)
