"""The twin's maker, on a twin of two layers: its graphs are the large one's."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import pictures
from contract.subjects import EngineProcess
from phid import frames
from phid.jobs import Finish, Finished, Image, Job, Load, Ready, Sampling, Turn
from rig import ROOT
from unwritten import Counted, Unwritten

HOME = ROOT / "scripts" / "vision_twin"


def silent(_stage: str, _fraction: float | None) -> None:
    pass


@pytest.fixture(scope="module")
def maker() -> Iterator[ModuleType]:
    """The twin's maker, whose modules lie beside it."""
    names = ("make_vision_twin", "graph", "shape", "vision", "embedding", "text")
    sys.path.insert(0, str(HOME))
    try:
        yield importlib.import_module(names[0])
    finally:
        sys.path.remove(str(HOME))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def small(maker: ModuleType) -> Any:
    """Two layers of each kind, 64 wide, and a context whose second rotary cache is soon needed."""
    return maker.Shape(
        clip_layers=2,
        clip_width=64,
        clip_heads=4,
        clip_inner=128,
        layers=2,
        width=64,
        heads=4,
        inner=128,
        context=8192,
        short_context=512,
    )


@pytest.fixture(scope="module")
def twin(maker: ModuleType, small: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("twins") / "small"
    maker.make(folder, small, 0, silent)
    return folder


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_a_twin_takes_as_many_views_as_there_are(
    maker: ModuleType, small: Any, tmp_path: Path, half: bool
) -> None:
    twin = tmp_path / "twin"
    maker.make(twin, small, 0, silent, half=half)
    engine = EngineProcess()
    try:
        ready = engine.load(Load("genai", "twin", str(twin)))[-1]
        assert isinstance(ready, Ready)
        assert ready.facts.kind == "vision"
        assert not ready.facts.crops_padded
        for crops, tokens in ((1, 313), (4, 757), (16, 1921)):
            end = engine.ask(look(crops))[-1]
            assert isinstance(end, Finished)
            assert end.usage.image_tokens == tokens
            # It babbles to the end: 1921 tokens go beyond its short context too.
            assert (end.finish, end.usage.output_tokens) == (Finish.LENGTH, 8)
        end = engine.ask(Job("words", (Turn("user", "Hello"),), Sampling(max_tokens=8)))[-1]
        assert isinstance(end, Finished)
        assert end.usage.output_tokens == 8
    finally:
        engine.close()


def look(crops: int) -> Job:
    image = Image(pictures.jpeg(pictures.busy(640, 480)))
    turns = (Turn("user", "What is this?"),)
    return Job("look", turns, Sampling(max_tokens=8), images=(image,), crops=crops)


def test_a_twins_rows_end_where_the_published_merge_ends_them(twin: Path) -> None:
    picture = frames.transform(pictures.busy(900, 300), 16)
    rows, columns = picture.size[0] // 336, picture.size[1] // 336
    assert rows != columns
    crops_end = 12 * rows * (12 * columns + 1)
    features = look_through(twin, frames.stack([picture], np.float32))
    assert len(features) == picture.tokens
    ends = {row * (12 * columns + 1) + 12 * columns for row in range(12 * rows)}
    ends |= {crops_end + 1 + row * 13 + 12 for row in range(12)}
    line_end = features[12 * columns]
    same = np.flatnonzero(np.abs(features - line_end).max(axis=1) < 1e-4)
    assert set(same.tolist()) == ends
    # The separator is the picture's only token that is the same for every picture.
    other = frames.transform(pictures.busy(900, 300, seed=1), 16)
    others = look_through(twin, frames.stack([other], np.float32))
    same = np.flatnonzero(np.abs(features - others).max(axis=1) < 1e-4)
    assert set(same.tolist()) == ends | {crops_end}


def test_views_beyond_a_pictures_own_change_nothing(twin: Path) -> None:
    large, small = (
        frames.transform(pictures.busy(*size), crops)
        for size, crops in (((640, 480), 4), ((64, 64), 1))
    )
    both = look_through(twin, frames.stack([large, small], np.float32))
    alone = [look_through(twin, frames.stack([one], np.float32)) for one in (large, small)]
    assert np.abs(both - np.concatenate(alone)).max() < 1e-3


def look_through(twin: Path, batch: frames.Batch) -> Any:
    """The image features of a batch, by the vision graph alone."""
    import onnxruntime

    session = onnxruntime.InferenceSession(next(twin.glob("*-vision.onnx")))
    inputs = {"pixel_values": batch.pixels, "image_sizes": batch.sizes}
    return session.run(None, inputs)[0]


def test_the_same_seed_makes_the_same_twin(
    maker: ModuleType, small: Any, twin: Path, tmp_path: Path
) -> None:
    again, other = tmp_path / "again", tmp_path / "other"
    maker.make(again, small, 0, silent)
    maker.make(other, small, 1, silent)
    names = sorted(path.name for path in twin.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert all((twin / name).read_bytes() == (again / name).read_bytes() for name in names)
    data = "phi-3.5-v-instruct-text.onnx.data"
    assert (twin / data).read_bytes() != (other / data).read_bytes()


def test_an_interrupted_maker_leaves_nothing(maker: ModuleType, small: Any, tmp_path: Path) -> None:
    def interrupt(stage: str, _: float | None) -> None:
        if "text" in stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        maker.make(tmp_path / "twin", small, 0, interrupt)
    assert list(tmp_path.iterdir()) == []


# microsoft/Phi-3.5-vision-instruct-onnx, cpu-int4-rtn-block-32-acc-level-4: all of the folder, and
# what of it is no graph.
OFFICIAL_BYTES, TOKENIZER_BYTES = 3_220_612_860, 1_863_000


def test_the_whole_twin_has_the_official_builds_bytes(maker: ModuleType) -> None:
    shape, weights, data = maker.Shape(), Unwritten(32), Counted()
    graphs = []
    for part in ("vision", "embedding", "text"):
        graph = maker.Graph(part, data, "data")
        more = {"vision": (silence,), "embedding": (), "text": ([1], silence)}[part]
        getattr(maker, part).build(graph, shape, weights, *more)
        graphs.append(graph.proto().ByteSize())
    total = data.bytes + sum(graphs)
    assert total == pytest.approx(OFFICIAL_BYTES - TOKENIZER_BYTES, rel=1e-3)


def silence(_fraction: float) -> None:
    pass
