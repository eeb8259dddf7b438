"""What the doctor concludes from what it finds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from phid import doctor, probes
from phid.doctor import Asked
from phid.jobs import Load
from phid.messages import CtlReply
from phid.probes import Reached, Verdict
from phid.reports import NO_MODEL
from phid.settings import Settings
from phid.whereabouts import Whereabouts
from rig import ROOT
from weighty import weighty_graph

TINY = ROOT / "tests" / "models" / "tiny-phi3v"


@pytest.mark.parametrize(
    ("year", "verdict"),
    [(1969, "bad"), (1970, "bad"), (2023, "bad"), (2024, "ok"), (2038, "ok"), (2106, "warn")],
)
def test_the_year_must_be_likely(year: int, verdict: str) -> None:
    found = doctor.clock(datetime(year, 6, 1, tzinfo=UTC).timestamp())
    assert found.verdict == verdict
    assert str(year) in found.says


def installed(*packages: str) -> Callable[[str], str | None]:
    return lambda name: "1.0" if name in packages else None


def test_packages_that_overwrite_each_other_are_bad() -> None:
    has = installed("onnxruntime", "onnxruntime-gpu", "onnxruntime-genai")
    found = doctor.versions(has, "genai")
    assert found.verdict == "bad"
    assert "onnxruntime and onnxruntime-gpu are both installed" in found.says
    assert found.mend is not None
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in found.mend


def test_the_runtime_must_be_there_only_if_it_is_used() -> None:
    assert doctor.versions(installed(), "genai").verdict == "bad"
    assert doctor.versions(installed(), "scripted").verdict == "ok"
    cuda = installed("onnxruntime-gpu", "onnxruntime-genai-cuda")
    assert doctor.versions(cuda, "genai").verdict == "ok"


KIB = 1024


@pytest.mark.parametrize(
    ("available_mb", "context", "verdict"),
    [(8000, 4096, "ok"), (8000, 131_072, "warn"), (3200, 4096, "warn"), (2500, 4096, "bad")],
)
def test_weights_and_cache_must_fit(available_mb: int, context: int, verdict: str) -> None:
    # Phi-3.5-mini on a CPU: 2.8 GB of weights, 768 KiB of cache a token.
    found = doctor.fits(available_mb, 2800, 768 * KIB, context)
    assert found.verdict == verdict


def test_the_context_that_fits_is_told() -> None:
    found = doctor.fits(8000, 2800, 768 * KIB, 131_072)
    assert found.mend == "engine.max_context = 6912"
    assert doctor.fits(8000, 2800, 768 * KIB, 6912).verdict == "ok"


def folder_with(path: Path, **files: bytes) -> Path:
    config = {
        "model": {
            "type": "llama",
            "context_length": 4096,
            "decoder": {
                "filename": "model.onnx",
                "num_hidden_layers": 2,
                "num_key_value_heads": 2,
                "head_size": 16,
            },
        }
    }
    path.mkdir()
    (path / "genai_config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_text("{}")
    (path / "model.onnx").write_bytes(weighty_graph({"w": ("model.onnx.data", 0, 7)}))
    (path / "model.onnx.data").write_bytes(b"weights")
    for name, content in files.items():
        (path / name.replace("__", ".")).write_bytes(content)
    return path


def verdict_of(path: Path) -> doctor.Verdict:
    settings = Settings(device="dut", models_dir=path.parent)
    return doctor._model(settings, Load("genai", path.name, str(path)))


def test_a_whole_model_is_ok(tmp_path: Path) -> None:
    assert verdict_of(folder_with(tmp_path / "m")).verdict == "ok"


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("model.onnx", "model.onnx is missing"),
        ("model.onnx.data", "model.onnx.data, which model.onnx needs, is missing"),
        ("tokenizer.json", "tokenizer.json is missing"),
        ("genai_config.json", "there is no genai_config.json"),
    ],
)
def test_a_model_with_a_file_missing_is_bad(tmp_path: Path, missing: str, says: str) -> None:
    folder = folder_with(tmp_path / "m")
    (folder / missing).unlink()
    found = verdict_of(folder)
    assert (found.verdict, says in found.says) == ("bad", True), found


def test_weights_that_are_cut_off_are_bad(tmp_path: Path) -> None:
    found = verdict_of(folder_with(tmp_path / "m", model__onnx__data=b"wei"))
    assert found.verdict == "bad"
    assert "model.onnx.data is cut off: it has 3 bytes, and model.onnx needs 7" in found.says


def test_a_model_of_the_catalog_is_mended_by_pulling_it_again(tmp_path: Path) -> None:
    found = verdict_of(folder_with(tmp_path / "phi-3.5-mini", model__onnx__data=b"wei"))
    assert found.mend == "phid models rm phi-3.5-mini && phid models pull phi-3.5-mini"


def test_a_model_of_lfs_pointers_is_bad(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    found = verdict_of(folder_with(tmp_path / "m", model__onnx=pointer))
    assert found.verdict == "bad"
    assert "LFS" in found.says


def others(models_dir: Path, **engine: object) -> dict[str, tuple[str, str, str | None]]:
    """What is found of the models beside the default."""
    settings = Settings(device="dut", models_dir=models_dir, engine=engine)  # type: ignore[arg-type]
    found = doctor._other_models(settings)
    return {v.name: (v.verdict, v.says, v.mend) for v in found}


def test_the_model_for_frames_must_be_there_whole_and_of_its_kind(tmp_path: Path) -> None:
    folder_with(tmp_path / "words")
    assert others(tmp_path, model="words") == {}
    (found,) = others(tmp_path, model="words", frame_model="words").values()
    assert found == (
        "bad",
        "words is a text model, and does not look at pictures",
        "phid models fit --kind vision",
    )
    (found,) = others(tmp_path, model="words", frame_model="phi-3.5-vision").values()
    assert (found[0], found[2]) == ("bad", "phid models pull phi-3.5-vision")
    assert found[1].startswith("phi-3.5-vision: there is no genai_config.json in")
    shutil.copytree(TINY, tmp_path / "eyes")
    (found,) = others(tmp_path, model="words", frame_model="words").values()
    assert found[2] == 'engine.frame_model = "eyes"'
    (found,) = others(tmp_path, model="words", frame_model="eyes").values()
    assert found[0] == "ok"
    assert "phi3v, vision, " in found[1]
    (tmp_path / "eyes" / "vision.onnx").unlink()
    (found,) = others(tmp_path, model="words", frame_model="eyes").values()
    assert found == (
        "bad",
        "eyes: vision.onnx is missing",
        "phid models rm eyes && phid models import FOLDER --name eyes",
    )


def test_each_other_model_is_looked_at_once(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        folder_with(tmp_path / name)
    (tmp_path / "two" / "tokenizer.json").unlink()
    found = others(
        tmp_path,
        model="one",
        models=("one", "two", "phi-3.5-moe"),
        pinned=("two", "three", str(tmp_path / "away" / "four")),
    )
    assert {name: verdict for name, (verdict, *_) in found.items()} == {
        "model two": "bad",
        "model phi-3.5-moe": "bad",
        "model three": "ok",
        f"model {tmp_path}/away/four": "bad",
    }
    assert found["model phi-3.5-moe"][2] == "phid models import FOLDER --name phi-3.5-moe"
    assert all(mend for verdict, _, mend in found.values() if verdict == "bad")


def test_the_model_that_is_chosen_for_frames_is_looked_at_too(tmp_path: Path) -> None:
    folder_with(tmp_path / "words")
    assert others(tmp_path) == {}
    shutil.copytree(TINY, tmp_path / "eyes")
    assert others(tmp_path)["frame_model"][1].startswith("eyes: phi3v, vision")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b'{"model": 1}', b"{" * 10_000])
def test_no_configuration_can_end_the_examination(tmp_path: Path, content: bytes) -> None:
    folder = folder_with(tmp_path / "m", genai_config__json=content)
    settings = Settings(
        device="dut",
        models_dir=tmp_path,
        engine={"model": str(folder)},  # type: ignore[arg-type]
        mqtt={"host": "127.0.0.1", "port": 1},  # type: ignore[arg-type]
    )
    asked = Asked(lambda: settings, None, wait_s=0.1)
    found = {verdict.name: verdict for verdict in doctor.examine(asked, Whereabouts())}
    assert found["model"].verdict == "bad"
    assert found["engine"].says == "not started: see above"


@pytest.mark.parametrize(
    ("models", "verdict"), [(["demo", "eyes"], "ok"), (["eyes"], "warn"), (None, "warn")]
)
def test_a_default_that_waits_for_its_turn_is_no_reason_to_restart(
    models: list[str] | None, verdict: str
) -> None:
    told = {"model": {"model": "eyes", "provider": "cpu"}} | ({"models": models} if models else {})
    fine = Verdict("x", "ok", "")
    reached = Reached(fine, fine, {"provider": "cpu"}, told, answered=True)
    load = Load("genai", "demo", "/m/demo")
    found = doctor._engine(load, reached, Whereabouts(), whole=True, wait_s=0)
    assert found.verdict == verdict


@pytest.mark.parametrize(
    ("mqtt", "line"),
    [
        ({}, "-h localhost -p 1883 -V 5 -q 1"),
        ({"protocol": "3.1.1"}, "-h localhost -p 1883 -q 1"),
        ({"transport": "unix", "host": "/run/the broker"}, "--unix '/run/the broker' -V 5 -q 1"),
        ({"tls": True}, "-h localhost -p 1883 -V 5 --tls-use-os-certs -q 1"),
        (
            {"tls": True, "ca_file": "/ca", "cert_file": "/c", "alpn": ("mqtt", "x")},
            "-h localhost -p 1883 -V 5 --cafile /ca --cert /c --key /c --tls-alpn mqtt -q 1",
        ),
        ({"ca_file": "/ca"}, "-h localhost -p 1883 -V 5 -q 1"),
        ({"username": "my porch"}, "-h localhost -p 1883 -V 5 -u 'my porch' -q 1"),
        (
            {"username": "porch", "password_file": "/a secret"},
            """-h localhost -p 1883 -V 5 -u porch -P "$(cat '/a secret')" -q 1""",
        ),
        ({"password_file": "/secret"}, "-h localhost -p 1883 -V 5 -q 1"),
    ],
)
def test_the_line_that_commands_the_daemon_is_for_its_broker(
    mqtt: dict[str, object], line: str
) -> None:
    settings = Settings(device="dut", mqtt=mqtt)  # type: ignore[arg-type]
    topic = "phid/v1/dut/in/ctl/resume"
    found = probes._command(settings, "resume", "{}").partition("  # ")
    assert found[0] == f"mosquitto_pub {line} -t {topic} -m '{{}}'"
    assert ("an operator" in found[2]) == ("username" in mqtt or "cert_file" in mqtt)


def test_where_no_tool_speaks_to_the_broker_the_message_itself_is_told() -> None:
    settings = Settings(device="dut", mqtt={"transport": "websockets"})  # type: ignore[arg-type]
    line = probes._command(settings, "resume", "{}")
    assert line == "publish {} to phid/v1/dut/in/ctl/resume"


@pytest.mark.parametrize(
    ("reason", "restarts"),
    [
        ("not_found: there is no model x in /models: see `phid models list`", False),
        (NO_MODEL, False),
        ("the CPU is slowed down", True),
    ],
)
def test_a_model_that_is_brought_needs_no_restart(reason: str, *, restarts: bool) -> None:
    answer = CtlReply(id="1", verb="ping", ok=True, data={"state": "degraded"})
    settings = Settings(device="dut")
    verdict = probes._daemon_verdict(settings, answer, {"reason": reason}, 1.0, "1")
    assert verdict.verdict == "bad"
    assert verdict.mend is not None
    assert ("in/ctl/restart" in verdict.mend) == restarts
    assert ("by itself" in verdict.mend) != restarts
