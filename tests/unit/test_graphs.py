"""What is read of an ONNX file is what the onnx package reads of it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phid import graphs
from rig import ROOT
from weighty import weighty_graph

TINY = ROOT / "tests" / "models" / "tiny-phi3v"


@pytest.mark.parametrize("name", ["vision.onnx", "embedding.onnx", "text.onnx"])
def test_every_weight_is_found(name: str) -> None:
    expected = {tensor.name for tensor in onnx.load(TINY / name).graph.initializer}
    assert expected <= {weight.name for weight in graphs.read(TINY / name).weights}


def test_weights_in_other_files_are_told_with_where_they_end(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(weighty_graph({"a": ("x", 0, 10), "b": ("x", 64, 6), "c": ("y", 8, 1)}))
    assert graphs.read(path).external() == {"x": 70, "y": 9}


def test_a_table_of_words_is_not_read_for_each_token(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(weighty_graph({"a": ("x", 0, 10), "b": ("x", 64, 6)}, looked_up="a"))
    assert graphs.read(path).read_bytes() == 6


def test_what_is_cut_off_is_no_graph(tmp_path: Path) -> None:
    whole = (TINY / "text.onnx").read_bytes()
    path = tmp_path / "m.onnx"
    for size in (0, 1, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(graphs.NotOnnx):
            graphs.read(path)


@given(noise=st.binary(max_size=200))
def test_noise_is_refused_and_nothing_else_happens(
    noise: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.onnx"
    path.write_bytes(noise)
    with contextlib.suppress(graphs.NotOnnx):
        graphs.read(path)


def test_a_flipped_byte_never_does_more_than_refuse(tmp_path: Path) -> None:
    whole = weighty_graph({"a": ("x", 0, 10), "b": ("x", 64, 6)})
    path = tmp_path / "m.onnx"
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with contextlib.suppress(graphs.NotOnnx):
            graphs.read(path)
