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

    `codes` is (rows, blocks, 32), unpacked; `scales` and `zeros` are (rows, blocks). Without
    zeros it is the middle of the codes' range.
    """

    codes: Bytes
    scales: Floats
    zeros: Floats | None
    bits: int

    def with_rows(self, rows: npt.NDArray[np.intp]) -> Self:
        """The matrix of these rows, in this order."""
        zeros = None if self.zeros is None else self.zeros[rows]
        return replace(self, codes=self.codes[rows], scales=self.scales[rows], zeros=zeros)

    def with_whole_zeros(self, bits: int) -> Self:
        """The nearest matrix with zeros that are codes; each bit more than now halves the error."""
        assert self.zeros is not None
        finer = 1 << (bits - self.bits)
        zeros = np.rint(self.zeros * finer)
        if zeros.min() < 0 or zeros.max() >= 1 << bits:
            raise ValueError("a block of weights lies all on one side of zero")
        codes, scales = self.codes * np.uint8(finer), self.scales / np.float32(finer)
        return replace(self, codes=codes, scales=scales, zeros=zeros, bits=bits)


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
