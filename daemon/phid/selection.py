"""The policy: which provider runs the model, by what their trials have left behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from phid import packages, reasons
from phid.packages import Installed
from phid.proofs import Evidence, Report, Selection, Stage, Wanted
from phid.providers import AUTO, CPU, PROVIDERS, candidates

Look = Callable[[str, Stage], Evidence]
"""The evidence of a trial of a provider; it may have to be made, which takes its time."""

SMALL_ANSWER = tuple(bytes([byte]) for byte in bytes.fromhex("da3e44a2997d0216"))
"""The small model's answer on the CPU, to prover.PROMPT; scripts/make-small-model prints it."""

_LEAST_PCT = 50.0
# A text that is the CPU's for so many tokens counts as the same text in other roundings.
_NEAR_TOKENS = 4


def choose(
    wanted: Wanted,
    look: Look,
    installed: Installed,
    *,
    windows: bool,
    barred: Mapping[str, str] | None = None,
) -> Selection:
    """The first provider that passes, with a report of each that was looked at.

    `look` is asked only for what the choice hangs on, and never of the CPU alone: what the CPU
    does is measured by the engine itself. `barred` are passed over, with that reason.
    """
    reports = []
    for name in _in_order(wanted, windows=windows):
        report = _absent(name, installed, windows=windows)
        if report is None and barred and name in barred:
            report = Report(name, passed=False, says=barred[name], mend=_RESTART)
        if report is None and name == CPU:
            report = Report(name, passed=True, says="runs everywhere; the engine measures it")
        if report is None and PROVIDERS[name].small:
            report = probed(name, look(name, "probe"))
        if report is None:
            report = checked(
                name, look(name, "check"), lambda: look(CPU, "check"), auto=_auto(wanted)
            )
        reports.append(report)
        if report.passed:
            return Selection(wanted.providers, name, tuple(reports))
    return Selection(wanted.providers, None, tuple(reports))


def usable(
    wanted: Wanted,
    look: Callable[[str, Stage], Evidence | None],
    installed: Installed,
    *,
    windows: bool,
) -> tuple[str, ...]:
    """The providers that run the small model here, the CPU last; `look` may know of no trial.

    It helps to choose a model, and no check with a real one follows: so the small one must meet a
    check's bars, with as much of its time on the provider as a real one, and the CPU's text.
    """
    names = []
    for name in _in_order(wanted, windows=windows):
        if name == CPU or not PROVIDERS[name].small or _absent(name, installed, windows=windows):
            continue
        evidence = look(name, "probe")
        if evidence is None or probed(name, evidence) is not None:
            continue
        if evidence.placement[name] >= _LEAST_PCT:
            names.append(name)
    return (*names, CPU)


_RESTART = "phid doctor looks at it again; restart the daemon to have it tried again"


def _in_order(wanted: Wanted, *, windows: bool) -> list[str]:
    names = candidates(wanted.providers, strict=wanted.strict)
    passed_over = set() if windows or "directml" in wanted.providers else {"directml"}
    return [name for name in names if name not in passed_over]


def _auto(wanted: Wanted) -> bool:
    return AUTO in wanted.providers


def _absent(name: str, installed: Installed, *, windows: bool) -> Report | None:
    """Why it need not be tried."""
    if name == "directml" and not windows:
        says = "DirectML is a part of Windows, which this is not"
        return Report(name, passed=False, says=says, mend="leave DirectML out of providers")
    lacks = packages.missing(name, installed)
    if lacks and name != CPU:
        says = f"not installed: {' and '.join(lacks)}"
        return Report(name, passed=False, says=says, mend=PROVIDERS[name].install)
    return None


def probed(name: str, evidence: Evidence) -> Report | None:
    """Why a provider fails with the small model; None: it does not."""
    if not evidence.ran:
        return _failed(name, evidence)
    if not evidence.placement.get(name):
        return _elsewhere(name, evidence)
    alike, says = likeness(evidence.pieces, SMALL_ANSWER)
    if not alike:
        return Report(name, passed=False, says=f"with the small model: {says}", mend=_wrong(name))
    return None


def checked(
    name: str, evidence: Evidence, reference: Callable[[], Evidence], *, auto: bool
) -> Report:
    """Whether a provider passes with the real model, held against the CPU where that runs it."""
    if not evidence.ran:
        return _failed(name, evidence)
    if evidence.placement.get(name, 0.0) < _LEAST_PCT:
        return _elsewhere(name, evidence)
    cpu = reference()
    alike, says = likeness(evidence.pieces, cpu.pieces if cpu.ran else ())
    speed, on_cpu = evidence.tokens_per_s, cpu.tokens_per_s
    mend = None
    if not alike:
        mend = _wrong(name)
    elif auto and cpu.ran and speed and on_cpu and speed < on_cpu:
        alike = False
        says = f"slower than the CPU: {speed:.1f} against {on_cpu:.1f} tokens/s"
        mend = f'providers = ["{name}"] has it all the same'
    return Report(name, alike, says, mend, evidence.placement, speed)


def likeness(pieces: tuple[bytes, ...], reference: tuple[bytes, ...]) -> tuple[bool, str]:
    """Whether an answer will do beside the CPU's, and in which way."""
    if not reference:
        sane, says = is_sane(pieces)
        return sane, says if not sane else "a sound answer; the CPU does not run this model"
    same = 0
    for one, other in zip(pieces, reference, strict=False):
        if one != other:
            break
        same += 1
    if same == max(len(pieces), len(reference)):
        return True, f"the CPU's text, {same} tokens of it"
    if same >= _NEAR_TOKENS:
        return True, f"near the CPU's text: {same} of {len(reference)} tokens, then other words"
    return False, f"not the CPU's text: it differs from token {same + 1} on"


def is_sane(pieces: tuple[bytes, ...]) -> tuple[bool, str]:
    """Whether an answer with nothing to hold it against reads as text."""
    text = b"".join(pieces).decode("utf-8", "replace")
    if not text.strip():
        return False, "its answer is empty"
    if len(pieces) > _NEAR_TOKENS and len(set(pieces)) == 1:
        return False, "its answer is one token again and again"
    if text.count("�") * 4 > len(text):
        return False, "its answer is no text"
    return True, "a sound answer"


def _wrong(name: str) -> str:
    return f"another build of {PROVIDERS[name].shown}'s package or driver; or another model"


def _failed(name: str, evidence: Evidence) -> Report:
    says, mend = reasons.explain(name, evidence)
    return Report(name, passed=False, says=says, mend=mend)


def _elsewhere(name: str, evidence: Evidence) -> Report:
    shown, placement = PROVIDERS[name].shown, evidence.placement
    if not placement:
        says, mend = "where it ran could not be measured", "free room in the folder of $TMPDIR"
    else:
        where = ", ".join(f"{pct:g} % on {place}" for place, pct in placement.items())
        says = f"it loads, and does not run there: {where}"
        mend = f"a model made for {shown}; see README, Providers"
        if known := reasons.meaning(evidence.printed):
            says, mend = f"{says} ({known[0]})", known[1] or mend
    return Report(name, passed=False, says=says, mend=mend, placement=placement)
