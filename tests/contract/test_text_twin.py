"""The text twin: a small one runs, and the large one has the sizes of the real model."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from contract.subjects import EngineProcess
from phid import catalog, fit, graphs, soundness, store
from phid.jobs import Finish, Finished, Job, Load, Ready, Sampling, Started, Turn
from rig import ROOT
from unwritten import Counted, Unwritten

HOME = ROOT / "scripts" / "vision_twin"


@pytest.fixture(scope="module")
def maker() -> Iterator[ModuleType]:
    names = (
        *("make_text_twin", "make_vision_twin", "graph", "shape"),
        *("vision", "embedding", "text"),
    )
    sys.path.insert(0, str(HOME))
    try:
        yield importlib.import_module(names[0])
    finally:
        sys.path.remove(str(HOME))
        for name in names:
            sys.modules.pop(name, None)


@pytest.mark.parametrize(("block", "half"), [(32, False), (128, False), (32, True)])
def test_a_small_twin_babbles(maker: ModuleType, tmp_path: Path, block: int, half: bool) -> None:
    folder = tmp_path / "twin"
    shape = maker.Shape(layers=2, width=128, heads=4, inner=256, context=8192, short_context=512)
    maker.make(folder, shape, block, 0, lambda _stage, _fraction: None, half=half)
    assert list(soundness.faults(folder)) == []
    engine = EngineProcess()
    try:
        ready = engine.load(Load("genai", "twin", str(folder)))[-1]
        assert isinstance(ready, Ready)
        assert ready.facts.kind == "text"
        assert ready.facts.kv_bytes_per_token == 2 * 2 * 128 * (2 if half else 4)
        end = engine.ask(Job("j", (Turn("user", "Hello"),), Sampling(max_tokens=8)))[-1]
        assert isinstance(end, Finished)
        assert (end.finish, end.usage.output_tokens) == (Finish.LENGTH, 8)
    finally:
        engine.close()
    model = store.read(folder)
    assert model is not None
    words = 32064 * 128 * (2 if half else 4)
    data = (folder / "model.onnx.data").stat().st_size
    assert fit.of_folder(model).read_bytes == pytest.approx(data - words, rel=0.01)
    assert graphs.read(folder / "model.onnx").external() == {"model.onnx.data": data}


def test_the_whole_twin_has_phi_3_minis_bytes(maker: ModuleType) -> None:
    data = Counted()
    graph = importlib.import_module("graph").Graph("text", data, "data")
    never: list[int] = [1]
    maker.text.build(graph, maker.Shape(), Unwritten(32), never, lambda _: None, embeds=True)
    official = catalog.find("phi-3-mini-128k")
    assert data.bytes + graph.proto().ByteSize() == pytest.approx(official.size_bytes, rel=0.005)
    # What the catalog's build is expected to read for a token is what its twin does.
    expected = fit.of_build(official).read_bytes
    assert data.bytes - 32064 * 3072 * 4 == pytest.approx(expected, rel=0.005)


@pytest.fixture(scope="module")
def long_twin(maker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A twin that changes its rotary scale where the real one does."""
    folder: Path = tmp_path_factory.mktemp("twins") / "long"
    shape = maker.Shape(layers=2, width=128, heads=4, inner=256, context=8192, short_context=4096)
    maker.make(folder, shape, 32, 0, lambda _stage, _fraction: None)
    return folder


def words(count: int) -> str:
    """A text of so many tokens, and a few more."""
    return " ".join(random.Random(1).choice(("lamp", "tree", "wall", "dog")) for _ in range(count))


def answer(twin: Path, prompt: str, **load: int) -> Finished:
    engine = EngineProcess()
    try:
        engine.load(Load("genai", "twin", str(twin), **load))  # type: ignore[arg-type]
        # What is drawn follows the model's numbers more closely than what is likeliest.
        sampling = Sampling(max_tokens=60, temperature=1.5, top_k=1000, seed=1)
        job = Job("j", (Turn("user", prompt),), sampling)
        end = engine.ask(job)[-1]
        assert isinstance(end, Finished)
        return end
    finally:
        engine.close()


@pytest.mark.parametrize("count", [2000, 4200])
def test_a_prompt_means_the_same_in_slices_and_whole(long_twin: Path, count: int) -> None:
    whole = answer(long_twin, words(count), prefill_slice=8192)
    sliced = answer(long_twin, words(count), prefill_slice=64)
    assert sliced.usage.prompt_tokens >= count
    assert (sliced.text, sliced.usage.output_tokens) == (whole.text, 60)


def test_an_answer_ends_where_the_cache_would_be_of_two_scales(long_twin: Path) -> None:
    end = answer(long_twin, words(4030))
    assert end.usage.prompt_tokens + end.usage.output_tokens == 4096
    assert (end.finish, end.usage.output_tokens < 60) == (Finish.LENGTH, True)


def test_a_conversation_stays_on_this_side_of_the_line_and_in_the_cache(long_twin: Path) -> None:
    engine = EngineProcess()
    try:
        engine.load(Load("genai", "twin", str(long_twin), prefix_cache=True))
        said: tuple[Turn, ...] = ()
        shown, cached = [], []
        for n in range(24):
            asked = Turn("user", f"{n} {words(400)}")
            job = Job("j", (asked,), Sampling(max_tokens=8), history=said)
            events = engine.ask(job)
            assert isinstance(events[0], Started)
            assert events[0].prompt_tokens <= 4096
            shown.append(events[0].history)
            cached.append(events[0].cached_tokens)
            said = (*said[len(said) - events[0].history :], asked, Turn("assistant", "yes"))
        # It grows to the line, and is half as long again: then it is read anew, and for a longer
        # cache a few times on the way.
        halved = {n for n in range(1, 24) if shown[n] < shown[n - 1]}
        assert 1 <= len(halved) <= 4
        anew = {n for n in range(1, 24) if cached[n] < 64 * (shown[n] * 200 // 64)}
        assert halved <= anew
        assert len(anew) <= len(halved) + 2
        # Who says more than that in one turn has it read.
        end = engine.ask(replace(job, turns=(Turn("user", words(4200)),)))
        assert isinstance(end[0], Started)
        assert (end[0].history, end[0].prompt_tokens > 4096) == (0, True)
    finally:
        engine.close()
