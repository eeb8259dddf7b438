"""What an ONNX file says of its weights, read without the onnx package and without the weights."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Field numbers of onnx.proto that lead from a model to where its weights are.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_TYPE, _NODE_ATTRIBUTE = 1, 4, 5
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_TENSOR_NAME, _TENSOR_EXTERNAL = 8, 13
_KEY, _VALUE = 1, 2
# An attribute's name, and its field 3: an integer.
_BLOCK_SIZE = re.compile(rb"block_size\x18([\x80-\xff]?)([\x00-\x7f])")

BLOCK = 32
"""How many weights share a scale if nothing says it: usual, and errs towards more memory."""


class NotOnnx(ValueError):  # noqa: N818 - it is an answer
    """It is no whole ONNX file; the message says at what byte that was seen."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor: `location` is the file it is kept in, "" the graph's own; sizes in bytes."""

    name: str
    location: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Graph:
    """The weights of a model, its branches and loops included, and which are lookup tables."""

    weights: tuple[Weight, ...]
    looked_up: frozenset[str]

    def external(self) -> dict[str, int]:
        """The files that weights are kept in, and how long each must be at least."""
        ends: dict[str, int] = {}
        for weight in self.weights:
            if weight.location:
                end = weight.offset + weight.length
                ends[weight.location] = max(ends.get(weight.location, 0), end)
        return ends

    def read_bytes(self) -> int:
        """The bytes of weights that a step reads: all but tables that it takes single rows of."""
        return sum(w.length for w in self.weights if w.name not in self.looked_up)


def block_size(path: Path) -> int:
    """How many weights of this graph share a scale; BLOCK if it does not say. Raises OSError."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = _BLOCK_SIZE.search(data)
        if found is None:
            return BLOCK
        low, high = found.groups()
        return (low[0] & 0x7F) + (high[0] << 7) if low else high[0]


def read(path: Path) -> Graph:
    """The graph in a file. Raises NotOnnx or OSError."""
    if not path.stat().st_size:
        raise NotOnnx("it is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        weights: list[Weight] = []
        looked_up: set[str] = set()
        try:
            graphs = [
                span for number, span in _fields(data, 0, len(data)) if number == _MODEL_GRAPH
            ]
            if not graphs:
                raise NotOnnx("it has no graph")
            for start, end in graphs:
                _graph(data, start, end, weights, looked_up)
        except IndexError:
            raise NotOnnx(f"it ends in the middle, at byte {len(data)}") from None
    return Graph(tuple(weights), frozenset(looked_up))


def _graph(
    data: mmap.mmap, start: int, end: int, weights: list[Weight], looked_up: set[str]
) -> None:
    for number, (at, to) in _fields(data, start, end):
        if number == _GRAPH_INITIALIZER:
            weights.append(_tensor(data, at, to))
        elif number == _GRAPH_NODE:
            _node(data, at, to, weights, looked_up)


def _node(
    data: mmap.mmap, start: int, end: int, weights: list[Weight], looked_up: set[str]
) -> None:
    inputs, kind = [], b""
    for number, (at, to) in _fields(data, start, end):
        if number == _NODE_INPUT:
            inputs.append(data[at:to].decode("utf-8", "replace"))
        elif number == _NODE_TYPE:
            kind = data[at:to]
        elif number == _NODE_ATTRIBUTE:
            for part, (first, last) in _fields(data, at, to):
                if part in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
                    # A branch's or a loop's graph: its weights count as lookup tables, for the
                    # large ones are the rotary caches of both context lengths.
                    inner: list[Weight] = []
                    _graph(data, first, last, inner, looked_up)
                    weights += inner
                    looked_up |= {weight.name for weight in inner}
                elif part in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
                    tensor = _tensor(data, first, last)
                    weights.append(tensor)
                    looked_up.add(tensor.name)
    if kind in (b"Gather", b"GatherBlockQuantized") and inputs:
        # The table, and where it is quantized its scales and zero points.
        looked_up |= {inputs[0], *inputs[2:]}


def _tensor(data: mmap.mmap, start: int, end: int) -> Weight:
    name, external = "", {}
    for number, (at, to) in _fields(data, start, end):
        if number == _TENSOR_NAME:
            name = data[at:to].decode("utf-8", "replace")
        elif number == _TENSOR_EXTERNAL:
            pair = {n: data[a:b].decode("utf-8", "replace") for n, (a, b) in _fields(data, at, to)}
            external[pair.get(_KEY, "")] = pair.get(_VALUE, "")
    if not external:
        return Weight(name, "", 0, end - start)
    offset, length = (_whole_number(external.get(key)) for key in ("offset", "length"))
    return Weight(name, external.get("location", ""), offset, length)


def _whole_number(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """Every field of a protobuf message: its number, and where its content is.

    Raises NotOnnx, or IndexError where the data end within a number.
    """
    at = start
    while at < end:
        key, at = _varint(data, at)
        form, number = key & 7, key >> 3
        if form == 0:
            _, to = _varint(data, at)
        elif form == 1:
            to = at + 8
        elif form == 2:
            size, at = _varint(data, at)
            to = at + size
        elif form == 5:
            to = at + 4
        else:
            raise NotOnnx(f"what stands at byte {at} is no part of one")
        if to > end:
            whole = end == len(data)
            raise NotOnnx(
                f"it ends at byte {end} and should go on to {to}"
                if whole
                else f"what stands at byte {at} is no part of one"
            )
        yield number, (at, to)
        at = to


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise NotOnnx(f"what stands at byte {at} is no part of one")
