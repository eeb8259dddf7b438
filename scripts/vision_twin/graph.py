"""An ONNX graph under construction, whose weights go to a file of their own as they are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, TensorProto, ValueInfoProto, helper, numpy_helper

FLOAT, HALF, INT32, INT64, BOOL = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.BOOL,
)
BLOCK = 32  # weights that share a scale, as in the official CPU build of Phi-3.5-vision
_ALIGNMENT = 64  # bytes: each weight starts a cache line where the file is mapped
_CONTRIB = {
    "Attention",
    "BiasGelu",
    "GroupQueryAttention",
    "MatMulNBits",
    "QuickGelu",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
}

Sizes = list[str | int]
Floats = npt.NDArray[np.float32]
# Codes (rows, blocks, bytes), two in a byte, and scales (rows, blocks): MatMulNBits' layout.
Matrix = tuple[npt.NDArray[np.uint8], Floats]


class Weights:
    """Random weights of the sizes a real model's have, and small enough to stay finite.

    The same seed gives the same bytes. `block` weights of an int4 matrix share a scale.
    """

    def __init__(self, seed: int, block: int = BLOCK) -> None:
        self._random = np.random.default_rng(seed)
        self._block = block

    def normal(self, *shape: int, deviation: float = 1.0) -> Floats:
        values = self._random.standard_normal(shape, np.float32)
        values *= np.float32(deviation)
        return values

    def near_one(self, size: int) -> Floats:
        return 1 + self.normal(size, deviation=0.05)

    def matrix(self, rows: int, columns: int) -> Matrix:
        """An int4 matrix whose products have about the variance of what goes in."""
        blocks = columns // self._block
        # A code counts from 8. The odd ones lie evenly about it, with a deviation of 4.6: the mean
        # of all sixteen is below, and the sums of a whole network would drift.
        codes = np.frombuffer(self._random.bytes(rows * columns // 2), np.uint8) | np.uint8(0x11)
        scales = self._random.random((rows, blocks), np.float32) + np.float32(0.5)
        scales *= np.float32(columns**-0.5 / 4.6)
        return codes.reshape(rows, blocks, self._block // 2), scales


class Graph:
    """The nodes of a graph, or of a Loop's or If's body inside one.

    Methods give the name of what they made. Weights are written to `data` at once. With `half` all
    that is FLOAT becomes float16, as in builds for CUDA.
    """

    def __init__(
        self,
        name: str,
        data: BinaryIO,
        location: str,
        outer: dict[str, TensorProto] | None = None,
        *,
        half: bool = False,
    ) -> None:
        self._half = half
        self._name = name
        self._data = data
        self._location = location
        self._inner = outer is not None
        self._tensors = {} if outer is None else outer
        self._inputs: list[ValueInfoProto] = []
        self._outputs: list[ValueInfoProto] = []
        self._nodes: list[Any] = []

    def body(self, name: str) -> Graph:
        """A graph for an attribute of a node of this one, whose names and weights it shares."""
        return Graph(name, self._data, self._location, self._tensors, half=self._half)

    def input(self, name: str, kind: int, sizes: Sizes) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, self._kind(kind), sizes))
        return name

    def output(self, name: str, kind: int, sizes: Sizes | None) -> None:
        self._outputs.append(helper.make_tensor_value_info(name, self._kind(kind), sizes))

    def sequence(self, name: str, *, out: bool = False) -> str:
        """A sequence of float tensors that comes in, or goes out."""
        values = self._outputs if out else self._inputs
        values.append(helper.make_tensor_sequence_value_info(name, self._kind(FLOAT), None))
        return name

    def ints(self, *values: int) -> str:
        """A constant int64 vector."""
        return self._constant("ints", list(values), [len(values)])

    def scalar(self, value: int) -> str:
        """A constant int64 scalar."""
        return self._constant("scalar", [value], [])

    def _constant(self, kind: str, values: list[int], shape: list[int]) -> str:
        name = "/".join(["", "constants", kind, *map(str, values)])
        if name not in self._tensors:
            self._tensors[name] = helper.make_tensor(name, INT64, shape, values)
        return name

    def weight(self, name: str, values: npt.NDArray[Any]) -> str:
        """A weight, written to the data file."""
        values = self._floats(values)
        self._data.write(bytes(-self._data.tell() % _ALIGNMENT))
        kind = helper.np_dtype_to_tensor_dtype(values.dtype)
        tensor = TensorProto(name=name, dims=values.shape, data_type=kind)
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": self._location, "offset": self._data.tell()}
        place["length"] = self._data.write(np.ascontiguousarray(values).data)
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        assert name not in self._tensors
        self._tensors[name] = tensor
        return name

    def op(
        self, kind: str, *inputs: str, outputs: list[str] | None = None, **attributes: Any
    ) -> str:
        """One node; the name of its first output."""
        names = outputs or [f"/{self._name}/{kind}_{len(self._nodes)}"]
        for given in ("to", "dtype"):
            if given in attributes:
                attributes[given] = self._kind(attributes[given])
        domain = "com.microsoft" if kind in _CONTRIB else ""
        node = helper.make_node(kind, inputs, names, name=names[0], domain=domain, **attributes)
        self._nodes.append(node)
        return names[0]

    def constant(self, values: npt.NDArray[Any], out: str) -> str:
        """A constant of any shape inside the graph itself."""
        tensor = numpy_helper.from_array(self._floats(values))
        return self.op("Constant", outputs=[out], value=tensor)

    def _kind(self, kind: int) -> int:
        return HALF if self._half and kind == FLOAT else kind

    def _floats(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return values.astype(np.float16) if self._half and values.dtype == np.float32 else values

    def matmul(self, x: str, name: str, matrix: Matrix, out: str = "") -> str:
        """`x` times an int4 matrix, with the official CPU build's accuracy level."""
        codes, scales = matrix
        block = 2 * codes.shape[2]
        return self.op(
            "MatMulNBits",
            x,
            self.weight(f"{name}.weight_Q4", codes),
            self.weight(f"{name}.weight_scales", scales),
            outputs=[out] if out else None,
            K=codes.shape[1] * block,
            N=codes.shape[0],
            bits=4,
            block_size=block,
            accuracy_level=4,
        )

    def proto(self) -> GraphProto:
        tensors = [] if self._inner else list(self._tensors.values())
        return helper.make_graph(self._nodes, self._name, self._inputs, self._outputs, tensors)

    def save(self, path: Path) -> None:
        """Write the graph beside its weights."""
        model = helper.make_model(
            self.proto(),
            producer_name="phid vision twin",
            ir_version=10,
            opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
        )
        path.write_bytes(model.SerializeToString(deterministic=True))
