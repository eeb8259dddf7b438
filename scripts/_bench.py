"""Measures the daemon against the bare runtime loop, or a vision model: run by scripts/bench."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# As the engine does: telemetry off before the runtime is imported.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime_genai as og
import psutil

from phid import demo, fleet, messages, settings, threads
from phid.client import Client, Unreachable
from phid.messages import Delta, Result
from phid.progress import Progress
from phid.quickstart import Part, free_port
from phid.requests import Request
from phid.sections import Mqtt
from phid.topics import Topics

DEVICE = "bench"
_PAUSE_S = 0.1
PROMPTS = (
    "Why is the sky blue?",
    "Describe how a bicycle stays upright.",
    "Write a short story about a lighthouse keeper and a whale.",
    "List the steps to plant a tree.",
)


@dataclass(frozen=True)
class Sample:
    """One answer: milliseconds to the first token as the asker saw it, and the decode rate."""

    ttft_ms: float
    tokens_per_s: float
    tokens: int


class Raw:
    """The bare loop that everyone writes: one Generator, token after token."""

    def __init__(self, folder: Path) -> None:
        config = og.Config(str(folder))
        session = {"session_options": {"intra_op_num_threads": threads.usable_cpus()}}
        config.overlay(json.dumps({"model": {"decoder": session}}))
        self._model = og.Model(config)
        self._tokenizer = og.Tokenizer(self._model)

    def ask(self, prompt: str, max_tokens: int) -> Sample:
        began = time.perf_counter()
        turns = json.dumps([{"role": "user", "content": prompt}])
        text = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True)
        ids = self._tokenizer.encode(text)
        params = og.GeneratorParams(self._model)
        params.set_search_options(max_length=len(ids) + max_tokens, do_sample=False)
        generator = og.Generator(self._model, params)
        stream = self._tokenizer.create_stream()
        generator.append_tokens(ids)
        count, first = 0, began
        while not generator.is_done():
            generator.generate_next_token()
            stream.decode(generator.get_next_tokens()[0])
            count += 1
            if count == 1:
                first = time.perf_counter()
        return Sample((first - began) * 1e3, (count - 1) / (time.perf_counter() - first), count)


class Daemon:
    """The same over MQTT."""

    def __init__(self, client: Client, topics: Topics) -> None:
        self._client = client
        self._topics = topics

    def ask(self, prompt: str, max_tokens: int) -> Sample:
        request_id = uuid.uuid4().hex[:12]
        request = Request(id=request_id, prompt=prompt, max_tokens=max_tokens, stream="delta")
        rx = self._topics.rx(self._client.name)
        began = time.perf_counter()
        topic = self._topics.text(self._client.name)
        self._client.publish(topic, messages.encode(request), response_topic=rx)
        first = None
        while (inbound := self._client.receive(time.monotonic() + 120)) is not None:
            message = messages.decode_answer(inbound.payload)
            if isinstance(message, Delta) and first is None:
                first = time.perf_counter()
            if isinstance(message, Result):
                assert first is not None
                tokens = message.usage.output_tokens
                return Sample((first - began) * 1e3, message.timing.tokens_per_s, tokens)
        raise SystemExit("the daemon did not answer")


@contextmanager
def running(models_dir: Path) -> Iterator[tuple[Mqtt, Part]]:
    """A broker and a daemon of our own."""
    port = free_port()
    where = ["--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryDirectory(prefix="phid-bench-") as name:
        folder = Path(name)
        config = folder / "phid.toml"
        config.touch()
        broker = Part("broker", ["broker", *where], folder)
        daemon = Part(
            "daemon",
            ["run", "--config", str(config), "--device", DEVICE, *where],
            folder,
            PHID_MODELS_DIR=str(models_dir),
            PHID_ENGINE__MODEL=demo.NAME,
            # The bare loop computes every prompt.
            PHID_ENGINE__PREFIX_CACHE="false",
        )
        try:
            mqtt = Mqtt(host="127.0.0.1", port=port)
            wait_until_online(mqtt, daemon)
            yield mqtt, daemon
        finally:
            daemon.stop()
            broker.stop()


def wait_until_online(mqtt: Mqtt, daemon: Part) -> None:
    for _ in range(60):
        daemon.check()
        try:
            seen = fleet.look(mqtt, wait_s=0.5, connect_s=2).devices()
        except Unreachable:
            continue
        if any(s.status.get("state") == "online" for s in seen):
            return
    raise SystemExit("the daemon was not online within a minute")


def cpu_s(processes: list[psutil.Process]) -> float:
    return sum(p.cpu_times().user + p.cpu_times().system for p in processes)


def measure(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    models_dir = settings.default_models_dir()
    folder = demo.prepare(models_dir, progress)
    rounds, max_tokens, idle_s = (3, 48, 5.0) if options.quick else (12, 128, 20.0)
    raw = Raw(folder)
    with running(models_dir) as (mqtt, part):
        service = psutil.Process(part.pid)
        topics = Topics(mqtt.base, DEVICE)
        name = f"bench-{uuid.uuid4().hex[:6]}"
        with Client(mqtt, (topics.rx(name),), name=name) as client:
            client.connect(10)
            daemon = Daemon(client, topics)
            for asker in (raw, daemon):
                asker.ask(PROMPTS[0], 8)
            samples: list[tuple[Sample, Sample]] = []
            for n in range(rounds):
                for m, prompt in enumerate(PROMPTS):
                    progress("asking both in turns", (n * len(PROMPTS) + m) / rounds / len(PROMPTS))
                    # Which goes first alternates: neither profits from a drifting clock rate.
                    pair = [raw, daemon] if (n + m) % 2 else [daemon, raw]
                    got = {}
                    for asker in pair:
                        # The runtime's threads spin on for a while, in whichever process they are:
                        # who came right after the other was 25 to 30 ms later.
                        time.sleep(_PAUSE_S)
                        got[asker] = asker.ask(prompt, max_tokens)
                    samples.append((got[raw], got[daemon]))
        progress(f"idling for {idle_s:.0f} s", None)
        both = [service, *service.children()]
        before, began = cpu_s(both), time.monotonic()
        time.sleep(idle_s)
        idle_pct = (cpu_s(both) - before) / (time.monotonic() - began) * 100
        rss_mb = service.memory_info().rss / 2**20
        engine_mb = sum(p.memory_info().rss for p in service.children()) / 2**20
    ratios = [d.tokens_per_s / r.tokens_per_s for r, d in samples]
    overheads = [d.ttft_ms - r.ttft_ms for r, d in samples]
    return {
        "stream.tokens_per_s_ratio": round(statistics.median(ratios), 4),
        "stream.ttft_overhead_ms": round(statistics.median(overheads), 2),
        "service.rss_mb": round(rss_mb, 1),
        "service.idle_cpu_pct": round(idle_pct, 3),
        "raw.tokens_per_s": round(statistics.median(r.tokens_per_s for r, _ in samples), 1),
        "daemon.tokens_per_s": round(statistics.median(d.tokens_per_s for _, d in samples), 1),
        "raw.ttft_ms": round(statistics.median(r.ttft_ms for r, _ in samples), 2),
        "daemon.ttft_ms": round(statistics.median(d.ttft_ms for _, d in samples), 2),
        "engine.rss_mb": round(engine_mb, 1),
        "samples": len(samples),
        "threads": threads.usable_cpus(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute instead of several")
    parser.add_argument(
        "--vision", type=Path, metavar="MODEL", help="measure what a picture costs this model"
    )
    parser.add_argument("--provider", default="cpu", help="where --vision's model runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    options = parser.parse_args()
    if options.vision:
        # It brings OpenCV with it.
        import _bench_vision  # noqa: PLC0415

        figures = _bench_vision.measure(
            options.vision, Progress(), quick=options.quick, provider=options.provider
        )
    else:
        figures = measure(options, Progress())
    for key, value in figures.items():
        print(f"{key:28} {value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.SubprocessError as error:
        sys.exit(f"bench: {error}")
