"""Measures what a picture costs at each budget of crops: run by scripts/bench --vision MODEL.

Every variant has engines of its own, one at a time and in turns: memory that one has taken is not
there for the next, and neither profits from a drifting clock rate. The stock processor runs in the
same engine with the same threads and prefill slices; only who makes the pixels differs.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from phid import channel, frames, threads
from phid.jobs import (
    EngineFacts,
    Event,
    Failed,
    Finished,
    Image,
    Job,
    Load,
    LoadFailed,
    Ready,
    Sampling,
    Started,
    Tokens,
    Turn,
)
from phid.progress import Progress

PROMPT = "Describe the picture."
MAX_TOKENS = 16
PATIENCE_S = 1800  # the stock pipeline takes minutes on a small board, in one call
LOW, AUTO = "1", "4"


@dataclass(frozen=True)
class Variant:
    """Who makes the pixels, and of how many crops at the most."""

    name: str
    processor: Literal["phid", "stock"]
    crops: int


VARIANTS = (
    Variant(LOW, "phid", 1),
    Variant(AUTO, "phid", 4),
    Variant("16", "phid", 16),
    Variant("stock", "stock", 16),
)


@dataclass(frozen=True)
class Sample:
    """One engine's life: times in milliseconds, resident memory in MiB.

    `ttft_ms` is the median of its jobs, from the hand-over to the first token as the asker sees it.
    """

    ttft_ms: float
    image_tokens: int
    loaded_rss_mb: float
    loaded_peak_rss_mb: float
    peak_rss_mb: float


class Engine:
    """phid's own engine program with the model loaded, in a process of its own."""

    def __init__(self, folder: Path, processor: Literal["phid", "stock"], provider: str) -> None:
        self._child, self._connection = channel.spawn(channel.ENGINE)
        self._said = b""
        threading.Thread(target=self._listen, daemon=True).start()
        self._connection.send(
            Load("genai", folder.name, str(folder), processor=processor, provider=provider)
        )
        self.facts = self._loaded()

    def _listen(self) -> None:
        # A full pipe would stop the engine.
        assert self._child.stderr is not None
        for line in self._child.stderr:
            self._said = (self._said + line)[-2000:]

    def _loaded(self) -> EngineFacts:
        while True:
            match self._receive():
                case Ready(facts):
                    return facts
                case LoadFailed(message=message):
                    raise SystemExit(f"bench: the model cannot be loaded: {message}")

    def _receive(self) -> Event:
        if not self._connection.poll(PATIENCE_S):
            raise SystemExit(f"bench: the engine said nothing for {PATIENCE_S} s")
        try:
            event: Event = self._connection.recv()
        except (EOFError, ConnectionResetError):
            said = self._said.decode(errors="replace")
            raise SystemExit(f"bench: the engine ended by itself\n{said}") from None
        return event

    def ask(self, job: Job) -> tuple[float, int]:
        """Milliseconds to the first token, and the tokens of its images; waits for the answer."""
        began = time.perf_counter()
        self._connection.send(job)
        ttft_ms, image_tokens = 0.0, 0
        while True:
            match self._receive():
                case Started(image_tokens=tokens):
                    image_tokens = tokens
                case Tokens() if not ttft_ms:
                    ttft_ms = (time.perf_counter() - began) * 1e3
                case Finished():
                    return ttft_ms, image_tokens
                case Failed(message=message):
                    raise SystemExit(f"bench: the job failed: {message}")

    def memory_mb(self, field: Literal["VmRSS", "VmHWM"]) -> float:
        """Resident memory now, or the most there has been since the start (proc(5))."""
        status = Path(f"/proc/{self._child.pid}/status").read_text(encoding="ascii")
        return int(status.partition(f"{field}:")[2].split()[0]) / 1024

    def close(self) -> None:
        self._connection.close()
        self._child.kill()
        self._child.wait()


@contextmanager
def loaded(folder: Path, processor: Literal["phid", "stock"], provider: str) -> Iterator[Engine]:
    engine = Engine(folder, processor, provider)
    try:
        yield engine
    finally:
        engine.close()


def frame(width: int, height: int) -> bytes:
    """A JPEG such as a camera sends: slopes, edges and noise, the same each time."""
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (height // 80, width // 80, 3), np.uint8)
    picture = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(40):
        start, end = ((int(random.integers(width)), int(random.integers(height))) for _ in range(2))
        colour = [int(level) for level in random.integers(0, 256, 3)]
        cv2.line(picture, start, end, colour, 2)
        cv2.circle(picture, start, height // 20, colour, -1)
    noise = random.integers(-8, 9, picture.shape)
    noisy = np.clip(picture.astype(np.int16) + noise, 0, 255).astype(np.uint8)
    done, data = cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, 90])
    assert done
    return bytes(data)


def preprocess_ms(width: int, height: int, crops: int, repetitions: int) -> float:
    """Median milliseconds from a JPEG of this size to the pixel values of at most so many crops."""
    data = frame(width, height)
    took = []
    for _ in range(repetitions):
        began = time.perf_counter()
        frames.stack([frames.look(data, crops)], np.float32)
        took.append((time.perf_counter() - began) * 1e3)
    return statistics.median(took)


def sample(
    folder: Path, variant: Variant, data: bytes, asks: int, provider: str
) -> tuple[Sample, EngineFacts]:
    """One engine's life, from its start to its end."""
    with loaded(folder, variant.processor, provider) as engine:
        if engine.facts.kind != "vision":
            raise SystemExit(f"bench: {folder} holds a text model")
        at_load = engine.memory_mb("VmRSS"), engine.memory_mb("VmHWM")
        answers = []
        for number in range(asks):
            turns = (Turn("user", PROMPT),)
            sampling = Sampling(max_tokens=MAX_TOKENS)
            images = (Image(data),)
            job = Job(str(number), turns, sampling, images=images, crops=variant.crops)
            answers.append(engine.ask(job))
        ttft_ms = statistics.median(ttft_ms for ttft_ms, _ in answers)
        peak = engine.memory_mb("VmHWM")
        return Sample(ttft_ms, answers[0][1], *at_load, peak), engine.facts


def measure(
    folder: Path, progress: Progress, *, quick: bool, provider: str = "cpu"
) -> dict[str, Any]:
    """The figures, by their names."""
    if not folder.is_dir():
        raise SystemExit(f"bench: there is no folder {folder}")
    # A quick look keeps its engines for some jobs each; the long one pays for new ones.
    rounds, asks = (1, 3) if quick else (3, 1)
    progress("preparing a 1080p frame, and a large one", None)
    figures: dict[str, Any] = {
        "vision.preprocess_ms": round(preprocess_ms(1920, 1080, 4, 31), 2),
        "vision.preprocess_large_ms": round(preprocess_ms(5000, 5000, 1, 5), 2),
    }
    data = frame(640, 480)
    samples: dict[str, list[Sample]] = {variant.name: [] for variant in VARIANTS}
    for number in range(rounds):
        order = VARIANTS if number % 2 else VARIANTS[::-1]
        for variant in order:
            what = f"round {number + 1} of {rounds}: a frame at {_words(variant)}"
            progress(what, None)
            got, facts = sample(folder, variant, data, asks, provider)
            samples[variant.name].append(got)
    for name, lives in samples.items():
        figures[f"vision.{name}.ttft_ms"] = round(statistics.median(s.ttft_ms for s in lives), 1)
        figures[f"vision.{name}.image_tokens"] = lives[0].image_tokens
        figures[f"vision.{name}.peak_rss_mb"] = round(max(s.peak_rss_mb for s in lives), 1)
    for word, name in (("low", LOW), ("auto", AUTO)):
        pairs = zip(samples["stock"], samples[name], strict=True)
        speedup = statistics.median(stock.ttft_ms / own.ttft_ms for stock, own in pairs)
        figures[f"vision.{word}_speedup"] = round(speedup, 2)
    own = [life for name in (LOW, AUTO, "16") for life in samples[name]]
    return figures | {
        "vision.loaded.rss_mb": round(statistics.median(s.loaded_rss_mb for s in own), 1),
        "vision.loaded.peak_rss_mb": round(max(s.loaded_peak_rss_mb for s in own), 1),
        "vision.files_mb": round(_size_mb(folder), 1),
        "vision.kv_bytes_per_token": facts.kv_bytes_per_token,
        "vision.crops_padded": int(facts.crops_padded),
        "rounds": rounds,
        "threads": threads.usable_cpus(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def _words(variant: Variant) -> str:
    return f"{variant.crops} crops" if variant.processor == "phid" else "the stock processor"


def _size_mb(folder: Path) -> float:
    graphs = [path for path in folder.iterdir() if ".onnx" in path.name]
    return sum(path.stat().st_size for path in graphs) / 2**20
