"""What was proven is found again while it holds, and not longer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phid.jobs import Load
from phid.proofs import Evidence, Wanted
from phid.proven import Proven, Surroundings, fingerprint

PASSED = Evidence("answering", pieces=(b"\xff1", b"."), placement={"qnn": 97.0, "cpu": 3.0})
REFUSED = Evidence("loading", says="no driver")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "genai_config.json").write_text("{}")
    (folder / "model.onnx").write_bytes(b"weights")
    return folder


def test_evidence_is_found_by_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "state" / "providers.json"
    Proven(path).keep("a", "qnn", PASSED)
    Proven(path).keep("b", "cuda", REFUSED)
    assert Proven(path).find("a") == PASSED
    assert Proven(path).find("b") == REFUSED
    assert Proven(path).find("c") is None
    assert [p.name for p in path.parent.iterdir()] == [path.name]


ELSEWHERE = Evidence("answering", pieces=(b"x",), placement={"cpu": 100.0})
UNMEASURED = Evidence("answering", pieces=(b"x",))


@pytest.mark.parametrize("refused", [REFUSED, ELSEWHERE, UNMEASURED])
def test_what_did_not_pass_is_looked_at_again_after_a_day(
    tmp_path: Path, refused: Evidence
) -> None:
    path = tmp_path / "p.json"
    proven = Proven(path, 1000.0)
    proven.keep("a", "cuda", refused)
    proven.keep("b", "qnn", PASSED)
    proven.confirm(["b", "no such key"])
    assert Proven(path, 2000.0).find("a") == refused
    assert Proven(path, 2000.0).find("a", refusals=False) is None
    later = Proven(path, 1000.0 + 86_401)
    assert later.find("a") is None
    assert later.find("b") == later.find("b", refusals=False) == PASSED
    # A clock that has been set back says nothing of how old it is.
    assert Proven(path, 10.0).find("a") is None


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{", '{"schema": 1}', '{"schema": 1, "entries": []}'),
        '{"schema": 9, "entries": {}}',
    ],
)
def test_a_damaged_file_is_an_empty_one(tmp_path: Path, content: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(content)
    assert Proven(path).find("a") is None
    Proven(path).keep("a", "qnn", PASSED)
    assert Proven(path).find("a") == PASSED


@pytest.mark.parametrize("evidence", [None, {}, {"pieces": ["zz"], "placement": {}}, "x"])
def test_a_damaged_entry_is_none(tmp_path: Path, evidence: object) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"schema": 1, "entries": {"a": {"evidence": evidence, "at": 0}}}))
    assert Proven(path).find("a") is None


def test_where_nothing_can_be_written_it_is_known_to_this_process(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    Proven(tmp_path / "file" / "p.json").keep("a", "qnn", PASSED)  # and nothing is raised
    proven = Proven(None)
    proven.keep("a", "qnn", PASSED)
    assert proven.find("a") == PASSED


def test_it_does_not_grow_without_bound(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    proven = Proven(path)
    for number in range(100):
        proven.keep(str(number), "qnn", PASSED)
    assert len(json.loads(path.read_text())["entries"]) == 64
    assert Proven(path).find("99") == PASSED
    assert Proven(path).find("0") is None


def test_what_evidence_hangs_on(model: Path) -> None:
    load = Load("genai", "m", str(model))
    wanted = Wanted(("cuda",))

    def keys(
        load: Load = load,
        wanted: Wanted = wanted,
        version: str = "1",
        driver: str = "d",
        provider: str = "cuda",
    ) -> tuple[str, str]:
        around = Surroundings(load, {"onnxruntime": version}, driver)
        return around.key(provider, "probe", wanted), around.key(provider, "check", wanted)

    same = keys()
    assert keys() == same
    options = Wanted(("cuda",), (("cuda", (("device_id", "1"),)),))
    for other in (keys(version="2"), keys(driver="e"), keys(provider="qnn"), keys(wanted=options)):
        assert not set(other) & set(same)
    # Another model needs another check, and no other probe.
    (model / "model.onnx").write_bytes(b"other weights")
    assert keys()[0] == same[0]
    assert keys()[1] != same[1]


def test_a_model_that_is_not_there_has_no_fingerprint(model: Path) -> None:
    assert fingerprint(model)
    assert fingerprint(model / "none") == ""
