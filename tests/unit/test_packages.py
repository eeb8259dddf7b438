"""What is installed of the runtime, and which mixes cannot work."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from phid import packages
from phid.providers import PROVIDERS


def world(**versions: str) -> Callable[[str], str | None]:
    named = {name.replace("_", "-"): version for name, version in versions.items()}
    return named.get


CPU = {"onnxruntime": "1.32.0", "onnxruntime_genai": "0.18.0"}


@pytest.mark.parametrize(
    "whole",
    [
        {},
        CPU,
        {"onnxruntime_gpu": "1.31.1", "onnxruntime_genai_cuda": "0.18.0"},
        {"onnxruntime_openvino": "1.24.1", "onnxruntime_genai": "0.18.0"},
        {"onnxruntime_directml": "1.24.4", "onnxruntime_genai_directml": "0.14.1"},
        CPU | {"onnxruntime_qnn": "2.7.0", "onnxruntime_ep_openvino": "1.8.1"},
    ],
)
def test_what_goes_together_is_no_fault(whole: dict[str, str]) -> None:
    assert packages.fault(world(**whole)) is None


@pytest.mark.parametrize(
    ("more", "says", "mend"),
    [
        (
            {"onnxruntime_gpu": "1.31.1"},
            "onnxruntime and onnxruntime-gpu are both installed",
            (
                "pip uninstall -y onnxruntime onnxruntime-gpu"
                " && pip install --force-reinstall --no-deps onnxruntime-gpu==1.31.1"
            ),
        ),
        (
            {"onnxruntime_openvino": "1.24.1"},
            "onnxruntime and onnxruntime-openvino are both installed",
            "--no-deps onnxruntime-openvino==1.24.1",
        ),
        (
            {"onnxruntime_genai_cuda": "0.18.0"},
            "onnxruntime-genai and onnxruntime-genai-cuda are both installed",
            "pip uninstall -y onnxruntime-genai onnxruntime-genai-cuda",
        ),
    ],
)
def test_a_broken_mix_is_told_with_the_line_that_mends_it(
    more: dict[str, str], says: str, mend: str
) -> None:
    fault = packages.fault(world(**CPU, **more))
    assert fault is not None
    assert says in fault.says
    assert mend in fault.mend


def test_a_build_beside_a_runtime_it_was_not_made_for() -> None:
    fault = packages.fault(world(onnxruntime="1.32.0", onnxruntime_genai_cuda="0.18.0"))
    assert fault is not None
    assert "was made for onnxruntime-gpu" in fault.says


def test_what_is_missing_is_of_the_set_that_lacks_least() -> None:
    has = world(onnxruntime_genai="0.18.0", onnxruntime_openvino="1.24.1")
    assert packages.missing("openvino", has) == ()
    assert packages.missing("openvino", world(**CPU)) == ("onnxruntime-ep-openvino",)
    assert packages.missing("cuda", world(onnxruntime_gpu="1")) == ("onnxruntime-genai-cuda",)
    assert packages.missing("qnn", world(**CPU, onnxruntime_qnn="2.7.0")) == ()


@pytest.mark.parametrize(
    ("version", "can"), [("1.24.1", False), ("1.25.0", True), ("1.32.0", True), ("2.0", True)]
)
def test_an_old_runtime_is_never_asked_to_profile_a_run(version: str, can: bool) -> None:
    # onnxruntime-openvino 1.24.1 ends the process by SIGSEGV when asked.
    assert packages.profiles_runs(world(onnxruntime_openvino=version)) is can


def test_nothing_installed_profiles_nothing() -> None:
    assert not packages.profiles_runs(world())


def test_every_provider_says_how_it_is_installed() -> None:
    for provider in PROVIDERS.values():
        assert re.search(r'pip install "?onnxruntime', provider.install)
