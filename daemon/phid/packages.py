"""What is installed of the runtime and its providers, and what cannot be installed side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from phid.providers import PROVIDERS

Installed = Callable[[str], str | None]
"""A distribution's version; None if it is not there."""

GENAI = ("onnxruntime-genai", "onnxruntime-genai-cuda", "onnxruntime-genai-directml")
RUNTIME = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-silicon",
)
_PLUGINS = ("onnxruntime-qnn", "onnxruntime-ep-openvino")
# What goes together: the runtime a build of GenAI was made for.
_PARTNERS = {
    "onnxruntime-genai": ("onnxruntime", "onnxruntime-openvino"),
    "onnxruntime-genai-cuda": ("onnxruntime-gpu",),
    "onnxruntime-genai-directml": ("onnxruntime-directml", "onnxruntime"),
}
# The first version that can profile a single run; an older one ends the process when asked to.
_PROFILES_RUNS = (1, 25)


@dataclass(frozen=True, slots=True)
class Fault:
    """A mix that cannot work, in a user's words, and the line that mends it."""

    says: str
    mend: str


def installed(distribution: str) -> str | None:
    """The version of an installed distribution, by its metadata: nothing is imported."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def versions(installed: Installed = installed) -> dict[str, str]:
    """Everything of the runtime that is installed, with its version."""
    names = (*GENAI, *RUNTIME, *_PLUGINS)
    return {name: version for name in names if (version := installed(name))}


def fault(installed: Installed = installed) -> Fault | None:
    """The first mix that cannot work: distributions that write the same files."""
    for rivals, module in ((GENAI, "onnxruntime_genai"), (RUNTIME, "onnxruntime")):
        both = [name for name in rivals if installed(name)]
        if len(both) > 1:
            says = (
                f"{' and '.join(both)} are both installed: both write the package {module},"
                " and one has overwritten the other"
            )
            return Fault(says, _mend(both, installed))
    genai = next((name for name in GENAI if installed(name)), None)
    runtime = next((name for name in RUNTIME if installed(name)), None)
    if genai and runtime and runtime not in _PARTNERS[genai]:
        partner = _PARTNERS[genai][0]
        says = f"{genai} is beside {runtime}, and was made for {partner}"
        mend = f"pip uninstall -y {runtime} && pip install --force-reinstall {partner}"
        return Fault(says, mend)
    return None


def _mend(both: list[str], installed: Installed) -> str:
    """Remove all of them, for they share files, and put back the one that a provider wants."""
    special = [name for name in both if name not in {GENAI[0], RUNTIME[0]}]
    keep = special[0] if special else both[0]
    # Its version stays: openvino's are older than what pip would choose to go with GenAI.
    line = f"pip install --force-reinstall --no-deps {keep}=={installed(keep)}"
    return f"pip uninstall -y {' '.join(both)} && {line}"


def missing(provider: str, installed: Installed = installed) -> tuple[str, ...]:
    """The packages that a provider lacks, of the set that lacks fewest; empty: it is installed."""
    sets = PROVIDERS[provider].packages
    lacks = [tuple(name for name in names if not installed(name)) for names in sets]
    return min(lacks, key=len)


def profiles_runs(installed: Installed = installed) -> bool:
    """Whether a single run can be profiled; older runtimes end the process when asked to."""
    found = next((v for name in RUNTIME if (v := installed(name))), None)
    return found is not None and _version(found) >= _PROFILES_RUNS


def _version(text: str) -> tuple[int, ...]:
    numbers = []
    for part in text.split(".")[:2]:
        digits = "".join(c for c in part if c.isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers)
