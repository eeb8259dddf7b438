"""How near the matrices with whole zeros are to the file's own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phid.gguf_file import Floats, Matrix, read_gguf, stacked


def _matrix(seed: int) -> Matrix:
    random = np.random.default_rng(seed)
    codes = random.integers(0, 16, (6, 3, 32), dtype=np.uint8)
    scales = random.uniform(0.001, 0.1, (6, 3)).astype(np.float32)
    return Matrix(codes, scales, random.uniform(0.7, 14.3, (6, 3)).astype(np.float32), 4)


def _values(matrix: Matrix) -> Floats:
    assert matrix.zeros is not None
    return (matrix.codes - matrix.zeros[..., None]) * matrix.scales[..., None]


@given(seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=30)
def test_8_bits_are_off_by_a_32nd_of_a_step_at_most(seed: int) -> None:
    matrix = _matrix(seed)
    finer = matrix.in_8_bits()
    assert finer.zeros is not None
    assert (finer.zeros == np.rint(finer.zeros)).all()
    error = np.abs(_values(finer) - _values(matrix)) / matrix.scales[..., None]
    assert error.max() < 1 / 32 + 1e-4


@given(seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=30)
def test_4_bits_with_whole_zeros_are_nearer_than_rounded_zeros_in_every_block(seed: int) -> None:
    matrix = _matrix(seed)
    fitted = matrix.with_whole_zeros()
    assert matrix.zeros is not None
    assert fitted.zeros is not None
    assert fitted.codes.max() <= 15
    assert (fitted.zeros == np.rint(fitted.zeros)).all()
    rounded = replace(matrix, zeros=np.rint(matrix.zeros))
    errors = [((_values(m) - _values(matrix)) ** 2).sum(-1) for m in (fitted, rounded)]
    assert (errors[0] <= errors[1] * 1.001 + 1e-9).all()


def test_weights_on_one_side_of_zero_are_refused() -> None:
    matrix = replace(_matrix(1), zeros=np.full((6, 3), 16.5, np.float32))
    with pytest.raises(ValueError, match="one side of zero"):
        matrix.in_8_bits()


def test_rows_are_chosen_and_stacked() -> None:
    matrix = _matrix(1)
    both = stacked([matrix.with_rows(np.array([2, 0])), matrix.with_rows(np.array([1]))])
    assert np.array_equal(_values(both), _values(matrix)[[2, 0, 1]])


@given(raw=st.binary(max_size=200) | st.just(bytes(16)), magic=st.booleans())
@settings(deadline=None, max_examples=200)
def test_any_other_bytes_are_refused(
    raw: bytes, magic: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" * magic + raw)
    with pytest.raises((ValueError, KeyError)):
        read_gguf(path).floats("norm")
