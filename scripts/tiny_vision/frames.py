"""Frames as Phi-3.5-vision wants them: the HD transform, its grid, the generator's inputs."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

SIDE = 336
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
IMAGE_TAG = re.compile(r"<\|image_(\d+)\|>")


@dataclasses.dataclass(frozen=True)
class Grid:
    """How one frame is cut: crops down and across, and where the picture lies once padded."""

    rows: int
    columns: int
    left: int
    top: int
    width: int
    height: int

    @property
    def tokens(self) -> int:
        """Image tokens: a row of each view ends in a line break, a separator lies between them."""
        return (self.rows * self.columns + 1) * 144 + 1 + (self.rows + 1) * 12


def plan(width: int, height: int, budget: int) -> Grid:
    """The grid for a frame of this size and at most `budget` crops."""
    if width < height:
        turned = plan(height, width, budget)
        return Grid(
            turned.columns, turned.rows, turned.top, turned.left, turned.height, turned.width
        )
    ratio = width / height
    columns = 1
    while (columns + 1) * math.ceil((columns + 1) / ratio) <= budget:
        columns += 1
    new_height = int(columns * SIDE / ratio)
    rows = max(1, math.ceil(new_height / SIDE))
    return Grid(rows, columns, 0, (rows * SIDE - new_height) // 2, columns * SIDE, new_height)


def normalise(image: np.ndarray) -> np.ndarray:
    """CLIP-normalised float32 (3, h, w) of a uint8 RGB image (h, w, 3)."""
    return np.ascontiguousarray(((image / np.float32(255) - MEAN) / STD).transpose(2, 0, 1))


def transform(image: np.ndarray, budget: int) -> tuple[np.ndarray, Grid]:
    """Pixel values float32 (crops + 1, 3, 336, 336), the global view first, and the grid."""
    grid = plan(image.shape[1], image.shape[0], budget)
    shrinks = grid.width < image.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    padded = np.full((grid.rows * SIDE, grid.columns * SIDE, 3), 255, np.uint8)
    padded[grid.top : grid.top + grid.height, grid.left : grid.left + grid.width] = cv2.resize(
        image, (grid.width, grid.height), interpolation=method
    )
    pixels = normalise(padded)
    crops = pixels.reshape(3, grid.rows, SIDE, grid.columns, SIDE).transpose(1, 3, 0, 2, 4)
    whole = cv2.resize(pixels.transpose(1, 2, 0), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    return np.concatenate([whole.transpose(2, 0, 1)[None], crops.reshape(-1, 3, SIDE, SIDE)]), grid


def stack(frames: Sequence[tuple[np.ndarray, Grid]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(pixel_values, image_sizes, num_image_tokens) of several frames, padded with zero crops."""
    most = max(len(pixels) for pixels, _ in frames)
    values = np.zeros((len(frames), most, 3, SIDE, SIDE), np.float32)
    for row, (pixels, _) in zip(values, frames, strict=True):
        row[: len(pixels)] = pixels
    sizes = [(grid.rows * SIDE, grid.columns * SIDE) for _, grid in frames]
    return values, np.array(sizes, np.int64), np.array([g.tokens for _, g in frames], np.int64)


def chat(question: str, images: int) -> str:
    """The prompt for one question about `images` frames."""
    tags = "".join(f"<|image_{n}|>\n" for n in range(1, images + 1))
    return f"<|user|>\n{tags}{question}<|end|>\n<|assistant|>\n"


def encode(tokenizer: Any, prompt: str, image_tokens: Sequence[int]) -> np.ndarray:
    """Token ids int32 (1, n); the slots of image k are -k."""
    parts = IMAGE_TAG.split(prompt)
    ids: list[int] = []
    for index, part in enumerate(parts):
        if index % 2:
            ids += [-int(part)] * image_tokens[int(part) - 1]
        else:
            ids += [int(token) for token in tokenizer.encode(part)]
    return np.array([ids], np.int32)
