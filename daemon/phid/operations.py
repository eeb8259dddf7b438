"""The mode the service is in, and the commands of operators that change it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from phid import log, notify, reports
from phid import settings as settings_module
from phid.bulletin import Bulletin
from phid.commands import ModelCommand, WatchCommand
from phid.crew import Crew
from phid.desk import Desk
from phid.errors import Code, Refused
from phid.health import Health
from phid.intake import Intake
from phid.lookout import Lookout
from phid.messages import ReloadEvent
from phid.settings import Settings, SettingsError

_LIVE = (
    *("limits.", "sessions.", "control.", "health.", "log.", "stream.", "watches"),
    *("vision.max", "vision.camera", "vision.image", "vision.parts"),
    *("mqtt.reply_allow", "engine.keep_alive_s"),
)

Data = dict[str, Any]
"""What a command brought, as its answer tells it."""

RESTART_STATUS = -1
"""The exit status when the service is to be started anew by its caller."""

_log = log.get("operations")


class Operations:
    """What can be commanded (`control` has the verbs). Owner thread only; never waits.

    `settings` and `intake` are the ones in force; `due` says when `tick` has something to do
    (monotonic seconds); `stop_by` is set once the service is to end.
    """

    def __init__(
        self,
        settings: Settings,
        read_settings: Callable[[], Settings],
        crew: Crew,
        desk: Desk,
        bulletin: Bulletin,
        health: Health,
        lookout: Lookout,
    ) -> None:
        self.settings = settings
        self.intake = Intake.of(settings)
        self.paused = False
        self.draining = False
        self.stop_by: float | None = None
        self.exit_status = 0
        self.due: dict[str, float] = {}
        self._read_settings = read_settings
        self._crew = crew
        self._desk = desk
        self._bulletin = bulletin
        self._health = health
        self._lookout = lookout

    def look(self) -> None:
        """Bring the state that is told, and whether requests are let in, in line with the facts."""
        self._desk.admission.closed = reports.closed(
            crew=self._crew, paused=self.paused, draining=self.draining
        )
        backlog = self._desk.backlog
        self._bulletin.look(paused=self.paused, draining=self.draining, backlog=backlog)

    def tick(self, now: float) -> None:
        """Do what a command has put off."""
        for name in [name for name, at in self.due.items() if at <= now]:
            del self.due[name]
            if name == "log":
                self._configure_log(self.settings.log.level)
            else:
                self._bulletin.publish_all(self._desk.backlog, paused=self.paused)

    def stop(self, now: float) -> None:
        """Take nothing more, and end when what was accepted is answered or time is up."""
        _log.info("service_stopping", open=len(self._desk.ledger.open_tickets))
        # After STOPPING=1 systemd would end us, even if we had started anew meanwhile.
        if self.exit_status != RESTART_STATUS:
            notify.notify("STOPPING=1")
        self.draining = True
        self.paused = self._desk.held = False
        self.stop_by = now + self.settings.limits.drain_s
        self.look()

    # The commands.

    def ping(self) -> Data:
        """State and uptime."""
        return {
            "state": self._bulletin.state.name,
            "queue": len(self._desk.backlog),
            "uptime_s": round(self._health.uptime_s),
            "version": reports.VERSION,
        }

    def pause(self) -> Data:
        """Refuse new requests, hold the waiting ones. Raises Refused while the service stops."""
        if self.stop_by is not None:
            raise Refused(Code.DRAINING, "the service is stopping")
        self.paused = self._desk.held = True
        return self._changed()

    def resume(self) -> Data:
        """Take requests again; a service that is stopping goes on draining."""
        self.paused = self._desk.held = False
        self.draining = self.stop_by is not None
        return self._changed()

    def drain(self) -> Data:
        """Refuse new requests, finish the accepted ones."""
        self.draining = True
        return self._changed()

    def discover(self) -> Data:
        """Publish everything again, soon: a whole fleet is asked at the same moment."""
        spread = random.uniform(0, self.settings.health.discover_spread_s)  # noqa: S311
        self.due["discover"] = time.monotonic() + spread
        return {"within_s": round(spread, 3)}

    def set_log_level(self, level: str, for_s: float | None) -> Data:
        """Log at another level."""
        self._configure_log(level)
        self.due.pop("log", None)
        if for_s is not None:
            self.due["log"] = time.monotonic() + for_s
        return {"level": level}

    def reload(self) -> Data:
        """Take over what can change while running; name what needs a restart."""
        try:
            fresh = self._read_settings()
        except SettingsError as error:
            self._tell_of_reload(ok=False, reason=str(error))
            raise Refused(Code.BAD_REQUEST, str(error)) from None
        changed = settings_module.differences(self.settings, fresh)
        later = [name for name in changed if not is_live(name)]
        self.settings = settings_module.merge(self.settings, fresh, is_live)
        self.intake = Intake.of(self.settings)
        self._configure_log(self.settings.log.level)
        self._desk.configure(self.settings)
        self._lookout.configure(self.settings)
        self._crew.keep_alive_s = self.settings.engine.keep_alive_s
        self._bulletin.settings = self.settings
        self._bulletin.publish_info()
        self._tell_of_reload(ok=True, changed=changed, restart_needed=later)
        _log.info("settings_reloaded", changed=changed, restart_needed=later)
        return {"changed": changed, "restart_needed": later}

    def watch(self, command: WatchCommand) -> Data:
        """Make, change or delete a standing prompt."""
        return self._lookout.command(command)

    def model(self, command: ModelCommand) -> Data:
        """Load, unload or switch to a model."""
        now = time.monotonic()
        match command.action:
            case "load":
                self._crew.load(command.name, now, pin=command.pin)
            case "unload":
                self._crew.unload(command.name, now)
            case "switch":
                self._crew.switch(command.name, now)
        self.look()
        return {"action": command.action, "name": command.name, "models": self._crew.states}

    def restart(self, what: str) -> Data:
        """Kill the engine; or drain and start over, which raises Refused during a stop."""
        if what == "service":
            if self.stop_by is not None:
                raise Refused(Code.DRAINING, "the service is stopping")
            self.exit_status = RESTART_STATUS
            self.stop(time.monotonic())
        else:
            self._crew.restart()
        return {"restarting": what}

    def _tell_of_reload(self, **fields: Any) -> None:
        self._bulletin.publish_event(ReloadEvent(ts=int(time.time()), **fields))

    def _changed(self) -> Data:
        self.look()
        return {"state": self._bulletin.state.name}

    def _configure_log(self, level: str) -> None:
        log.configure(level, self.settings.log.format)


def is_live(name: str) -> bool:
    """True if a reload takes this setting over while running; the rest needs a restart."""
    return name.startswith(_LIVE)
