"""The sizes of Phi-3.5-vision, and of smaller models of the same build."""

from dataclasses import dataclass

SIDE = 336  # pixels of a view
PATCH = 14  # pixels of a CLIP patch
PATCHES = SIDE // PATCH  # along a side of a view
CELLS = PATCHES // 2  # image tokens along a side of a view: patches are merged two by two


@dataclass(frozen=True)
class Shape:
    """A phi3v model's sizes; the defaults are Phi-3.5-vision's.

    `clip_layers` is one less than CLIP ViT-L/14-336 has: the last is not used, and its export
    leaves it out.
    """

    clip_layers: int = 23
    clip_width: int = 1024
    clip_heads: int = 16
    clip_inner: int = 4096
    layers: int = 32
    width: int = 3072
    heads: int = 32
    inner: int = 8192
    vocabulary: int = 32064
    context: int = 131072
    short_context: int = 4096

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def merged(self) -> int:
        """The width of a cell: four patches side by side."""
        return 4 * self.clip_width
