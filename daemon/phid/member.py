"""A model of this device with its worker: what it takes, and why it cannot answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from phid import lineup, log
from phid.errors import Code, Failure
from phid.lineup import Model
from phid.newcomer import Newcomer
from phid.proposal import Kind
from phid.worker import Worker

_RETRY_MS = 5000
_log = log.get("member")


@dataclass(slots=True, eq=False)
class Member:
    """A model and its worker. `leaving` says why it is to be unloaded, until it is wanted again.

    `ordered`: an operator wants it loaded, and it is not yet. `absence` says why it could not be
    used at the last look: its files were missing, or still being copied. `newcomer` watches a copy.
    """

    model: Model
    worker: Worker
    leaving: str | None = None
    ordered: bool = False
    pinned: bool = False
    absence: str | None = None
    newcomer: Newcomer | None = None

    def look(self, now: float, *, failed: bool = False) -> bool:
        """See whether its files are there: True if that has changed.

        A model that is being copied is absent until all of it is there. `failed`: it could not be
        loaded; if its files have changed since it was reckoned, they were still being copied.
        """
        was, self.absence = self.absence, lineup.absence(self.model.load)
        if self.absence is not None:
            self.newcomer = None
        elif was is not None or (failed and lineup.has_changed(self.model)):
            self.absence = self._what_is_missing(now)
            if self.absence is None:
                self._take_in()
        changed = (was is None) != (self.absence is None)
        if changed and self.absence is not None:
            _log.error("model_not_found", model=self.model.name, reason=self.absence)
        return changed

    def reckon(self) -> bool:
        """Reckon what it takes by the files it has now: True if they have changed."""
        was, self.model = self.model, lineup.reckoned(self.model)
        return self.model is not was

    def _what_is_missing(self, now: float) -> str | None:
        """Why it is not there yet; None once all of it is."""
        folder = Path(self.model.load.path)
        if self.newcomer is None:
            self.newcomer = Newcomer(folder)
        if self.newcomer.is_whole(now):
            return None
        return f"{self.model.name} is still being copied to {folder.parent}"

    def _take_in(self) -> None:
        """Forget what was known of a part of it, or of its forerunner: now all of it is there."""
        self.newcomer = None
        if self.reckon():
            self.worker.placing.forget()
        _log.info("model_found", model=self.model.name)

    @property
    def takes_memory(self) -> bool:
        """True while there is an engine, or another is to come."""
        return self.worker.state != "stopped"

    @property
    def kind(self) -> Kind | None:
        """What it is for, where that is known."""
        facts = self.worker.facts
        return facts.kind if facts is not None else self.model.kind

    @property
    def idle(self) -> bool:
        """True while its engine can be ended without harm."""
        return self.worker.state in ("ready", "pausing") and self.worker.running is None

    @property
    def failure(self) -> Failure | None:
        """Why it cannot answer at present."""
        if self.absence is not None:
            return Failure(Code.NOT_FOUND, self.absence, field="model")
        return self.worker.failure

    @property
    def refusal(self) -> Failure | None:
        """Why its requests are refused; None while it makes sense to wait for an engine."""
        if self.absence is not None:
            return self.failure
        if not self.worker.hopeless or self.worker.failure is None:
            return None
        says = f"{self.worker.failure.code}: {self.worker.failure.message}"
        return Failure(Code.LOADING, says, retry_after_ms=_RETRY_MS)
