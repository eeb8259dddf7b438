"""Which model this machine should run: what each would take of memory, and how fast it would be."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from phid import graphs, memory, soundness
from phid.bandwidth import Speed
from phid.catalog import Build
from phid.store import StoredModel

LEAST_TOKENS_S = 3.0
"""Slower than people read; a model that is slower still is not proposed."""
CONTEXT = 2048
"""The tokens of prompt and answer that memory is reckoned for, where nobody says another number."""

# Measured on twins of Phi-3.5-mini's geometry and on SmolLM2 (see FIGURES.md): the share of plain
# reading's bandwidth that int4 decoding gets, and what a layer costs beside reading its weights.
_SHARE = 0.62
_LAYER_S = 0.11e-3
_LAYER_PACE_S = 26e-6  # `Speed.pace_s` of the machine that was measured
# The rank of a model that is not in the catalog: it was put here on purpose, and goes before the
# demo model.
_RANK = 20
# As Microsoft names the folders of its builds.
_BLOCK = re.compile(r"block-(\d+)")
_VIEWS = 5  # of one picture at detail auto: 4 crops and the whole
# What the system and the service need of the machine's memory.
_SYSTEM_SHARE, _SYSTEM_BYTES = 0.1, 512 << 20


@dataclass(frozen=True, slots=True)
class Machine:
    """What a model is fitted to. `speed` is None where it has not been measured.

    `memory_bytes` is all that the machine has; `available_bytes` what is free of it just now.
    """

    memory_bytes: int
    available_bytes: int
    providers: tuple[str, ...] = ("cpu",)
    speed: Speed | None = None

    @property
    def usable_bytes(self) -> int:
        """What a model may take when nothing else of weight runs."""
        return int(self.memory_bytes - max(_SYSTEM_BYTES, _SYSTEM_SHARE * self.memory_bytes))


@dataclass(frozen=True, slots=True)
class Needs:
    """A model as a machine sees it: bytes of files, of weights a token reads, of a token's cache.

    0 where it is not known; `rank` is the order of preference, `block` how many weights share a
    scale.
    """

    name: str
    kind: Literal["text", "vision"]
    files_bytes: int
    read_bytes: int
    kv_bytes_per_token: int
    layers: int
    context: int
    providers: tuple[str, ...] = ("cpu",)
    rank: int = 0
    unsupported: str = ""
    block: int = graphs.BLOCK

    @property
    def loaded_bytes(self) -> int:
        """What it takes once it is loaded, before any job's cache and pictures."""
        return memory.model_bytes(self.files_bytes, self.block, self.kind)

    def memory_bytes(self, tokens: int) -> int:
        """The most it takes, with so many tokens of prompt and answer and one picture."""
        views = _VIEWS if self.kind == "vision" else 0
        cache = min(tokens, self.context or tokens) * self.kv_bytes_per_token
        return self.loaded_bytes + cache + views * memory.VIEW_BYTES

    def tokens_s(self, speed: Speed, context: int = 0) -> float | None:
        """The rate of decoding that is to be expected on a CPU; None where too little is known.

        Every token reads all weights once, and the cache of the tokens before it.
        """
        if not (self.read_bytes and self.layers):
            return None
        read = self.read_bytes + context * self.kv_bytes_per_token
        layers_s = self.layers * _LAYER_S * speed.pace_s / _LAYER_PACE_S
        return 1 / (read / (_SHARE * speed.bytes_s) + layers_s)


@dataclass(frozen=True, slots=True)
class Fitting:
    """What is to be said of one model on one machine; `refusal` is why it should not run there."""

    needs: Needs
    provider: str
    memory_bytes: int
    tokens_s: float | None
    refusal: str = ""


def of_build(build: Build) -> Needs:
    """A build's needs, by what the catalog says of it."""
    # A step looks up rows of the table of words and of the rotary caches; it reads all the rest.
    wide = 4 if "cpu" in build.providers else 2
    table = build.vocabulary * build.width * wide
    both_lengths = 48 * 2 * wide * (build.context + 4096) if build.context > 100_000 else 0
    looked_up = table + both_lengths if build.source != "demo" else 0
    unsupported = build.unsupported
    if build.source == "builder":
        unsupported = unsupported or "nobody offers a build: `phid models show` has the command"
    return Needs(
        name=build.name,
        kind=build.kind,
        files_bytes=build.size_bytes,
        read_bytes=max(0, build.size_bytes - looked_up) if build.size_bytes else 0,
        kv_bytes_per_token=build.kv_bytes_per_token,
        layers=build.layers,
        context=build.context,
        providers=build.providers,
        rank=build.rank,
        unsupported=unsupported,
        block=int(said[1]) if (said := _BLOCK.search(build.folder)) else graphs.BLOCK,
    )


def of_folder(model: StoredModel, build: Build | None = None) -> Needs:
    """A model's needs by its own files; its rank is that of the catalog's build, if there is one.

    Reads the decoder's graph, not its weights: tens of milliseconds, and next to none for a graph
    unchanged since it was last read. Raises soundness.NoModel, graphs.NotOnnx or OSError.
    """
    config = soundness.config(model.path)
    decoder = config.get("decoder") or {}
    sizes = [decoder.get(n) for n in ("num_hidden_layers", "num_key_value_heads", "head_size")]
    layers, heads, size = (n if isinstance(n, int) else 0 for n in sizes)
    width = 4 if build is None or "cpu" in build.providers else 2
    graph = model.path / str(decoder.get("filename", ""))
    read_bytes, block = _read(graph) if graph.is_file() else (0, graphs.BLOCK)
    return Needs(
        name=model.name,
        kind=model.kind,
        files_bytes=model.size_bytes,
        read_bytes=read_bytes,
        kv_bytes_per_token=2 * layers * heads * size * width,
        layers=layers,
        context=model.context,
        providers=build.providers if build else ("cpu",),
        rank=build.rank if build else _RANK,
        unsupported=build.unsupported if build else "",
        block=block,
    )


def _read(graph: Path) -> tuple[int, int]:
    """How many bytes of its weights a step reads, and how many weights share a scale."""
    stat = graph.stat()
    return _read_once(graph, (stat.st_ino, stat.st_size, stat.st_mtime_ns))


@lru_cache(maxsize=64)
def _read_once(graph: Path, _as_it_is: tuple[int, int, int]) -> tuple[int, int]:
    return graphs.read(graph).read_bytes(), graphs.block_size(graph)


def judge(
    needs: Needs, machine: Machine, *, tokens: int = CONTEXT, least_tokens_s: float = LEAST_TOKENS_S
) -> Fitting:
    """Whether the machine should run it, and why not."""
    takes = needs.memory_bytes(tokens)
    provider = next((p for p in machine.providers if p in needs.providers), "")
    rate = needs.tokens_s(machine.speed) if machine.speed and provider == "cpu" else None
    refusal = ""
    if needs.unsupported:
        refusal = needs.unsupported
    elif not provider:
        refusal = f"needs {' or '.join(needs.providers)}; here: {', '.join(machine.providers)}"
    elif provider == "cpu" and takes > machine.usable_bytes:
        # Elsewhere it is the device's memory that counts, which is not known here.
        refusal = f"takes {_gb(takes)} GB of memory; {_gb(machine.usable_bytes)} can be spared"
    elif rate is not None and rate < least_tokens_s:
        refusal = f"slower than {least_tokens_s:g} tokens/s"
    return Fitting(needs, provider or needs.providers[0], takes, rate, refusal)


def best(fittings: Iterable[Fitting]) -> Fitting | None:
    """The one to run: the greatest rank of those that are not refused; of equals the faster.

    One for an accelerator that has been proven counts as faster than one for the CPU.
    """
    return max(
        (f for f in fittings if not f.refusal),
        key=lambda f: (f.needs.rank, f.provider != "cpu", f.tokens_s or 0, f.needs.name),
        default=None,
    )


def preferred(
    present: Sequence[StoredModel], builds: Iterable[Build], machine: Machine
) -> StoredModel | None:
    """The one of the present models that `phid run` should run; None if none can be run."""
    by_name = {build.name: build for build in builds}
    known = []
    for model in present:
        try:
            known.append(of_folder(model, by_name.get(model.name)))
        except (soundness.NoModel, graphs.NotOnnx, OSError):
            continue
    # Rather a slow one than none.
    for least in (LEAST_TOKENS_S, 0.0):
        if chosen := best(judge(needs, machine, least_tokens_s=least) for needs in known):
            break
    return next((m for m in present if chosen and m.name == chosen.needs.name), None)


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}"
