"""The prover: tries providers one by one in throwaway processes, and chooses one for a model."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from phid import channel, errand, log, packages, selection
from phid.jobs import Load, Loading
from phid.placement import Profile
from phid.proofs import Evidence, Prove, Proved, Selection, Stage, Tried, Try, Wanted
from phid.proven import Proven, Surroundings
from phid.providers import CPU, PROVIDERS

SMALL_MODEL = Path(__file__).parent / "small_model"
"""A Llama of two tiny layers: the kernels that a phi or llama takes, in 100 kB."""

PROMPT = "Count from one to ten."
TOKENS, SMALL_TOKENS = 16, len(selection.SMALL_ANSWER)

# A provider may compile its kernels at its first start, for a minute and more.
_PROBE_S = 90.0
_CHECK_S, _BYTES_PER_S = 120.0, 20e6


def prove(
    task: Prove, report: Callable[[Loading], None], *, probe_s: float = _PROBE_S
) -> Selection:
    """Choose a provider: by what was proven before, and by trials, which are kept.

    Takes from nothing to minutes; `report` hears of each trial. Each may take `probe_s` for the
    small model, and more for the real one by its size.
    """
    attempts = _Attempts(task, report, probe_s)
    found = selection.choose(
        task.wanted,
        attempts.look,
        packages.installed,
        windows=sys.platform == "win32",
        barred=dict(task.barred),
    )
    if found.chosen is not None:
        attempts.confirm(found.chosen)
    return found


def usable(
    load: Load, wanted: Wanted, report: Callable[[Loading], None], *, probe_s: float = _PROBE_S
) -> tuple[str, ...]:
    """`selection.usable`, by what was proven, or by trials; `load` is read for its threads alone.

    Whether a provider runs the model that is then chosen is proven later, with that model.
    """
    attempts = _Attempts(Prove(load, wanted), report, probe_s)
    return selection.usable(
        wanted, attempts.look, packages.installed, windows=sys.platform == "win32"
    )


class _Attempts:
    """The trials of one proof; each is made at most once."""

    def __init__(self, task: Prove, report: Callable[[Loading], None], probe_s: float) -> None:
        self._task = task
        self._report = report
        self._probe_s = probe_s
        self._proven = Proven(task.wanted.memory)
        self._around = Surroundings.of(task.load)
        self._made: dict[str, Evidence] = {}

    def look(self, provider: str, stage: Stage) -> Evidence:
        """The evidence of a trial: what was proven, if it still holds, else a new one."""
        key = self._around.key(provider, stage, self._task.wanted)
        if key in self._made:
            return self._made[key]
        known = None
        if provider != self._task.doubted:
            known = self._proven.find(key, refusals=not self._task.doubt_refusals)
        if known is None:
            known = self._attempt(provider, stage)
            self._proven.keep(key, provider, known)
        self._made[key] = known
        return known

    def confirm(self, chosen: str) -> None:
        """Note that the choice rests on this provider's trials, and on the CPU's text beside it."""
        trials: list[tuple[str, Stage]] = [(chosen, "probe"), (chosen, "check"), (CPU, "check")]
        self._proven.confirm(self._around.key(*trial, self._task.wanted) for trial in trials)

    def _attempt(self, provider: str, stage: Stage) -> Evidence:
        name = PROVIDERS[provider].shown
        what = "the small model" if stage == "probe" else self._task.load.model
        self._report(Loading(f"trying {name} with {what}"))
        load = replace(
            self._task.load,
            provider=provider,
            options=self._task.wanted.options_of(provider),
            proven=(),
        )
        limit_s, tokens = self._probe_s, TOKENS
        if stage == "probe":
            load = replace(load, path=str(SMALL_MODEL), max_context=0)
            tokens = SMALL_TOKENS
        else:
            limit_s = _CHECK_S + _bytes_of(Path(load.path)) / _BYTES_PER_S
        evidence = try_out(load, tokens, limit_s, self._report)
        if not evidence.ran or evidence.placement or provider == CPU:
            return evidence
        # These graphs, or this runtime, can only be profiled from their beginning, which is slow:
        # so a second trial finds out where the first one ran.
        self._report(Loading(f"measuring where {name} runs {what}"))
        return replace(evidence, placement=_profile(load, limit_s, self._report))


def try_out(load: Load, tokens: int, limit_s: float, report: Callable[[Loading], None]) -> Evidence:
    """Run one trial in a process of its own, for so long at most; what it left behind."""
    came = errand.run(channel.TRIAL, Try(load, PROMPT, tokens), limit_s, report)
    if isinstance(came.answer, Tried):
        evidence = came.answer.evidence
        return replace(evidence, stage=evidence.stage or came.stage, printed=came.printed)
    died = came.died or f"hung: it was ended after {limit_s:.0f} s"
    return Evidence(came.stage, died=died, printed=came.printed)


def _profile(load: Load, limit_s: float, report: Callable[[Loading], None]) -> dict[str, float]:
    try:
        profile = Profile()
    except OSError:
        return {}
    try:
        evidence = try_out(replace(load, profile=profile.prefix), TOKENS, limit_s, report)
        return profile.placement() if evidence.ran else {}
    finally:
        profile.close()


def _bytes_of(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    return 0


def main() -> int:
    """Prove what comes over the connection this process was started with: the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.dup2(2, 1)
    log.configure("warning", "text")
    connection = channel.inherited()
    with contextlib.suppress(EOFError, ConnectionError), connection:
        task = connection.recv()
        if isinstance(task, Prove):
            connection.send(Proved(prove(task, connection.send)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
