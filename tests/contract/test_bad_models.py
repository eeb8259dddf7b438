"""Models that cannot be, and places that can: what the engine itself says of them, in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from contract.subjects import EngineProcess
from phid.errors import Code
from phid.jobs import Failed, Finish, Finished, Image, Job, Load, LoadFailed, Ready, Sampling, Turn
from rig import ROOT

pytestmark = pytest.mark.model

TINY = ROOT / "tests" / "models" / "tiny-phi3v"
Start = Callable[[], EngineProcess]


def linked(source: Path, folder: Path, *but: str) -> Path:
    """The model at another place; the files named are copied, to be changed."""
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.name in but:
            shutil.copyfile(path, folder / path.name)
        else:
            (folder / path.name).hardlink_to(path)
    return folder


def cut_data(folder: Path) -> None:
    path = folder / "model.onnx.data"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def cut_graph(folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:50_000])


def other_tokenizer(folder: Path) -> None:
    shutil.copyfile(TINY / "tokenizer.json", folder / "tokenizer.json")


def newer(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"schema": 99}')


BROKEN = {
    "cut data": (cut_data, "model.onnx.data", "model.onnx.data is cut off: it has"),
    "cut graph": (cut_graph, "model.onnx", "model.onnx is no whole ONNX file"),
    "tokenizer": (other_tokenizer, "tokenizer.json", "tokenizer.json belongs to another model: it"),
    "newer": (newer, "manifest.json", "is of schema 99, and this phid reads 1: use the newer phid"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_model_that_cannot_be_is_told_in_one_line(
    demo_folder: Path, tmp_path: Path, start: Start, name: str
) -> None:
    breaks, file, says = BROKEN[name]
    folder = linked(demo_folder, tmp_path / "m", file)
    breaks(folder)
    event = start().load(Load("genai", "m", str(folder)))[-1]
    assert isinstance(event, LoadFailed)
    assert says in event.message
    assert "\n" not in event.message
    assert len(event.message) < 400


def test_a_folder_without_a_configuration_is_told(tmp_path: Path, start: Start) -> None:
    event = start().load(Load("genai", "m", str(tmp_path)))[-1]
    assert isinstance(event, LoadFailed)
    assert event.code is Code.NOT_FOUND
    assert "there is no genai_config.json in" in event.message


def test_a_model_loads_from_a_folder_with_spaces_and_umlauts(
    demo_folder: Path, tmp_path: Path, start: Start
) -> None:
    folder = linked(demo_folder, tmp_path / "Modelle für zu Hause" / "größtes Modell, 'neu'")
    engine = start()
    assert isinstance(engine.load(Load("genai", "m", str(folder)))[-1], Ready)
    end = engine.ask(Job("j", (Turn("user", "Say hello."),), Sampling(max_tokens=4)))[-1]
    assert isinstance(end, Finished)


def test_a_vision_model_loads_from_there_too_and_takes_text_alone(
    tmp_path: Path, start: Start
) -> None:
    engine = start()
    folder = linked(TINY, tmp_path / "Käse und Öl")
    assert isinstance(engine.load(Load("genai", "m", str(folder)))[-1], Ready)
    end = engine.ask(Job("j", (Turn("user", "What changed?"),), Sampling(max_tokens=4)))[-1]
    assert isinstance(end, Finished)
    assert end.finish in (Finish.LENGTH, Finish.STOP)


def test_a_text_model_says_that_it_takes_no_images(demo_folder: Path, start: Start) -> None:
    engine = start()
    assert isinstance(engine.load(Load("genai", "m", str(demo_folder)))[-1], Ready)
    scene = (ROOT / "tests" / "models" / "scene.jpg").read_bytes()
    end = engine.ask(Job("j", (Turn("user", "What is it?"),), images=(Image(scene),)))[-1]
    assert isinstance(end, Failed)
    assert (end.code, end.message) == (Code.UNSUPPORTED, "this model takes no images")


def test_a_vision_model_that_is_called_a_text_model_is_told(tmp_path: Path, start: Start) -> None:
    # Its configuration without what looks: nothing makes the embeddings that its decoder takes.
    folder = linked(TINY, tmp_path / "m", "genai_config.json")
    config = json.loads((folder / "genai_config.json").read_text())
    del config["model"]["vision"], config["model"]["embedding"]
    config["model"]["type"] = "phi3"
    (folder / "genai_config.json").write_text(json.dumps(config))
    event = start().load(Load("genai", "m", str(folder)))[-1]
    assert isinstance(event, LoadFailed)
    assert "tells of another kind of model, text or vision, than its graphs" in event.message
    assert "\n" not in event.message
