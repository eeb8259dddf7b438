"""phid models, as people and programs read it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import phid
from phid import bandwidth, catalog, lineup, proposal, shelf, store
from phid.bandwidth import Speed
from phid.jobs import Load
from phid.proofs import Evidence
from phid.proven import Proven, Surroundings
from phid.selection import SMALL_ANSWER
from phid.settings import Settings
from rig import ROOT, bound, locked
from weighty import model_folder

TINY = ROOT / "tests" / "models" / "tiny-phi3v"


class Shelf:
    """The commands, on a store of their own."""

    def __init__(self, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.models = models
        self._capsys = capsys
        self.catalog: tuple[dict[str, Any], ...] = ()

    @property
    def settings(self) -> Settings:
        return Settings(
            device="dut",
            models_dir=self.models,
            state_dir=self.models.parent / "state",
            catalog=self.catalog,  # type: ignore[arg-type]
        )

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        parser = argparse.ArgumentParser()
        shelf.add_parser(parser.add_subparsers(required=True), [])
        options = parser.parse_args(["models", *arguments])
        status = options.command(self.settings, options)
        said = self._capsys.readouterr()
        return status, said.out, said.err

    def json(self, *arguments: str) -> Any:
        status, out, err = self(*arguments, "--json")
        assert status == 0, err
        return json.loads(out)


@pytest.fixture
def models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shelf:
    return Shelf(tmp_path / "models", capsys)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return model_folder(tmp_path / "a-model")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that need not be measured."""
    monkeypatch.setattr(bandwidth, "measure", lambda: Speed(50e9, 25e-6, 2))
    monkeypatch.setattr(proposal.memory, "total_bytes", lambda: 8_200_000_000)
    monkeypatch.setattr(proposal.memory, "available_bytes", lambda: 3_000_000_000)


@pytest.mark.parametrize(
    "arguments", [("--json",), ("--json", "list"), ("list", "--json"), ("--json", "list", "--json")]
)
def test_a_program_is_told_in_json_wherever_it_says_so(
    models: Shelf, source: Path, arguments: tuple[str, ...]
) -> None:
    models("import", str(source))
    _, out, _ = models(*arguments)
    assert [row["name"] for row in json.loads(out)] == ["a-model"]


def test_an_empty_store_says_what_to_do(models: Shelf) -> None:
    status, out, _ = models()
    assert status == 0
    assert "`phid models fit` says which to pull" in out
    assert models.json() == []


def test_a_model_comes_is_checked_and_goes(models: Shelf, source: Path) -> None:
    status, out, err = models("import", str(source))
    assert status == 0, err
    assert "its hashes are recorded from now on" in out
    (row,) = models.json("list")
    assert (row["name"], row["type"], row["kind"], row["here"]) == (
        "a-model",
        "llama",
        "text",
        True,
    )
    assert models.json("verify") == [{"name": "a-model", "hashed": 5, "faults": []}]
    shown = models.json("show", "a-model")
    assert shown["made_from"] == {"imported": str(source)}
    assert len(shown["sha256"]) == 5
    assert models.json("rm", "a-model")["freed"] > 28_000
    assert models.json() == []


def test_what_was_changed_is_said_with_what_mends_it(models: Shelf, source: Path) -> None:
    models("import", str(source), "--name", "mine")
    (models.models / "mine" / "model.onnx.data").write_bytes(b"w")
    status, out, _ = models("verify", "mine")
    assert status == 1
    assert "model.onnx.data has 1 bytes and had 28000 -> `phid models rm mine`, then" in out


def test_what_could_be_pulled_is_listed(models: Shelf) -> None:
    _, out, _ = models("list", "--all")
    for text in ("phi-3.5-mini ", "Phi-3.5-vision, vision, cpu, 3.2 GB", "not run by phid yet"):
        assert text in out
    # What `pull` refuses is not listed as if it could be pulled.
    assert "could be pulled" not in out
    for build in catalog.shipped():
        (line,) = (line for line in out.splitlines() if line.startswith(f"  {build.name} "))
        assert ("not to be pulled" in line) == (build.source == "builder")
    rows = models.json("list", "--all")
    vision = next(row for row in rows if row["name"] == "phi-3.5-vision")
    assert (vision["here"], vision["pinned"], vision["license"]) == (False, True, "MIT")


def test_a_build_of_ones_own_is_listed_too(models: Shelf) -> None:
    models.catalog = ({"name": "mine", "repo": "acme/mine", "title": "My own"},)
    assert "My own" in models("list", "--all")[1]


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("phi-3.5-vision", ["(pinned)", "9 known", "MIT", "768 KiB of it for each token"]),
        ("phi-3.5-mini", ["not pinned: the first pull records the commit", "0 known"]),
        (
            "phi-3.5-moe",
            [
                "onnxruntime_genai.models.builder",
                "-o FOLDER && phid models import FOLDER --name phi-3.5-moe",
                "about 23600 MB",
            ],
        ),
        ("phi-4-multimodal-gpu", ["phid cannot run it: it takes pictures in another form"]),
    ],
)
def test_all_that_is_known_is_shown(models: Shelf, name: str, texts: list[str]) -> None:
    _, out, _ = models("show", name)
    for text in texts:
        assert text in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("show", "phi-3.5-mni"), "did you mean phi-3.5-mini?"),
        (("pull", "phi3.5-mini"), "did you mean phi-3.5-mini?"),
        (("pull", "phi-3.5-moe"), "this makes one: python -m onnxruntime_genai.models.builder"),
        (("rm", "nothing"), "there is no model nothing in"),
        (("verify", "nothing"), "there is no model nothing in"),
        (("import", "/nowhere"), "there is no genai_config.json in /nowhere: there is no such"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    models: Shelf, arguments: tuple[str, ...], says: str
) -> None:
    status, out, err = models(*arguments)
    assert status == 1
    assert out == ""
    assert says in err
    assert err.startswith("phid models: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("kept", [0, 1, 40, 90])
def test_a_model_whose_graph_is_cut_off_is_one_line_too(
    kept: int, models: Shelf, source: Path
) -> None:
    models("import", str(source), "--name", "mine")
    os.truncate(models.models / "mine" / "model.onnx", kept)
    status, out, err = models("show", "mine")
    assert (status, out) == (1, "")
    assert "mine is no whole model (it " in err
    assert "`phid models verify mine`" in err
    assert err.count("\n") == 1


# Files that this user may not read.


def run(models_dir: Path, *arguments: str) -> tuple[int, str]:
    """A command of a user whom the rights of files bind: its status, and what it says."""
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PHID_")} | {
        "PYTHONPATH": str(Path(phid.__file__).parents[1]),
        "PHID_CONFIG": os.devnull,
        "PHID_MODELS_DIR": str(models_dir),
    }
    command = [*bound(), sys.executable, "-m", "phid", "models", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("arguments", [(), ("list",), ("verify",), ("show", "mine")], ids=" ".join)
def test_a_store_that_may_not_be_looked_into_is_not_said_to_be_written(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "state" / "models"
    model_folder(folder / "mine")
    with locked(tmp_path / "state"):
        status, said = run(folder, *arguments)
    assert status == 1
    assert said.startswith(f"phid models: cannot read {folder}")
    assert said.endswith(" (Permission denied): give this user the right to, or use sudo\n")


@pytest.mark.parametrize("name", ["genai_config.json", "model.onnx", "model.onnx.data", "."])
def test_an_import_names_the_file_that_cannot_be_read(
    name: str, source: Path, tmp_path: Path
) -> None:
    store_dir = tmp_path / "models"
    with locked(source / name):
        status, said = run(store_dir, "import", str(source))
    assert status == 1
    progress, _, last = said.rstrip().rpartition("\n")
    assert last.startswith(f"phid models: cannot read {source / name}"), said
    assert "Traceback" not in progress
    assert store.models(store_dir) == []


def test_a_wheel_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    wheel = tmp_path / "demo.whl"
    wheel.write_bytes(b"")
    with locked(wheel):
        status, said = run(tmp_path / "models", "prepare", "demo", "--wheel", str(wheel))
    assert status == 1
    assert said.startswith(f"phid models: cannot read {wheel} (Permission denied): give this user")


def test_an_import_names_the_folder_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    store_dir = tmp_path / "models"
    store_dir.mkdir()
    with locked(store_dir):
        status, said = run(store_dir, "import", str(source), "--name", "mine")
    assert status == 1
    lock = store_dir / ".mine.lock"
    assert f"cannot write to {store_dir} ({lock}: Permission denied): give this user" in said


def test_without_the_hubs_client_the_line_that_brings_it_is_told(
    models: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for module in ("hub", "pull"):
        monkeypatch.delitem(sys.modules, f"phid.{module}", raising=False)
        monkeypatch.delattr(phid, module, raising=False)
    _, _, err = models("pull", "phi-3.5-mini")
    assert "pulling needs huggingface_hub: pip install '.[hub]'" in err


@pytest.mark.usefixtures("quick")
def test_fit_says_what_to_run_and_why_the_others_not(models: Shelf) -> None:
    status, out, _ = models("fit")
    assert status == 0
    lines = out.splitlines()
    assert "8.2 GB of memory (7.4 for a model), 50.0 GB/s read by 2 threads, on cpu" in lines[0]
    assert lines[1].startswith("-> phi-4-mini ")
    assert "takes 12.1 GB of memory; 7.4 can be spared" in out
    assert "only 3.0 GB are free just now: end what else takes memory" in out
    assert lines[-1] == "get it: phid models pull phi-4-mini"


@pytest.mark.usefixtures("quick")
def test_fit_is_for_programs_too(models: Shelf) -> None:
    found = models.json("fit", "--kind", "vision", "--context", "1024")
    assert found["chosen"] == "phi-3.5-vision"
    assert found["tokens"] == 1024
    assert found["machine"]["bandwidth_bytes_s"] == 50_000_000_000
    by_name = {model["name"]: model for model in found["models"]}
    assert set(by_name) == {
        *("phi-3-vision", "phi-3.5-vision", "phi-3.5-vision-gpu", "phi-4-multimodal-gpu")
    }
    assert by_name["phi-3.5-vision"]["tokens_s"] > 5
    assert by_name["phi-3.5-vision-gpu"]["refusal"] == "needs cuda or directml; here: cpu"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("placement", "chosen"),
    [({"cuda": 97.5, "cpu": 2.5}, "phi-3.5-vision-gpu"), ({"cpu": 100.0}, "phi-3.5-vision")],
    ids=["it ran on the GPU", "it said so and ran on the CPU"],
)
def test_fit_counts_an_accelerator_that_was_proven_here(
    models: Shelf,
    placement: dict[str, float],
    chosen: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("onnxruntime-gpu", "onnxruntime-genai-cuda"):
        told = tmp_path / "site" / f"{name.replace('-', '_')}-1.dist-info" / "METADATA"
        told.parent.mkdir(parents=True)
        told.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    wanted, load = models.settings.wanted, Load("genai", "", "")
    key = Surroundings.of(load).key("cuda", "probe", wanted)
    Proven(wanted.memory).keep(key, "cuda", Evidence(pieces=SMALL_ANSWER, placement=placement))
    found = models.json("fit", "--kind", "vision")
    assert found["chosen"] == chosen
    assert ("cuda" in found["machine"]["providers"]) == (chosen == "phi-3.5-vision-gpu")


@pytest.mark.usefixtures("quick")
def test_fit_is_none_where_nothing_can_run(models: Shelf) -> None:
    status, out, _ = models("fit", "--least", "100000")
    assert status == 1
    assert "nothing fits" in out


@pytest.mark.usefixtures("quick")
def test_what_fit_prefers_is_run_where_none_is_named(models: Shelf, source: Path) -> None:
    def run_for(kind: proposal.Kind) -> str | None:
        found = proposal.preferred(models.settings, kind)
        return found and found.name

    assert run_for("text") is None
    models("import", str(source), "--name", "one")
    assert run_for("text") == run_for("vision") == "one"
    models("import", str(source), "--name", "phi-3.5-mini")
    assert run_for("text") == run_for("vision") == "phi-3.5-mini"
    # However well it may rank, what looks at pictures is for them.
    models("import", str(TINY), "--name", "phi-4-vision")
    models("rm", "phi-3.5-mini")
    models("import", str(source), "--name", "smollm2-135m-instruct")
    assert (run_for("text"), run_for("vision")) == ("one", "phi-4-vision")
    models("rm", "one")
    assert (run_for("text"), run_for("vision")) == ("smollm2-135m-instruct", "phi-4-vision")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("vision", "text", "runs"),
    [
        ("sees", "phi-3.5-mini-gpu", "sees"),
        ("phi-4-multimodal-gpu", "one", "one"),
        ("not-yet", "one", "one"),
    ],
    ids=["not on a CPU", "neither there nor by phid", "not by phid"],
)
def test_who_can_run_answers_for_whoever_cannot_where_none_is_named(
    models: Shelf, source: Path, vision: str, text: str, runs: str
) -> None:
    models.catalog = ({"name": "not-yet", "repo": "acme/not-yet", "unsupported": "not yet"},)
    models("import", str(TINY), "--name", vision)
    models("import", str(source), "--name", text)
    lines = lineup.read(models.settings)
    assert (lines.text, lines.frame) == (runs, runs)


@pytest.mark.usefixtures("quick")
def test_where_one_is_named_it_answers_frames_too(models: Shelf, source: Path) -> None:
    models("import", str(TINY), "--name", "sees")
    models("import", str(source), "--name", "one")

    def run(**engine: str) -> tuple[str | None, str | None]:
        engine_section = models.settings.engine.model_copy(update=engine)
        lines = lineup.read(models.settings.model_copy(update={"engine": engine_section}))
        return lines.text, lines.frame

    assert run() == ("one", "sees")
    assert run(model="one") == ("one", "one")
    assert run(model="sees") == ("sees", "sees")
    assert run(frame_model="one") == ("one", "one")
    assert run(model="one", frame_model="sees") == ("one", "sees")


def test_the_bandwidth_is_measured_in_another_process() -> None:
    bandwidth.measure.cache_clear()
    speed = bandwidth.measure(1)
    assert speed.threads == 1
    assert 0.1e9 < speed.bytes_s < 1e12
    assert 1e-6 < speed.pace_s < 0.1
    assert bandwidth.measure(1) is speed


def test_a_measurement_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    bandwidth.measure.cache_clear()
    monkeypatch.setattr(bandwidth.sys, "executable", os.devnull)
    with pytest.raises(bandwidth.Unmeasurable, match="the bandwidth could not be measured"):
        bandwidth.measure(1)


def test_a_name_is_not_a_path(models: Shelf, source: Path) -> None:
    status, _, err = models("show", "../a-model")
    assert status == 1
    assert "there is no model ../a-model in the catalog" in err
    assert store.read(source) is not None


def test_a_reader_who_has_had_enough_is_no_fault_of_the_store(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-u", "-m", "phid", "models", "list", "--all"]
    environment = os.environ | {
        "PYTHONPATH": str(Path(phid.__file__).parents[1]),
        "PHID_MODELS_DIR": str(tmp_path),
    }
    done = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, env=environment, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
