"""Which provider is chosen, over what real trials have left behind."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from phid import packages, proposal, prover
from phid.jobs import Load
from phid.packages import Installed
from phid.proofs import Evidence, Selection, Stage, Wanted
from phid.proven import Proven, Surroundings
from phid.providers import PROVIDERS, candidates, canonical
from phid.selection import SMALL_ANSWER, choose, is_sane, likeness, usable
from phid.settings import Settings

ANSWER = tuple(piece.encode() for piece in ("1", ".", " ", "1", "\n", "2", ".", " "))
ALL_PACKAGES = {name for p in PROVIDERS.values() for names in p.packages for name in names}
CPU_ONLY = {"onnxruntime", "onnxruntime-genai"}


def ran(
    name: str, pct: float, *, speed: float | None = 40.0, pieces: tuple[bytes, ...] = ANSWER
) -> Evidence:
    placement = {name: pct, "cpu": 100 - pct} if pct < 100 else {name: pct}
    return Evidence("answering", pieces=pieces, placement=placement, tokens_per_s=speed)


def small(name: str, pct: float = 90.0) -> Evidence:
    return ran(name, pct, pieces=SMALL_ANSWER)


# Recorded, in the order of the table in README: the words are those of the real packages.
NO_DRIVER = Evidence(
    "looking for the device",
    says="no NVIDIA driver: libcuda.so.1 is not on this machine",
    mend="apt-get install nvidia-driver (a Jetson: flash it with JetPack)",
)
NO_CUBLAS = Evidence(
    "loading the model",
    says="Cuda interface not available: Failed to load library: libcublasLt.so.13: "
    "cannot open shared object file: No such file or directory",
)
NO_KERNEL = Evidence(
    "warming up",
    says="CUDA error in: file.cc: no kernel image is available for execution on the device",
)
NO_BACKEND = Evidence(
    "loading the model",
    says="/onnxruntime_src/onnxruntime/core/session/plugin_ep/ep_plugin_provider_interfaces.cc:393"
    " [ONNXRuntimeError] : 1 : FAIL : Could not determine default backend path for device",
)
QNN_ON_CPU = Evidence(
    "answering",
    pieces=ANSWER,
    placement={"cpu": 100.0},
    tokens_per_s=35.6,
    printed="[E:onnxruntime, qnn_execution_provider.cc:2290 GetCapabilityImpl] QNN SetupBackend "
    "failed Unable to load backend, error: libQnnCpu.so: cannot open shared object file",
)
QNN_SIMULATED = ran("qnn", 20.9, speed=11.7)
NO_DEVICE = Evidence(
    "loading the model", says="OpenVINO execution provider is not supported in this build. "
)
SEGFAULT = Evidence("warming up", died="was ended by SIGSEGV (a fault in native code)")
SIGILL = Evidence(
    "starting",
    died="was ended by SIGILL (this build needs instructions this CPU does not have)",
)
HUNG = Evidence("loading the model", died="hung: it was ended after 90 s")
NO_DML = Evidence(
    "loading the model",
    says="DML provider requested, but the installed GenAI has not been built with DML support",
)
NO_MEMORY = Evidence("loading the model", says="CUDA failure 2: out of memory")
CPU = ran("cpu", 100, speed=10.0)

REFUSED = [
    ("cuda", "probe", NO_DRIVER, "no NVIDIA driver", "nvidia-driver"),
    ("cuda", "probe", NO_CUBLAS, "libcublasLt.so.13 is missing", "onnxruntime-gpu[cuda,cudnn]"),
    ("cuda", "probe", NO_KERNEL, "no kernel image", "JetPack"),
    ("cuda", "check", NO_MEMORY, "does not fit the device's memory", "smaller model"),
    ("cuda", "probe", SEGFAULT, "SIGSEGV", "driver"),
    ("cuda", "probe", SIGILL, "instructions this CPU does not have", "driver"),
    ("cuda", "probe", HUNG, "hung", "driver"),
    ("cuda", "probe", small("cpu", 100), "does not run there: 100 % on cpu", "README"),
    ("cuda", "probe", ran("cuda", 90, pieces=ANSWER), "not the CPU's text", "another build"),
    ("cuda", "check", ran("cuda", 49.9), "does not run there", "made for CUDA"),
    (
        "cuda",
        "check",
        ran("cuda", 90, pieces=ANSWER[::-1]),
        "differs from token 1",
        "another build",
    ),
    ("directml", "probe", NO_DML, "no DirectML", "onnxruntime-directml"),
    ("qnn", "check", NO_BACKEND, "backend", "backend_path"),
    ("qnn", "check", QNN_ON_CPU, "100 % on cpu (the library of its NPU", "backend_path"),
    ("qnn", "check", QNN_SIMULATED, "20.9 % on qnn", "made for QNN"),
    ("openvino", "probe", NO_DEVICE, "no device", "OpenVINO"),
    ("openvino", "check", Evidence("answering", pieces=ANSWER), "could not be measured", "TMPDIR"),
]


def world(names: set[str]) -> Installed:
    return lambda name: "1.0" if name in names else None


def choice(
    recorded: dict[tuple[str, Stage], Evidence],
    *providers: str,
    packages: set[str] = ALL_PACKAGES,
    strict: bool = False,
    barred: dict[str, str] | None = None,
) -> tuple[Selection, list[tuple[str, Stage]]]:
    """What is chosen, and which trials that took."""
    asked: list[tuple[str, Stage]] = []

    def look(name: str, stage: Stage) -> Evidence:
        asked.append((name, stage))
        return recorded[name, stage]

    wanted = Wanted(providers, strict=strict)
    chosen = choose(wanted, look, world(packages), windows=True, barred=barred)
    return chosen, asked


def passing(name: str) -> dict[tuple[str, Stage], Evidence]:
    return {(name, "probe"): small(name), (name, "check"): ran(name, 97.5)}


# Refusals.


@pytest.mark.parametrize(("name", "stage", "evidence", "says", "mend"), REFUSED)
def test_a_refusal_is_in_a_users_words_and_says_what_mends_it(
    name: str, stage: Stage, evidence: Evidence, says: str, mend: str
) -> None:
    recorded = passing(name) | {(name, stage): evidence, ("cpu", "check"): CPU}
    found, _ = choice(recorded, name)
    assert found.chosen == "cpu"
    report = found.reports[0]
    assert (report.provider, report.passed) == (name, False)
    assert says in report.says
    assert report.mend is not None
    assert mend in report.mend
    assert "\n" not in report.says


@pytest.mark.parametrize("name", [name for name in PROVIDERS if name != "cpu"])
def test_what_is_not_installed_is_not_tried(name: str) -> None:
    found, asked = choice({}, name, packages=CPU_ONLY)
    assert (found.chosen, asked) == ("cpu", [])
    assert found.reports[0].says.startswith("not installed: onnxruntime-")
    assert "pip install" in (found.reports[0].mend or "")


def test_directml_elsewhere_than_on_windows() -> None:
    def look(name: str, stage: Stage) -> Evidence:
        raise AssertionError((name, stage))

    found = choose(Wanted(("directml",)), look, world(ALL_PACKAGES), windows=False)
    assert "part of Windows" in found.reports[0].says
    # Nobody who did not ask for it is told.
    found = choose(Wanted(("auto",)), look, world(CPU_ONLY), windows=False)
    assert [r.provider for r in found.reports] == ["cuda", "qnn", "openvino", "cpu"]


# The choice.


@pytest.mark.parametrize("names", list(itertools.permutations(["cuda", "qnn", "openvino"])))
@pytest.mark.parametrize("good", list(itertools.product([True, False], repeat=3)))
def test_the_first_that_passes_wins(names: tuple[str, ...], good: tuple[bool, ...]) -> None:
    recorded: dict[tuple[str, Stage], Evidence] = {("cpu", "check"): CPU}
    for name, passes in zip(names, good, strict=True):
        failing = {(name, "probe"): SEGFAULT, (name, "check"): SEGFAULT}
        recorded |= passing(name) if passes else failing
    found, asked = choice(recorded, *names)
    winner = next((n for n, passes in zip(names, good, strict=True) if passes), "cpu")
    assert found.chosen == winner
    # Whoever comes after the winner is left alone.
    tried = [*names, "cpu"][: [*names, "cpu"].index(winner) + 1]
    assert [r.provider for r in found.reports] == tried
    assert {name for name, _ in asked} <= {*tried, "cpu"}
    assert [r.passed for r in found.reports] == [False] * (len(tried) - 1) + [True]


def test_only_the_winner_is_checked_with_the_real_model() -> None:
    recorded = passing("openvino") | {("cuda", "probe"): NO_DRIVER, ("cpu", "check"): CPU}
    _, asked = choice(recorded, "cuda", "openvino")
    assert asked == [
        *(("cuda", "probe"), ("openvino", "probe"), ("openvino", "check")),
        ("cpu", "check"),
    ]


def test_an_npu_is_tried_with_the_real_model_at_once() -> None:
    _, asked = choice(passing("qnn") | {("cpu", "check"): CPU}, "qnn")
    assert asked[0] == ("qnn", "check")


def test_the_cpu_alone_needs_no_trial() -> None:
    found, asked = choice({}, "cpu", "cuda")
    assert (found.chosen, asked, len(found.reports)) == ("cpu", [], 1)


def test_strict_runs_nowhere_else() -> None:
    recorded: dict[tuple[str, Stage], Evidence] = {("cuda", "probe"): NO_DRIVER}
    found, _ = choice(recorded, "cuda", strict=True)
    assert found.chosen is None
    assert [r.provider for r in found.reports] == ["cuda"]
    found, _ = choice({}, "auto", strict=True, packages=CPU_ONLY)
    assert found.chosen is None
    assert "cpu" not in {r.provider for r in found.reports}
    assert choice({}, "cpu", strict=True)[0].chosen == "cpu"


def test_a_barred_provider_is_passed_over_untried() -> None:
    found, asked = choice({}, "cuda", barred={"cuda": "3 engines were lost"})
    assert (found.chosen, asked) == ("cpu", [])
    assert found.reports[0].says == "3 engines were lost"


def test_auto_does_not_make_it_slower() -> None:
    slow = {("openvino", "probe"): small("openvino")}
    slow |= {("openvino", "check"): ran("openvino", 99.2, speed=6.3), ("cpu", "check"): CPU}
    packages = {*CPU_ONLY, "onnxruntime-ep-openvino"}
    found, _ = choice(slow, "auto", packages=packages)
    assert found.chosen == "cpu"
    report = next(r for r in found.reports if r.provider == "openvino")
    assert report.says == "slower than the CPU: 6.3 against 10.0 tokens/s"
    # Who names it has it.
    assert choice(slow, "openvino", packages=packages)[0].chosen == "openvino"


def test_a_model_that_the_cpu_does_not_run_needs_a_sound_answer() -> None:
    recorded = passing("cuda") | {("cpu", "check"): SEGFAULT}
    found, _ = choice(recorded, "cuda")
    assert found.chosen == "cuda"
    assert "the CPU does not run this model" in found.reports[0].says
    recorded["cuda", "check"] = ran("cuda", 97, pieces=(b"!",) * 16)
    assert choice(recorded, "cuda")[0].chosen == "cpu"


@pytest.mark.parametrize(
    ("pieces", "alike", "says"),
    [
        (ANSWER, True, "the CPU's text, 8 tokens of it"),
        ((*ANSWER[:4], b"x"), True, "near the CPU's text: 4 of 8"),
        ((*ANSWER[:3], b"x"), False, "differs from token 4 on"),
        (ANSWER[:6], True, "near the CPU's text: 6 of 8"),
        ((), False, "differs from token 1 on"),
    ],
)
def test_the_text_is_held_against_the_cpus(
    pieces: tuple[bytes, ...],
    alike: bool,
    says: str,
) -> None:
    found, words = likeness(pieces, ANSWER)
    assert found is alike
    assert says in words


@pytest.mark.parametrize("pieces", [(), (b" ", b"\n"), (b"a",) * 9, (b"\xff", b"\xfe", b"\xff")])
def test_what_does_not_read_as_text_is_not_sound(pieces: tuple[bytes, ...]) -> None:
    assert not is_sane(pieces)[0]


# For models that are still to come.

FAR = ran("openvino", 97.5, pieces=(b"x",) * len(SMALL_ANSWER))
NEAR = ran("openvino", 90.5, pieces=(*SMALL_ANSWER[:6], b"x", b"y"))
JUDGED = {
    "the CPU's text": (small("openvino", 90.5), True),
    "near the CPU's text": (NEAR, True),
    "half of the time": (small("openvino", 50.0), True),
    "another text": (FAR, False),
    "most of it elsewhere": (small("openvino", 49.9), False),
    "all of it elsewhere": (small("cpu", 100), False),
    "unmeasured": (Evidence("answering", pieces=SMALL_ANSWER), False),
    "it died": (SEGFAULT, False),
}


@pytest.mark.parametrize(("evidence", "passes"), JUDGED.values(), ids=JUDGED)
def test_the_daemon_and_the_command_judge_by_one_rule(
    evidence: Evidence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, passes: bool
) -> None:
    here = world({*CPU_ONLY, "onnxruntime-ep-openvino"})
    monkeypatch.setattr(packages, "installed", here)
    settings = Settings(device="dut", state_dir=tmp_path, providers=["openvino"])  # type: ignore[arg-type]
    load, wanted = Load("genai", "", ""), settings.wanted
    key = Surroundings.of(load).key("openvino", "probe", wanted)
    Proven(wanted.memory).keep(key, "openvino", evidence)
    found = usable(wanted, lambda _name, _stage: evidence, here, windows=False)
    assert found == (("openvino", "cpu") if passes else ("cpu",))
    assert proposal.proven(settings) == found
    assert prover.usable(load, wanted, lambda loading: pytest.fail(loading.stage)) == found


def test_what_nobody_has_tried_or_need_try_is_not_usable() -> None:
    asked: list[str] = []
    for windows in (True, False):
        found = usable(
            Wanted(("auto",)),
            lambda name, _: asked.append(name),
            world(ALL_PACKAGES),
            windows=windows,
        )
        assert found == ("cpu",)
    # QNN's NPU takes no small model, and DirectML is of Windows alone.
    assert asked == ["cuda", "directml", "openvino", "cuda", "openvino"]
    asked.clear()
    assert usable(Wanted(("auto",)), lambda n, _: asked.append(n), world(CPU_ONLY), windows=False)
    assert asked == []


# Names.


@pytest.mark.parametrize(
    ("word", "name"),
    [("CUDA", "cuda"), ("DirectML", "directml"), (" OpenVino ", "openvino"), ("CPU", "cpu")],
)
def test_case_does_not_matter(word: str, name: str) -> None:
    assert canonical(word) == name


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("cude", "cuda"),
        ("openvno", "openvino"),
        ("dml", "directml"),
        ("gpu", "cuda"),
        ("qn", "qnn"),
    ],
)
def test_a_misspelt_name_is_refused_with_the_nearest(word: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean {nearest}"):
        canonical(word)


def test_the_cpu_comes_last_where_it_is_not_named() -> None:
    assert candidates(("qnn", "cuda"), strict=False) == ("qnn", "cuda", "cpu")
    assert candidates(("cpu", "cuda"), strict=False) == ("cpu", "cuda")
    assert candidates(("cuda", "auto"), strict=True) == ("cuda", "directml", "qnn", "openvino")
