"""A model of this device with its worker: what it takes, and why it cannot answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from phid import lineup, log
from phid.errors import Code, Failure
from phid.lineup import Lineup, Model
from phid.proposal import Kind
from phid.worker import Worker

_RETRY_MS = 5000
_log = log.get("member")


@dataclass(slots=True, eq=False)
class Member:
    """A model and its worker. `leaving` says why it is to be unloaded, until it is wanted again.

    `ordered`: an operator wants it loaded, and it is not yet. `absence` says that its files were
    not there when last looked for.
    """

    model: Model
    worker: Worker
    leaving: str | None = None
    ordered: bool = False
    pinned: bool = False
    absence: str | None = None

    def look(self, again: Callable[[], Lineup]) -> bool:
        """See whether its files are there: True if that has changed. `again` reads what is."""
        was, self.absence = self.absence, lineup.absence(self.model.load)
        if (was is None) == (self.absence is None):
            return False
        if self.absence is not None:
            _log.error("model_not_found", model=self.model.name, reason=self.absence)
            return True
        fresh = (model for model in again().models if model.name == self.model.name)
        self.model = next(fresh, self.model)  # what it will take is known now
        _log.info("model_found", model=self.model.name)
        return True

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
        """What whoever asks it is told while waiting for an engine makes no sense."""
        if self.absence is not None:
            return self.failure
        if not self.worker.hopeless or self.worker.failure is None:
            return None
        says = f"{self.worker.failure.code}: {self.worker.failure.message}"
        return Failure(Code.LOADING, says, retry_after_ms=_RETRY_MS)
