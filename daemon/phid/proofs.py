"""The values of a proof: what is wanted of providers, what a trial left behind, what was chosen."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from phid.jobs import Load

Stage = Literal["probe", "check"]
"""A probe takes the small model that comes with phid, a check the real one."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the settings say of providers.

    `providers` are names or `auto`, in order; with `strict` no other is used. `options` are each
    provider's, by its name. `memory` is the file that keeps what was proven.
    """

    providers: tuple[str, ...] = ("cpu",)
    options: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()
    strict: bool = False
    memory: Path | None = None

    def options_of(self, provider: str) -> tuple[tuple[str, str], ...]:
        """The options of one provider."""
        return dict(self.options).get(provider, ())


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a trial left behind, whatever became of it.

    `stage` is the last one it reported; `says` the error it ended with (empty: none), and `mend`
    what helps against that, where the trial itself knows; `died` is how its process ended, if it
    did so without a word; `printed` the end of what native code wrote. `pieces` are the tokens of
    its answer, in bytes.
    """

    stage: str = ""
    says: str = ""
    mend: str = ""
    died: str = ""
    printed: str = ""
    pieces: tuple[bytes, ...] = ()
    placement: dict[str, float] = field(default_factory=dict)
    tokens_per_s: float | None = None

    @property
    def ran(self) -> bool:
        """True where it came to an answer."""
        return not self.says and not self.died


@dataclass(frozen=True, slots=True)
class Report:
    """What is said of a provider, in a user's words; `mend` is the line that helps."""

    provider: str
    passed: bool
    says: str
    mend: str | None = None
    placement: dict[str, float] = field(default_factory=dict)
    tokens_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """The provider to run on, and why not on those before it; None: on none that is allowed."""

    requested: tuple[str, ...]
    chosen: str | None
    reports: tuple[Report, ...]

    @property
    def report(self) -> Report | None:
        """What was found of the chosen one."""
        return next((r for r in self.reports if r.passed), None)


@dataclass(frozen=True, slots=True)
class Try:
    """To a trial: load the model as `load` says, and answer `prompt` with so many tokens."""

    load: Load
    prompt: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Tried:
    """From a trial: it has come to its end, well or not."""

    evidence: Evidence


@dataclass(frozen=True, slots=True)
class Prove:
    """To the prover: choose a provider for this model.

    The provider `doubted` is tried again, whatever was proven before; with `doubt_refusals` so are
    all that did not pass. `barred` are not to be used, each with the reason.
    """

    load: Load
    wanted: Wanted
    doubted: str | None = None
    barred: tuple[tuple[str, str], ...] = ()
    doubt_refusals: bool = False


@dataclass(frozen=True, slots=True)
class Proved:
    """From the prover: the choice; it exits after this."""

    selection: Selection
