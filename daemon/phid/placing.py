"""Where one model's engines run: what was chosen for it, what is in doubt, and what is barred."""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import replace

from phid import packages, selection
from phid.jobs import EngineFacts, Load
from phid.proofs import Evidence, Prove, Report, Selection, Stage, Wanted
from phid.proven import Recall
from phid.providers import CPU, PROVIDERS, UNKNOWN

_CRASHES, _WITHIN_S = 3, 600.0


class _NotProvenError(Exception):
    """Evidence that only a trial can give."""


class Placing:
    """The choice of a provider for one model. Owner thread only; never waits for a trial.

    `selection` is what was chosen, None while that needs a proof; `demotion` says why the model
    runs on another provider than it should; `refused` is the last selection that chose none.
    """

    def __init__(self, load: Load, wanted: Wanted) -> None:
        self.selection: Selection | None = None
        self.refused: Selection | None = None
        self.requested = wanted.providers
        self._load = load
        self._wanted = wanted
        self._doubted: str | None = None
        self._barred: dict[str, str] = {}
        self._crashes: deque[float] = deque(maxlen=_CRASHES)

    @property
    def chosen(self) -> str | None:
        """The provider in force."""
        return self.selection.chosen if self.selection else None

    @property
    def refusal(self) -> str | None:
        """Why there is no provider that the model may run on."""
        if self.selection is None or self.selection.chosen is not None:
            return None
        why = "; ".join(f"{PROVIDERS[r.provider].shown}: {r.says}" for r in self.selection.reports)
        return f"no provider that may run the model passes ({why})"

    @property
    def demotion(self) -> str | None:
        """Why the state is degraded although the model runs; None where it is not."""
        if self.selection is None or self.chosen is None:
            return None
        shown = PROVIDERS[self.chosen].shown
        if self._barred:
            why = "; ".join(f"{PROVIDERS[n].shown}: {says}" for n, says in self._barred.items())
            return f"the model runs on {shown} now: {why}"
        named = self._wanted.providers
        if self.chosen == CPU and CPU not in named and "auto" not in named:
            why = "; ".join(
                f"{PROVIDERS[r.provider].shown}: {r.says}"
                for r in self.selection.reports
                if not r.passed
            )
            return f"the model runs on the CPU: {why}"
        return None

    def settle(self) -> Prove | None:
        """The proof that is needed before an engine is started; None: it is known where it runs.

        Reads the file of what was proven, some kilobytes, where the choice hangs on it.
        """
        if self.selection is None:
            try:
                self.selection = self._recall()
            except _NotProvenError:
                return Prove(self._load, self._wanted, self._doubted, tuple(self._barred.items()))
        return None

    def proved(self, selection: Selection) -> None:
        """The prover has chosen."""
        self.selection, self._doubted = selection, None

    def unproved(self, why: str) -> None:
        """The prover itself has failed: choose the CPU, where allowed, for it needs no proof."""
        name = next((n for n in self._wanted.providers if n not in (CPU, "auto")), "cuda")
        reports = [Report(name, passed=False, says=f"could not be proven: the prover {why}")]
        if not self._wanted.strict:
            reports.append(Report(CPU, passed=True, says="runs everywhere"))
        chosen = None if self._wanted.strict else CPU
        self.selection = Selection(self._wanted.providers, chosen, tuple(reports))

    def ask_again(self) -> None:
        """Have what was refused looked at again: a driver may have come."""
        self.refused, self.selection = self.selection, None

    def forget(self) -> None:
        """Forget what was chosen, doubted and barred: the model is another now."""
        self.selection, self._doubted = None, None
        self._barred.clear()
        self._crashes.clear()

    def place(self, load: Load) -> Load:
        """The command that loads the model where it was chosen to run."""
        assert self.selection is not None
        assert self.selection.chosen is not None
        name, report = self.selection.chosen, self.selection.report
        return replace(
            load,
            provider=name,
            options=self._wanted.options_of(name),
            proven=tuple(report.placement.items()) if report else (),
        )

    def disagrees(self, facts: EngineFacts) -> str | None:
        """Bar the provider if its engine was found elsewhere: what is wrong, in words, or None."""
        chosen = self.chosen
        if chosen in (None, CPU) or facts.provider in (chosen, UNKNOWN):
            return None
        assert chosen is not None
        where = ", ".join(f"{pct:g} % on {name}" for name, pct in facts.placement.items())
        why = f"its engine was found to run elsewhere ({where})"
        self._bar(chosen, why)
        return f"was not on {PROVIDERS[chosen].shown}: {where}"

    def crashed(self, now: float, why: str) -> None:
        """An engine has ended by itself: its provider is in doubt, and after three barred.

        The CPU, after which none comes, is never in doubt; the last one allowed is never barred.
        """
        chosen = self.chosen
        if chosen is None or chosen == CPU:
            return
        self._crashes.append(now)
        self._doubted = chosen
        self.selection = None
        if len(self._crashes) == _CRASHES and now - self._crashes[0] <= _WITHIN_S:
            self._crashes.clear()
            if not self._wanted.strict or len(self._barred) + 1 < len(self._named):
                self._bar(chosen, f"{_CRASHES} engines were lost within 10 minutes, the last {why}")

    @property
    def _named(self) -> tuple[str, ...]:
        return (
            tuple(n for n in PROVIDERS if n != CPU)
            if "auto" in self._wanted.providers
            else (self._wanted.providers)
        )

    def _bar(self, name: str, why: str) -> None:
        self._barred[name] = why
        self._doubted, self.selection = None, None

    def _recall(self) -> Selection:
        recall = Recall(self._load, self._wanted)

        def look(provider: str, stage: Stage) -> Evidence:
            found = None if provider == self._doubted else recall(provider, stage)
            if found is None:
                raise _NotProvenError
            return found

        return selection.choose(
            self._wanted,
            look,
            packages.installed,
            windows=sys.platform == "win32",
            barred=self._barred,
        )
