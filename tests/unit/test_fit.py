"""Which model is proposed, and what is expected of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from phid import catalog, fit, graphs, store
from phid.bandwidth import Speed
from phid.fit import Machine, Needs
from rig import ROOT
from weighty import model_folder

GB = 1_000_000_000
PI = Machine(8_200_000_000, 7 * GB, speed=Speed(17e9, 40e-6, 4))
SERVER = Machine(64 * GB, 60 * GB, speed=Speed(200e9, 20e-6, 16))
BUILDS = catalog.shipped()


def chosen(machine: Machine, kind: str | None = None, **how: float) -> str | None:
    builds = [build for build in BUILDS if kind in (None, build.kind)]
    best = fit.best(fit.judge(fit.of_build(build), machine, **how) for build in builds)  # type: ignore[arg-type]
    return best.needs.name if best else None


def judged(name: str, machine: Machine) -> fit.Fitting:
    return fit.judge(fit.of_build(catalog.find(name)), machine)


def test_small_machines_get_small_models() -> None:
    assert chosen(SERVER) == "phi-3-medium-128k"
    assert chosen(PI) == "phi-4-mini"
    assert chosen(replace(PI, memory_bytes=6 * GB + GB // 2)) == "phi-3.5-mini"
    assert chosen(replace(PI, memory_bytes=2 * GB)) == "smollm2-135m-instruct"
    assert chosen(replace(PI, memory_bytes=GB // 2)) is None


def test_a_vision_model_is_chosen_where_one_is_wanted() -> None:
    assert chosen(PI, "vision") == "phi-3.5-vision"


def test_a_slow_machine_gets_a_model_that_keeps_up() -> None:
    slow = replace(PI, speed=Speed(5e9, 80e-6, 4))
    assert chosen(slow) == "smollm2-135m-instruct"
    assert chosen(slow, least_tokens_s=0.5) == "phi-4-mini"
    assert judged("phi-3.5-mini", slow).refusal == "slower than 3 tokens/s"


def test_without_a_measurement_only_memory_counts() -> None:
    assert chosen(replace(PI, speed=None)) == "phi-4-mini"


def test_what_cannot_run_says_why() -> None:
    assert judged("phi-3-small-8k-cuda", PI).refusal == "needs cuda; here: cpu"
    assert "takes 12.1 GB of memory; 7.4 can be spared" in judged("phi-3-medium-4k", PI).refusal
    assert "nobody offers a build" in judged("phi-3.5-moe", SERVER).refusal
    assert "pictures in another form" in judged("phi-4-multimodal-gpu", SERVER).refusal


def test_providers_are_taken_in_their_order() -> None:
    machine = replace(PI, providers=("cuda", "cpu"))
    assert judged("phi-3.5-mini-gpu", machine).provider == "cuda"
    assert judged("phi-3.5-mini", machine).provider == "cpu"
    assert not judged("phi-3.5-mini-gpu", machine).refusal


def test_memory_is_as_it_was_measured_on_twins() -> None:
    vision = fit.of_build(catalog.find("phi-3.5-vision"))
    # 1 GiB of cache is 1365 tokens; peak 4.68 GiB with 4 crops and 757 image tokens of ~800.
    assert vision.memory_bytes(800) == pytest.approx(4.68 * 2**30, rel=0.03)


# Measured with scripts/prove-fit on 2 threads, 53.4 GB/s, a pace of 24.7 us: SmolLM2, and twins of
# Phi-3.5-mini's geometry in blocks of 128 and 32, and of six of its layers.
MEASURED = [
    (120_802_711, 30, 138.4),
    (1_978_312_786, 32, 17.4),
    (2_327_285_842, 32, 12.6),
    (413_460_562, 6, 76.1),
]


@pytest.mark.parametrize(("read", "layers", "tokens_s"), MEASURED)
def test_the_rate_is_near_the_measured_one(read: int, layers: int, tokens_s: float) -> None:
    needs = Needs("m", "text", read, read, 0, layers, 4096)
    assert needs.tokens_s(Speed(53.4e9, 24.7e-6, 2)) == pytest.approx(tokens_s, rel=0.15)


def test_a_long_context_is_slower() -> None:
    needs = fit.of_build(catalog.find("phi-3.5-mini"))
    assert PI.speed is not None
    short, long = needs.tokens_s(PI.speed), needs.tokens_s(PI.speed, 4096)
    assert short is not None
    assert long is not None
    assert short > 1.5 * long


def test_a_folder_is_judged_by_its_own_files() -> None:
    model = store.read(ROOT / "tests" / "models" / "tiny-phi3v")
    assert model is not None
    needs = fit.of_folder(model)
    assert needs.kind == "vision"
    assert needs.layers > 0
    # The decoder's weights alone: the embedding is a graph of its own, and vision runs once.
    assert 1_500_000 < needs.read_bytes < 2_000_000


def test_a_graph_is_read_again_only_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = store.read(model_folder(tmp_path / "m"))
    other = model_folder(tmp_path / "other", data=b"w" * 1000) / "model.onnx"
    assert model is not None
    reads: list[Path] = []
    really = graphs.read
    monkeypatch.setattr(graphs, "read", lambda path: reads.append(path) or really(path))
    assert [fit.of_folder(model).read_bytes for _ in range(3)] == [28_000] * 3
    assert len(reads) == 1
    other.replace(model.path / "model.onnx")
    assert [fit.of_folder(model).read_bytes for _ in range(3)] == [1_000] * 3
    assert len(reads) == 2
    # One that is cut off is no graph, however often it is asked for.
    (model.path / "model.onnx").write_bytes(b"\x3a\x7f")
    for _ in range(2):
        with pytest.raises(graphs.NotOnnx):
            fit.of_folder(model)


def test_of_several_models_the_best_that_fits_is_run(tmp_path: Path) -> None:
    for name in ("phi-3.5-mini", "smollm2-135m-instruct", "unheard-of"):
        model_folder(tmp_path / name)
    present = store.models(tmp_path)
    assert fit.preferred(present, BUILDS, PI) == present[0]
    assert fit.preferred(present[1:], BUILDS, PI) == present[2]
    # Rather a slow one than none.
    snail = replace(PI, speed=Speed(1.0, 1.0, 1))
    assert fit.preferred(present, BUILDS, snail) == present[0]
    assert fit.preferred(present, BUILDS, replace(PI, memory_bytes=GB // 2)) is None


def test_a_broken_one_is_not_run_while_another_is_there(tmp_path: Path) -> None:
    (model_folder(tmp_path / "phi-3.5-mini") / "model.onnx").write_bytes(b"")
    model_folder(tmp_path / "smollm2-135m-instruct")
    found = fit.preferred(store.models(tmp_path), BUILDS, PI)
    assert found is not None
    assert found.name == "smollm2-135m-instruct"
