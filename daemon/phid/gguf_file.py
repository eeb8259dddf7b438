"""The reader of GGUF files: metadata, and the tensors a Q4_1 file is made of.

The format is docs/gguf.md of github.com/ggml-org/ggml; the blocks are in its ggml-common.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

BLOCK = 32  # weights that share a scale, in Q4_1 and in Q8_0
_F32, _Q4_1, _Q8_0 = 0, 3, 8  # the format's numbers of these types

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Matrix:
    """Quantised weights: value = scale * (code - zero), a scale and a zero for each block.

    `codes` is (rows, blocks, 32), unpacked; `scales` and `zeros` are (rows, blocks). If `zeros` is
    None, every zero is the middle of the codes' range.
    """

    codes: Bytes
    scales: Floats
    zeros: Floats | None
    bits: int

    def with_rows(self, rows: npt.NDArray[np.intp]) -> Self:
        """The matrix of these rows, in this order."""
        zeros = None if self.zeros is None else self.zeros[rows]
        return replace(self, codes=self.codes[rows], scales=self.scales[rows], zeros=zeros)

    def in_8_bits(self) -> Self:
        """The same weights as 16 times finer codes, so that a zero is off by a 32nd of a step."""
        assert self.zeros is not None
        zeros = np.rint(self.zeros * 16)
        if zeros.min() < 0 or zeros.max() > 255:
            raise ValueError("a block of weights lies all on one side of zero")
        codes, scales = self.codes * np.uint8(16), self.scales / np.float32(16)
        return replace(self, codes=codes, scales=scales, zeros=zeros, bits=8)

    def with_whole_zeros(self) -> Self:
        """For each block the nearest of ten: the whole zeros on both sides, with five scales each.

        Nearest in squared error, each scale being corrected to its least-squares value.
        """
        assert self.zeros is not None
        wanted = self.codes - self.zeros[..., None]  # the weights, in steps of their own scale
        square = np.einsum("rbk,rbk->rb", wanted, wanted)
        least = np.full_like(square, np.inf)
        steps, scales, zeros = np.empty_like(wanted), np.empty_like(square), np.empty_like(square)
        for stretch in (0.93, 0.97, 1.0, 1.03, 1.07):
            rounded = np.rint(wanted / np.float32(stretch))
            for zero in (np.floor(self.zeros), np.ceil(self.zeros)):
                tried = np.clip(rounded, -zero[..., None], 15 - zero[..., None])
                along = np.einsum("rbk,rbk->rb", tried, wanted)
                own = np.maximum(np.einsum("rbk,rbk->rb", tried, tried), np.float32(1e-9))
                error = square - along * along / own
                better = error < least
                np.copyto(least, error, where=better)
                np.copyto(zeros, zero, where=better)
                np.copyto(scales, along / own * self.scales, where=better)
                np.copyto(steps, tried, where=better[..., None])
        codes = (steps + zeros[..., None]).astype(np.uint8)
        return replace(self, codes=codes, scales=scales, zeros=zeros)


def stacked(parts: Iterable[Matrix]) -> Matrix:
    """One 4-bit matrix with the rows of all."""
    codes, scales, zeros = zip(*((p.codes, p.scales, p.zeros) for p in parts), strict=True)
    return Matrix(np.concatenate(codes), np.concatenate(scales), np.concatenate(zeros), 4)


@dataclass(frozen=True, slots=True)
class Gguf:
    """A GGUF file: its metadata, and its tensors where they lie in the mapped file."""

    meta: dict[str, Any]
    tensors: dict[str, tuple[int, tuple[int, ...], Bytes]]

    def floats(self, name: str) -> Floats:
        """The values of an F32 vector."""
        return self._blocks(name, _F32, 1, 4).view(np.float32)[..., 0]

    def q8_0(self, name: str) -> Matrix:
        """A Q8_0 matrix: its signed codes become unsigned ones, with zero in the middle."""
        raw = self._blocks(name, _Q8_0, BLOCK, 34)
        return Matrix(raw[..., 2:] ^ np.uint8(0x80), _halfs(raw[..., :2])[..., 0], None, 8)

    def q4_1(self, name: str) -> Matrix:
        """A Q4_1 matrix; its zeros are fractions."""
        raw = self._blocks(name, _Q4_1, BLOCK, 20)
        # A block's first 16 codes are the low halves of its bytes, the rest are the high halves.
        codes = np.concatenate([raw[..., 4:] & 15, raw[..., 4:] >> 4], axis=-1)
        scales, least = np.moveaxis(_halfs(raw[..., :4]), -1, 0)
        if not scales.all():
            raise ValueError(f"{name} has a block of equal weights, which has no zero point")
        return Matrix(codes, scales, -least / scales, 4)

    def _blocks(self, name: str, kind: int, weights: int, size: int) -> Bytes:
        """The tensor's bytes as (..., blocks, `size`), where a block holds so many weights."""
        found, shape, raw = self.tensors[name]
        if found != kind or shape[-1] % weights:
            raise ValueError(f"{name} has type {found} and shape {shape}: type {kind} is needed")
        blocks = (*shape[:-1], shape[-1] // weights, size)
        return raw[: int(np.prod(blocks))].reshape(blocks)


def read_gguf(path: Path) -> Gguf:
    """What the file holds. Raises ValueError where it is no GGUF file or is cut short."""
    raw: Bytes = np.memmap(path, np.uint8, "r")
    cursor = _Cursor(raw.data)
    try:
        if cursor.take("4s") != b"GGUF" or cursor.take("I") not in {2, 3}:
            raise ValueError(f"{path.name} is no GGUF file of version 2 or 3")
        tensor_count, meta_count = cursor.take("Q"), cursor.take("Q")
        meta = {cursor.text(): cursor.value(cursor.take("I")) for _ in range(meta_count)}
        entries = []
        for _ in range(tensor_count):
            name = cursor.text()
            shape = tuple(cursor.take("Q") for _ in range(cursor.take("I")))[::-1]
            entries.append((name, shape, cursor.take("I"), cursor.take("Q")))
    except (struct.error, KeyError) as error:
        raise ValueError(f"{path.name} is cut short or damaged") from error
    start = -(-cursor.at // (alignment := meta.get("general.alignment", 32))) * alignment
    return Gguf(meta, {name: (kind, shape, raw[start + at :]) for name, shape, kind, at in entries})


class _Cursor:
    """Values of a GGUF header, one after the other."""

    _SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
    _TEXT, _ARRAY = 8, 9

    def __init__(self, raw: memoryview) -> None:
        self._raw = raw
        self.at = 0

    def take(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self._raw, self.at)
        self.at += struct.calcsize("<" + form)
        return value

    def text(self) -> str:
        return str(self.take(f"{self.take('Q')}s"), "utf-8")

    def value(self, kind: int) -> Any:
        if kind == self._TEXT:
            return self.text()
        if kind == self._ARRAY:
            inner = self.take("I")
            return [self.value(inner) for _ in range(self.take("Q"))]
        return self.take(self._SCALARS[kind])


def _halfs(raw: Bytes) -> Floats:
    """The bytes' 16-bit floats, widened."""
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)
