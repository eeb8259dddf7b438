"""A whole twin's graphs without its gigabytes: weights that are not there, written nowhere."""

from __future__ import annotations

from typing import Any

import numpy as np


class Unwritten:
    """Weights of the right sizes that take no memory until they are read."""

    def __init__(self, block: int) -> None:
        self._block = block

    def normal(self, *shape: int, deviation: float = 1.0) -> Any:
        return np.zeros(shape, np.float32)

    def near_one(self, size: int) -> Any:
        return np.zeros(size, np.float32)

    def matrix(self, rows: int, columns: int) -> Any:
        blocks = columns // self._block
        codes = np.zeros((rows, blocks, self._block // 2), np.uint8)
        return codes, np.zeros((rows, blocks), "f4")


class Counted:
    """A file that only counts what is written."""

    def __init__(self) -> None:
        self.bytes = 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.bytes += size
        return size

    def tell(self) -> int:
        return self.bytes
