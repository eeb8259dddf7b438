"""Where the kernels ran, by a profile's word."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phid.traces import kernel_times, main_provider, shares, total

# As ONNX Runtime 1.32 writes them, shortened: a QNN backend that took one of 308 nodes.
SESSION = {"cat": "Session", "dur": 115732, "name": "model_run", "ph": "X", "args": {}}


def kernel(provider: str, dur: object) -> dict[str, object]:
    return {"cat": "Node", "dur": dur, "name": "x_kernel_time", "args": {"provider": provider}}


def test_only_kernels_count() -> None:
    fence = {"cat": "Node", "dur": 99, "name": "x_fence_before", "args": {"op_name": "Add"}}
    events = [
        SESSION,
        fence,
        kernel("CPUExecutionProvider", 32),
        kernel("CPUExecutionProvider", 14),
    ]
    assert kernel_times(json.dumps(events)) == {"cpu": 46}


@pytest.mark.parametrize("control", ["If", "Loop", "Scan"])
def test_control_flow_does_not_count_beside_what_it_runs(control: str) -> None:
    outer = kernel("CPUExecutionProvider", 500)
    outer["args"] = {"provider": "CPUExecutionProvider", "op_name": control}
    inner = kernel("CUDAExecutionProvider", 480)
    inner["args"] = {"provider": "CUDAExecutionProvider", "op_name": "MatMulNBits"}
    assert kernel_times(json.dumps([outer, inner])) == {"cuda": 480}


def test_a_kernel_too_short_to_be_timed_has_run_all_the_same() -> None:
    assert kernel_times(json.dumps([kernel("QNNExecutionProvider", 0)])) == {"qnn": 1}


@pytest.mark.parametrize(
    ("kernels", "name"),
    [
        ("CUDAExecutionProvider", "cuda"),
        ("DmlExecutionProvider", "directml"),
        ("QNNExecutionProvider", "qnn"),
        ("OpenVINOExecutionProvider", "openvino"),
        ("CPUExecutionProvider", "cpu"),
        ("WebGpuExecutionProvider", "webgpu"),
        ("odd", "odd"),
    ],
)
def test_each_provider_gets_our_name(kernels: str, name: str) -> None:
    assert list(kernel_times(json.dumps([kernel(kernels, 5)]))) == [name]


@pytest.mark.parametrize("text", ["", "{}", "[", '"x"', "3"])
def test_what_is_no_profile_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        kernel_times(text)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
def test_no_event_upsets_it(event: object) -> None:
    events = [event, {"cat": "Node", "args": event}, {"cat": "Node", "args": {"provider": event}}]
    kernel_times(json.dumps([*events, kernel("CPUExecutionProvider", event)]))


@given(st.dictionaries(st.text(min_size=1), st.integers(0, 10**9), max_size=8))
def test_shares_sum_to_a_hundred_exactly(times: dict[str, int]) -> None:
    found = shares(times)
    if not sum(times.values()):
        assert found == {}
        return
    assert sum(round(pct * 10) for pct in found.values()) == 1000
    assert list(found.values()) == sorted(found.values(), reverse=True)
    whole = sum(times.values())
    assert all(abs(pct - times[name] * 100 / whole) < 0.2 for name, pct in found.items())


def test_several_profiles_are_one() -> None:
    assert total([{"cpu": 1, "qnn": 2}, {"cpu": 3}]) == {"cpu": 4, "qnn": 2}


def test_the_main_provider_has_most_of_the_time() -> None:
    assert main_provider({"cpu": 79.1, "qnn": 20.9}) == "cpu"
    assert main_provider({}) is None
