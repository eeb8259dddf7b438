"""The choice of a provider through crashes, doubts and refusals."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from phid import packages, prover
from phid.jobs import EngineFacts, Load
from phid.placing import Placing
from phid.proofs import Evidence, Prove, Report, Selection, Wanted
from phid.proven import FILE, Proven, Surroundings
from phid.selection import SMALL_ANSWER

DAY_S = 86_400.0
LOAD = Load("genai", "m", "/none")
CUDA = Report("cuda", passed=True, says="well", placement={"cuda": 98.0, "cpu": 2.0})
FACTS = EngineFacts("m", "text", "r", "1", "cuda", 1, 1, 1, 1, placement={"cuda": 97.0, "cpu": 3.0})
INSTALLED = {"onnxruntime-genai", "onnxruntime-ep-openvino", "onnxruntime-genai-cuda"}


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    has = {*INSTALLED, "onnxruntime-gpu"}
    monkeypatch.setattr(packages, "installed", lambda name: "1.0" if name in has else None)


def on_cuda(*providers: str, strict: bool = False) -> Placing:
    providers = providers or ("cuda", "openvino")
    placing = Placing(LOAD, Wanted(providers, strict=strict))
    assert isinstance(placing.settle(), Prove)
    placing.proved(Selection(providers, "cuda", (CUDA,)))
    assert placing.settle() is None
    return placing


def test_the_cpu_alone_needs_no_proof() -> None:
    placing = Placing(LOAD, Wanted())
    assert placing.settle() is None
    assert placing.place(LOAD) == LOAD
    assert placing.demotion is None
    for second in range(10):
        placing.crashed(float(second), "was ended")
    assert placing.settle() is None, "nobody comes after the CPU"
    assert placing.chosen == "cpu"


def test_the_engine_is_told_where_to_run_and_what_was_measured_there() -> None:
    options = (("cuda", (("device_id", "1"),)),)
    placing = Placing(LOAD, Wanted(("cuda",), options))
    placing.proved(Selection(("cuda",), "cuda", (CUDA,)))
    expected = replace(
        LOAD, provider="cuda", options=(("device_id", "1"),), proven=(*CUDA.placement.items(),)
    )
    assert placing.place(LOAD) == expected


SMALL = Evidence("", pieces=SMALL_ANSWER, placement={"openvino": 100.0})
WHOLE = Evidence("", pieces=(b"a", b"b"), placement={"openvino": 99.0, "cpu": 1.0})
ON_CPU = Evidence("", pieces=(b"a", b"b"))


@pytest.mark.parametrize(("text", "holds"), [((b"a", b"b"), True), ((b"x", b"y"), False)])
def test_what_a_choice_rests_on_holds_and_what_did_not_pass_holds_for_a_day(
    tmp_path: Path, text: tuple[bytes, ...], *, holds: bool
) -> None:
    wanted = Wanted(("openvino",), memory=tmp_path / FILE)
    around, proven = Surroundings.of(LOAD), Proven(wanted.memory)
    whole = replace(WHOLE, pieces=text)
    trials = (("openvino", "probe", SMALL), ("openvino", "check", whole), ("cpu", "check", ON_CPU))
    for provider, stage, evidence in trials:
        proven.keep(around.key(provider, stage, wanted), provider, evidence)  # type: ignore[arg-type]
    found = prover.prove(Prove(LOAD, wanted), lambda _: None)
    assert found.chosen == ("openvino" if holds else "cpu")
    later = Proven(wanted.memory, time.time() + 2 * DAY_S)
    assert (later.find(around.key("openvino", "check", wanted)) == whole) == holds


def test_what_was_proven_before_needs_no_prover(tmp_path: Path) -> None:
    wanted = Wanted(("openvino",), memory=tmp_path / FILE)
    around, proven = Surroundings.of(LOAD), Proven(wanted.memory)
    proven.keep(around.key("openvino", "probe", wanted), "openvino", SMALL)
    proven.keep(around.key("openvino", "check", wanted), "openvino", WHOLE)
    assert isinstance(Placing(LOAD, wanted).settle(), Prove), "the CPU's text is still wanted"
    proven.keep(around.key("cpu", "check", wanted), "cpu", ON_CPU)
    placing = Placing(LOAD, wanted)
    assert placing.settle() is None
    assert placing.chosen == "openvino"
    # After a crash it is no longer believed.
    placing.crashed(0.0, "was ended by SIGSEGV")
    prove = placing.settle()
    assert prove is not None
    assert prove.doubted == "openvino"


def test_three_crashes_in_ten_minutes_bar_a_provider() -> None:
    placing = on_cuda()
    for at in (0.0, 200.0, 599.0):
        placing.crashed(at, "was ended by SIGSEGV")
        prove = placing.settle()
        assert isinstance(prove, Prove)
        if at < 599.0:
            assert prove.barred == ()
            placing.proved(Selection(("cuda",), "cuda", (CUDA,)))
    assert prove is not None
    assert dict(prove.barred)["cuda"].startswith("3 engines were lost within 10 minutes")
    placing.proved(Selection(("cuda", "openvino"), "openvino", (Report("openvino", True, "well"),)))
    assert placing.demotion is not None
    assert placing.demotion.startswith("the model runs on OpenVINO now: CUDA: 3 engines were lost")
    # And from there to the CPU, which needs no proof.
    for at in (700.0, 701.0):
        placing.crashed(at, "hung")
        placing.proved(Selection(("cuda",), "openvino", (Report("openvino", True, "well"),)))
    placing.crashed(702.0, "hung")
    assert placing.settle() is None
    assert placing.chosen == "cpu"
    assert "CUDA" in (placing.demotion or "")
    assert "OpenVINO" in (placing.demotion or "")


def test_three_crashes_in_a_longer_time_do_not() -> None:
    placing = on_cuda()
    for at in (0.0, 400.0, 601.0, 1100.0):
        placing.crashed(at, "was ended by SIGSEGV")
        prove = placing.settle()
        assert prove is not None
        assert prove.barred == ()
        placing.proved(Selection(("cuda",), "cuda", (CUDA,)))


def test_strict_has_nobody_after_the_last() -> None:
    placing = on_cuda("cuda", strict=True)
    for at in range(6):
        placing.crashed(float(at), "was ended by SIGSEGV")
        prove = placing.settle()
        assert prove is not None
        assert prove.barred == ()
        placing.proved(Selection(("cuda",), "cuda", (CUDA,)))


def test_an_engine_that_is_found_elsewhere_bars_its_provider() -> None:
    placing = on_cuda()
    assert placing.disagrees(FACTS) is None
    assert placing.disagrees(replace(FACTS, provider="unknown", placement={})) is None
    elsewhere = replace(FACTS, provider="cpu", placement={"cpu": 100.0})
    assert placing.disagrees(elsewhere) == "was not on CUDA: 100 % on cpu"
    prove = placing.settle()
    assert prove is not None
    assert "run elsewhere (100 % on cpu)" in dict(prove.barred)["cuda"]


def test_a_refusal_is_told_and_looked_at_again() -> None:
    placing = Placing(LOAD, Wanted(("cuda",), strict=True))
    placing.proved(Selection(("cuda",), None, (Report("cuda", False, "no NVIDIA driver"),)))
    assert placing.settle() is None
    assert placing.refusal == ("no provider that may run the model passes (CUDA: no NVIDIA driver)")
    placing.ask_again()
    assert placing.refused is not None
    assert isinstance(placing.settle(), Prove)


def test_a_named_provider_that_is_refused_makes_it_degraded() -> None:
    placing = Placing(LOAD, Wanted(("qnn",)))
    assert placing.settle() is None, "it is not installed: there is nothing to try"
    assert placing.demotion is not None
    assert placing.demotion.startswith("the model runs on the CPU: QNN: not installed")
    for providers in (("qnn", "cpu"), ("auto",)):
        easy = Placing(LOAD, Wanted(providers))
        easy.proved(Selection(providers, "cpu", (Report("cpu", True, "well"),)))
        assert easy.demotion is None


def test_a_prover_that_ends_leaves_the_cpu() -> None:
    placing = Placing(LOAD, Wanted(("cuda",)))
    placing.unproved("was ended by SIGKILL")
    assert placing.chosen == "cpu"
    assert "the prover was ended by SIGKILL" in (placing.demotion or "")
    strict = Placing(LOAD, Wanted(("cuda",), strict=True))
    strict.unproved("was ended by SIGKILL")
    assert strict.chosen is None
