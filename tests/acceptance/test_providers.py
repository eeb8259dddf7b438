"""Providers that run on this processor, from their own packages: chosen, measured and told."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest

from phid.settings import default_models_dir
from rig import ROOT

# What scripts/prove-providers ends with where the index cannot be reached.
UNAVAILABLE = 69


@pytest.fixture(scope="module")
def openvino(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What onnxruntime-openvino does with the demo model, in a venv of its own.

    The venv is beside the demo model, in the cache: half a minute of processor time if it is there,
    and a few hundred megabytes to fetch if it is not.
    """
    report = tmp_path_factory.mktemp("openvino") / "figures.json"
    venvs = default_models_dir().parent / "venvs"
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "prove-providers", "--json", report, venvs, "openvino"],
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout, done.stderr[-4000:])
    if done.returncode == UNAVAILABLE and os.environ.get("CI") != "true":
        pytest.skip("onnxruntime-openvino cannot be had: PyPI is not reached from here")
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(report.read_text()))


@pytest.mark.measures  # a trial of a provider has two minutes
@pytest.mark.openvino
@pytest.mark.model
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="no wheel for this CPU")
@pytest.mark.timeout(900)
def test_openvino_passes_is_chosen_and_runs_the_model_by_measure(openvino: dict[str, Any]) -> None:
    assert openvino["versions"]["onnxruntime-openvino"] == "1.24.1"
    assert openvino["usable"] == ["openvino", "cpu"]
    first, warm = openvino["first start"], openvino["warm start"]
    report = first["reports"][0]
    assert (report["provider"], report["passed"]) == ("openvino", True), first["reports"]
    for placement in (
        report["placement"],
        *(start["engine"]["placement"] for start in (first, warm)),
    ):
        assert sum(placement.values()) == pytest.approx(100, abs=0.2)
        assert placement["openvino"] > 90
    for start in (first, warm):
        assert start["chosen"] == "openvino"
        assert start["engine"]["provider"] == "openvino"
    # What was proven is not proven again.
    assert first["stages"][0] == "trying OpenVINO with the small model"
    assert warm["stages"][0] == "reading the configuration"
