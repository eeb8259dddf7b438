"""The numbers that fleets watch: counted here, sampled here."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path

import psutil

from phid import memory, sensors

_MIB = 1024 * 1024
_SAMPLES = 256

KEYS: dict[str, str] = {
    "up": "1: the service runs",
    "connected": "1: the broker has us",
    "model_loaded": "1: the engine takes jobs",
    "models_loaded": "models whose engines take jobs",
    "paused": "1: paused by an operator",
    "queue_depth": "requests that wait",
    "queue_oldest_ms": "age of the one that waits longest",
    "jobs_ok_total": "results with finish stop or length",
    "jobs_looped_total": "those of them that were cut for repeating themselves",
    "jobs_error_total": "other errors after acceptance",
    "jobs_busy_total": "refused for lack of room",
    "jobs_refused_total": "refused for any other reason",
    "jobs_expired_total": "deadlines passed, before or after the start",
    "jobs_cancelled_total": "cancelled, before or after the start",
    "jobs_engine_lost_total": "ended by the loss of an engine",
    "jobs_duplicate_total": "asked again and answered from memory",
    "watch_frames_total": "camera frames that came for a watch",
    "watch_dropped_total": "replaced by a newer one, or without room, before their turn",
    "watch_stale_total": "older than max_age_s when their turn came",
    "watch_skipped_total": "looked like the last one answered",
    "watch_yielded_total": "given up while looked at, for a request or a changed watch",
    "watch_answers_total": "answers of watches",
    "watch_looped_total": "those of them that were cut for repeating themselves",
    "watch_failures_total": "frames that could not be answered",
    "ttft_ms_p50": "arrival to first token, of the last 256 jobs",
    "ttft_ms_p95": "same, 95th percentile",
    "tokens_per_s_p50": "decode rate, of the last 256 jobs",
    "tokens_in_total": "tokens of prompts",
    "tokens_cached_total": "those of them that were in the cache of the prompt before",
    "tokens_out_total": "tokens generated",
    "cpu_pct": "the machine's, since the last message",
    "ram_used_mb": "the machine's, MiB",
    "disk_free_mb": "where models are kept, MiB",
    "temp_c": "hottest CPU or SoC sensor",
    "throttled": "1: the firmware slows the CPU down, or finds the supply too weak (Raspberry Pi)",
    "service_rss_mb": "resident memory of the service, MiB",
    "engine_rss_mb": "resident memory of all engines, MiB",
    "model_memory_mb": "the most the engines have taken, MiB: weights, cache, pictures",
    "reconnects_total": "connections to the broker after the first",
    "engine_restarts_total": "engines that were lost, and another started",
    "engine_recycles_total": "those of them that replaced one which leaked",
    "model_loads_total": "models loaded",
    "deltas_dropped_total": "deltas not sent: their text came with the result",
    "parts_dropped_total": "pictures sent apart that no request asked for in time",
    "messages_dropped_total": "reports not sent, or lost with their connection; never an outcome",
    "messages_refused_total": "publications the broker would not take from us: see its ACL",
    "journal_mb": "size of what is kept on disk of requests and outcomes, MiB",
    "journal_commit_ms_p99": "how long a commit takes, of the last 256: a request waits for one",
    "journal_failures_total": "commits that the disk did not take",
    "sessions": "conversations that are kept",
    "sessions_dropped_total": "conversations forgotten for lack of room before their time",
    "placement_pct_<provider>": "share of the model's kernel time on it, measured; they sum to 100",
    "uptime_s": "since the service started",
}
"""Every key of out/health with its meaning; a sensor that is absent is an absent key."""

PLACEMENT = "placement_pct_"
"""The prefix of keys that end in a provider's name; their number is not known beforehand."""


class Health:
    """Counters and samples of one run of the service."""

    def __init__(self, models_dir: Path) -> None:
        self.counts: Counter[str] = Counter()
        self.gauges: dict[str, float] = {}
        # Called before each sample, by whoever counts elsewhere.
        self.refresh: list[Callable[[], None]] = []
        self._ttft_ms: deque[float] = deque(maxlen=_SAMPLES)
        self._tokens_per_s: deque[float] = deque(maxlen=_SAMPLES)
        self._job_s: deque[float] = deque(maxlen=16)
        self._began = time.monotonic()
        self._models_dir = models_dir
        self._process = psutil.Process()
        psutil.cpu_percent()  # the first call only sets the mark that the next one counts from

    def count(self, name: str, by: int = 1) -> None:
        """Add to the counter `<name>_total`."""
        self.counts[name] += by

    def job_measured(
        self, *, ttft_ms: float, tokens_per_s: float, job_s: float, tokens: int
    ) -> None:
        """Remember what a job that generated something took."""
        self.counts["tokens_out"] += tokens
        self._job_s.append(job_s)
        if tokens:
            self._ttft_ms.append(ttft_ms)
        if tokens_per_s:
            self._tokens_per_s.append(tokens_per_s)

    @property
    def uptime_s(self) -> float:
        """Seconds since the service started."""
        return time.monotonic() - self._began

    def wait_ms(self, jobs_in_front: int) -> int | None:
        """How long so many jobs will take, by the last sixteen; None before the first."""
        if not self._job_s:
            return None
        return round(sum(self._job_s) / len(self._job_s) * jobs_in_front * 1000)

    def sample(self, engine_pids: tuple[int, ...]) -> dict[str, float]:
        """What the machine and both programs are doing now, with all counters and percentiles."""
        for bring_up_to_date in self.refresh:
            bring_up_to_date()
        numbers: dict[str, float] = {"up": 1, "uptime_s": round(self.uptime_s)}
        for key in KEYS:
            if key.endswith("_total"):
                numbers[key] = self.counts[key.removesuffix("_total")]
        for key, samples, share in (
            ("ttft_ms_p50", self._ttft_ms, 0.5),
            ("ttft_ms_p95", self._ttft_ms, 0.95),
            ("tokens_per_s_p50", self._tokens_per_s, 0.5),
        ):
            if samples:
                numbers[key] = round(percentile(list(samples), share), 1)
        numbers |= self.gauges
        numbers["cpu_pct"] = psutil.cpu_percent()
        numbers["ram_used_mb"] = round(psutil.virtual_memory().used / _MIB)
        numbers["service_rss_mb"] = round(self._process.memory_info().rss / _MIB, 1)
        if engine_pids:
            numbers |= _memory_of(engine_pids)
        with contextlib.suppress(OSError):
            numbers["disk_free_mb"] = disk_free_mb(self._models_dir)
        felt = sensors.heat()
        if felt.temp_c is not None:
            numbers["temp_c"] = felt.temp_c
        if felt.throttled is not None:
            numbers["throttled"] = int(felt.throttled)
        return numbers


def percentile(samples: list[float], share: float) -> float:
    """The smallest sample that at least this share of all does not exceed."""
    ranked = sorted(samples)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)]


def disk_free_mb(folder: Path) -> int:
    """What is free where a folder is or would be made, MiB. Raises OSError."""
    home = next(path for path in (folder, *folder.parents) if path.exists())
    return round(psutil.disk_usage(str(home)).free / _MIB)


def _memory_of(engine_pids: tuple[int, ...]) -> dict[str, float]:
    """What the engines have of memory, and the most they have had."""
    taken = {
        "engine_rss_mb": [memory.resident_bytes(pid) for pid in engine_pids],
        "model_memory_mb": [memory.most_bytes(pid) for pid in engine_pids],
    }
    sums = {key: sum(n for n in sizes if n is not None) for key, sizes in taken.items()}
    return {key: round(size / _MIB, 1) for key, size in sums.items() if size}
