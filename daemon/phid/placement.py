"""Where a loaded model's kernels run, by the libraries that are loaded or by a profile."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from phid import packages, traces
from phid.providers import CPU

_OPTION = "enable_profiling"
_OFF = "0"
# Libraries with the kernels of other providers; the CPU's are in the runtime's own library.
_FOREIGN = re.compile(
    r"onnxruntime_providers_(?!shared)|onnxruntime-genai-cuda|openvino|libqnn", re.IGNORECASE
)
_MAPS = Path("/proc/self/maps")


@contextmanager
def measured(generator: Any) -> Iterator[Callable[[], dict[str, float]]]:
    """Measure what this generator runs in the block: percent of kernel time by provider.

    The callable tells it, once something ran; empty where it cannot be known. Runs are profiled
    only where another provider's library is loaded; the traces, a megabyte a token at most, are
    removed at the end. A process that has profiled a run leaks a little memory with each token from
    then on, because the runtime's thread pool does not stop noting how it cuts its loops
    (ThreadPoolProfiler; seen with 1.32).
    """
    if of_cpu := _by_libraries():
        yield lambda: of_cpu
        return
    profile = _begin(generator)
    try:
        yield lambda: profile.placement() if profile is not None else {}
    finally:
        if profile is not None:
            with suppress(RuntimeError):
                generator.set_runtime_option(_OPTION, _OFF)
            profile.close()


class Profile:
    """A temporary folder for traces, as they come to be written; `close` removes it."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="phid-profile-"))
        self.prefix = str(self._folder / "trace")

    def placement(self) -> dict[str, float]:
        """Percent of kernel time by provider, of all that has been written; empty: nothing was."""
        profiles = []
        for path in sorted(self._folder.iterdir()):
            with suppress(OSError, ValueError):
                profiles.append(traces.kernel_times(path.read_text(encoding="utf-8")))
        return traces.shares(traces.total(profiles))

    def close(self) -> None:
        """Remove the traces."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _begin(generator: Any) -> Profile | None:
    if not packages.profiles_runs():
        return None
    try:
        profile = Profile()
    except OSError:  # no folder may be written here
        return None
    try:
        generator.set_runtime_option(_OPTION, profile.prefix)
    except RuntimeError:  # GenAI before 0.15 knows no such option
        profile.close()
        return None
    return profile


def _by_libraries() -> dict[str, float]:
    """100 % on the CPU, if this process has loaded nothing that could run it elsewhere.

    Empty where the loaded libraries cannot be seen, or another provider's are among them.
    """
    if sys.platform == "win32":  # DirectML is inside the runtime's own library there
        return {}
    try:
        maps = _MAPS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    files = {line.rpartition("/")[2] for line in maps.splitlines() if "/" in line}
    return {} if any(_FOREIGN.search(name) for name in files) else {CPU: 100.0}
