"""A model with its worker, whose files come and go."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from phid import fit, graphs, lineup, manifest, store
from phid.errors import Code
from phid.lineup import Lineup
from phid.manifest import Kept, Manifest
from phid.member import Member
from phid.proofs import Report, Selection
from phid.settings import Settings
from phid.worker import Worker
from rig import ROOT
from weighty import model_folder

TINY = ROOT / "tests" / "models" / "tiny-phi3v"
# So often nothing may have changed.
LOOKS = 5


def lines_of(models_dir: Path, **engine: object) -> Lineup:
    return lineup.read(Settings(device="dut", models_dir=models_dir, engine=engine))  # type: ignore[arg-type]


def member_of(lines: Lineup, name: str) -> Member:
    model = next(model for model in lines.models if model.name == name)
    return Member(model, Worker(model.load, lambda _: None, restart_max_s=1))


def bring(models_dir: Path, name: str) -> None:
    """As `phid models import` does it: there at once, with a manifest."""
    store.copy_in(TINY, models_dir, name, lambda _stage, _fraction: None)


def looks(member: Member) -> Callable[[int], list[bool]]:
    """So many looks at it, two seconds apart: whether it was there then."""
    times = count(0.0, 2.0)

    def look(number: int) -> list[bool]:
        found = []
        for _ in range(number):
            member.look(next(times))
            found.append(member.absence is None)
        return found

    return look


def test_a_model_that_comes_later_is_reckoned_with_then(tmp_path: Path) -> None:
    member = member_of(lines_of(tmp_path, model="eyes"), "eyes")
    assert member.look(0.0)
    assert not member.look(0.0), "it is told once"
    assert member.refusal is not None
    assert (member.refusal.code, member.refusal.retry_after_ms) == (Code.NOT_FOUND, None)
    assert (member.kind, member.model.needed_bytes) == (None, 0)
    bring(tmp_path, "eyes")
    assert member.look(0.0)
    assert (member.refusal, member.kind) == (None, "vision")
    assert member.model.needed_bytes > 100 << 20


def test_one_without_a_manifest_is_there_when_nothing_of_it_has_changed_for_some_looks(
    tmp_path: Path,
) -> None:
    member = member_of(lines_of(tmp_path, model="eyes"), "eyes")
    look = looks(member)
    assert look(1) == [False]
    shutil.copytree(TINY, tmp_path / "eyes")
    graph = (tmp_path / "eyes" / "text.onnx").read_bytes()
    os.truncate(tmp_path / "eyes" / "text.onnx", 1000)
    assert look(LOOKS) == [False] * LOOKS
    assert member.failure is not None
    assert member.failure.message == f"eyes is still being copied to {tmp_path}"
    (tmp_path / "eyes" / "text.onnx").write_bytes(graph)
    assert look(LOOKS + 1) == [False] * LOOKS + [True]
    assert member.model == lines_of(tmp_path, model="eyes").models[0], "the whole is reckoned with"


def test_who_asks_often_does_not_look_often(tmp_path: Path) -> None:
    member = member_of(lines_of(tmp_path, model="eyes"), "eyes")
    member.look(0.0)
    shutil.copytree(TINY, tmp_path / "eyes")
    for _ in range(100):
        member.look(1.0)
    assert member.absence is not None


def test_one_with_a_manifest_is_there_as_soon_as_it_has_all_that_this_tells(
    tmp_path: Path,
) -> None:
    bring(tmp_path, "eyes")
    whole = (tmp_path / "eyes").rename(tmp_path / ".eyes")
    member = member_of(lines_of(tmp_path, model="eyes"), "eyes")
    look = looks(member)
    assert look(1) == [False]
    (tmp_path / "eyes").mkdir()
    files = sorted(whole.iterdir(), key=lambda path: path.name != manifest.NAME)
    for file in files:
        assert look(1) == [False]
        shutil.copyfile(file, tmp_path / "eyes" / file.name)
    assert look(1) == [True]


@pytest.mark.parametrize("files", [{}, {"text.onnx": Kept(1, "")}, None], ids=["no", "other", "?"])
def test_a_manifest_that_does_not_fit_keeps_nobody_out_for_ever(
    files: dict[str, Kept] | None, tmp_path: Path
) -> None:
    member = member_of(lines_of(tmp_path, model="eyes"), "eyes")
    look = looks(member)
    assert look(1) == [False]
    shutil.copytree(TINY, tmp_path / "eyes")
    text = "{" if files is None else Manifest(files).text()
    (tmp_path / "eyes" / manifest.NAME).write_text(text)
    assert look(LOOKS + 1) == [False] * LOOKS + [True]


def test_one_that_fails_because_it_was_not_all_there_is_taken_anew_when_it_is(
    tmp_path: Path,
) -> None:
    shutil.copytree(TINY, tmp_path / "eyes")
    graph = (tmp_path / "eyes" / "text.onnx").read_bytes()
    os.truncate(tmp_path / "eyes" / "text.onnx", 1000)
    member = member_of(lines_of(tmp_path, model="eyes"), "eyes")
    reckoned = member.model.needed_bytes
    chosen = Selection(("cuda",), "cpu", (Report("cuda", passed=False, says="a part of a model"),))
    member.worker.placing.proved(chosen)
    assert not member.look(0.0, failed=True), "nothing has changed: this is how it is"
    assert member.worker.placing.chosen == "cpu"
    (tmp_path / "eyes" / "text.onnx").write_bytes(graph)
    assert not member.look(0.0), "nobody says that it fails"
    assert member.look(0.0, failed=True)
    assert looks(member)(LOOKS + 2)[-1]
    assert member.model.needed_bytes > reckoned
    assert member.worker.placing.chosen is None, "what was found of a part says nothing"


def test_one_that_was_completed_while_it_failed_is_reckoned_with_at_once(tmp_path: Path) -> None:
    bring(tmp_path, "eyes")
    whole = (tmp_path / "eyes" / "text.onnx").read_bytes()
    os.truncate(tmp_path / "eyes" / "text.onnx", 1000)
    member = member_of(lines_of(tmp_path, model="eyes"), "eyes")
    reckoned = member.model.needed_bytes
    member.worker.placing.proved(Selection(("cuda",), "cpu", ()))
    (tmp_path / "eyes" / "text.onnx").write_bytes(whole)
    assert not member.look(0.0, failed=True), "it is there, and was"
    assert member.model.needed_bytes > reckoned
    assert member.worker.placing.chosen is None


def test_a_model_that_was_completed_while_it_was_loaded_is_reckoned_anew(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "eyes")
    member = member_of(lines_of(tmp_path, model="eyes"), "eyes")
    assert not member.reckon()
    (tmp_path / "eyes" / "more").write_bytes(b"x" * 1000)
    before = member.model.needed_bytes
    assert member.reckon()
    assert member.model.needed_bytes > before


# What is read, and when.


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models whose graphs are read from now on."""
    fit._read_once.cache_clear()
    names: list[str] = []
    really = graphs.read

    def noted(path: Path) -> graphs.Graph:
        names.append(path.parent.name)
        return really(path)

    monkeypatch.setattr(graphs, "read", noted)
    return names


def test_of_several_models_only_the_one_that_comes_is_read(tmp_path: Path, read: list[str]) -> None:
    for name in ("a", "b"):
        bring(tmp_path, name)
    member = member_of(lines_of(tmp_path, model="a", models=["b", "c"], pinned=["b"]), "c")
    member.look(0.0)
    bring(tmp_path, "c")
    fit._read_once.cache_clear()
    read.clear()
    assert member.look(2.0)
    assert read == ["c"]


def test_where_there_was_none_one_graph_is_read_at_a_look_and_each_once(
    tmp_path: Path, read: list[str]
) -> None:
    lines = lines_of(tmp_path)
    assert lines.again(0.0) == lineup.NOTHING
    for name in ("a", "b", "c"):
        model_folder(tmp_path / "source" / name)
        store.copy_in(tmp_path / "source" / name, tmp_path, name, lambda _stage, _fraction: None)
    shutil.copytree(TINY, tmp_path / "d")  # and this one is still being copied
    shutil.rmtree(tmp_path / "source")
    read.clear()
    for number in (1, 2):
        assert lines.again(2.0 * number) == lineup.NOTHING
        assert len(read) == number
    found = lines.again(6.0)
    assert sorted(read) == ["a", "b", "c"]
    assert (found.text, found.frame, len(found.models)) == ("c", "c", 1)
    for number in range(4, 4 + LOOKS):
        found = lines.again(2.0 * number)
    assert found.frame == "d", "with all that is there"


def test_a_folder_that_may_not_be_looked_at_is_left_to_the_engine(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    settings = Settings(device="dut", models_dir=tmp_path)
    model = lineup.model_of(settings, "a file")
    assert model is not None
    assert lineup.absence(model.load) is not None
    model = lineup.model_of(settings, "x" * 300)
    assert model is not None
    assert lineup.absence(model.load) is None  # the name is too long for any file
