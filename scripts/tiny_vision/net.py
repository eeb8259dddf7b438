"""The network in torch: a small eye, an encoder over one view's 144 cells, and a small decoder."""

import dataclasses
import itertools
import math

import torch
from scenes import COLOURS, KINDS
from torch import Tensor, nn
from torch.nn import functional

CELLS = 12
VIEW_TOKENS = CELLS * (CELLS + 1)
# The concepts each cell is classified by, with the number of classes ("none" first).
CONCEPTS = {
    "kind": len(KINDS) + 1,
    "colour": len(COLOURS) + 1,
    "column_rank": 4,
    "row_rank": 4,
    "old_kind": len(KINDS) + 1,
    "old_colour": len(COLOURS) + 1,
    "change": 6,
}
# What a neighbour is told by: the kind and the colour, the first two concepts.
LOOKS = CONCEPTS["kind"] + CONCEPTS["colour"]
NOUNS = 4
# A cell holds a thing where this much of it is of some kind.
FOUND = 0.3
# Answer tokens that the hint at the noun foretells.
HINTED = 3


def slot_picks() -> Tensor:
    """(classes, 11) of 0 and 1: which concepts say that a cell belongs to a slot.

    Slots: first to third from the left, first to third from the top, circle, square, triangle,
    lamp, digit.
    """
    starts = dict(zip(CONCEPTS, itertools.accumulate([0, *CONCEPTS.values()]), strict=False))
    picks = torch.zeros(sum(CONCEPTS.values()), 11)
    for rank in range(3):
        picks[starts["column_rank"] + 1 + rank, rank] = 1
        picks[starts["row_rank"] + 1 + rank, 3 + rank] = 1
    for index, kind in enumerate(KINDS):
        slot = 6 + index if index < 3 else (9 if "lamp" in kind else 10)
        picks[starts["kind"] + 1 + index, slot] = 1
    return picks


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of the network."""

    hidden: int = 64
    layers: int = 3
    heads: int = 4
    head_size: int = 32
    feed_forward: int = 192
    encoder_layers: int = 2
    encoder_heads: int = 4
    channels: tuple[int, int, int] = (32, 64, 96)
    image_slots: int = 8
    vocabulary: int = 32064
    context: int = 16384


class Conv(nn.Module):
    """Convolution, batch norm, ReLU; with a residual where the shape allows and it is asked for."""

    def __init__(self, ins: int, outs: int, size: int, stride: int, residual: bool = False) -> None:
        super().__init__()
        padding = 1 if size == 3 else 0
        self.conv = nn.Conv2d(ins, outs, size, stride, padding, bias=False)
        self.norm = nn.BatchNorm2d(outs)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """The activated map."""
        y = self.norm(self.conv(x))
        return functional.relu(y + x if self.residual else y)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of one convolution that does the same in inference."""
        scale = self.norm.weight / torch.sqrt(self.norm.running_var + self.norm.eps)
        weight = self.conv.weight * scale[:, None, None, None]
        return weight, self.norm.bias - self.norm.running_mean * scale


class EncoderLayer(nn.Module):
    """One layer in which every cell of a view sees every other."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.encoder_heads
        self.norm1 = nn.LayerNorm(shape.hidden)
        self.qkv = nn.Linear(shape.hidden, 3 * shape.hidden)
        self.out = nn.Linear(shape.hidden, shape.hidden)
        self.norm2 = nn.LayerNorm(shape.hidden)
        self.up = nn.Linear(shape.hidden, 3 * shape.hidden)
        self.down = nn.Linear(3 * shape.hidden, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """The cells (n, 144, hidden) after attention and feed-forward."""
        n, cells, hidden = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, cells, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        x = x + self.out(mixed.transpose(1, 2).reshape(n, cells, hidden))
        return x + self.down(functional.relu(self.up(self.norm2(x))))


class Eye(nn.Module):
    """Global views to cells, separators and the fixed tokens of an image."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        c1, c2, c3 = shape.channels
        hidden = shape.hidden
        self.convs = nn.ModuleList(
            [
                Conv(3, c1, 7, 7),
                Conv(c1, c1, 3, 1, residual=True),
                Conv(c1, c2, 3, 2),
                Conv(c2, c2, 3, 1, residual=True),
                Conv(c2, c3, 3, 2),
                Conv(c3, c3, 3, 1, residual=True),
                Conv(c3, c3, 3, 1, residual=True),
            ]
        )
        self.project = nn.Linear(c3, hidden)
        self.compare = nn.Linear(c3, hidden, bias=False)
        self.place = nn.Parameter(torch.randn(CELLS * CELLS, hidden) * 0.3)
        self.encoder = nn.ModuleList(EncoderLayer(shape) for _ in range(shape.encoder_layers))
        self.norm = nn.LayerNorm(hidden)
        classes = sum(CONCEPTS.values())
        self.concepts = nn.Linear(hidden, classes)
        self.meaning = nn.Linear(classes, hidden, bias=False)
        self.summary_in = nn.Linear(classes + 2 * hidden, 2 * hidden)
        self.summary_out = nn.Linear(2 * hidden, hidden)
        present = [float(n > 0) for size in CONCEPTS.values() for n in range(size)]
        self.register_buffer("present", torch.tensor(present))
        self.register_buffer("picks", slot_picks())
        steps = torch.arange(CELLS, dtype=torch.float32)
        self.register_buffer("column_steps", steps.expand(1, 1, CELLS, CELLS).contiguous())
        self.register_buffer("row_steps", self.column_steps.transpose(2, 3).contiguous())
        # No cell is "before" the first by one, so the first number, for "no rank", never fits.
        self.register_buffer("rank_numbers", torch.tensor([-9.0, 0.0, 1.0, 2.0]))
        self.row_tag = nn.Parameter(torch.randn(2 * CELLS, hidden) * 0.5)
        self.slot = nn.Linear(classes, hidden, bias=False)
        self.side = nn.Linear(LOOKS, hidden, bias=False)
        self.newline = nn.Parameter(torch.randn(hidden) * 0.3)
        self.crop_cell = nn.Linear(3, hidden)

    def forward(self, pixels: Tensor, previous: Tensor) -> tuple[Tensor, ...]:
        """Cells, separators, crop cells, concept logits and row ends, as `tokens` gives them.

        `pixels` holds normalised global views; view k is compared with view `previous[k]`.
        """
        return self.tokens(self.maps(pixels), pixels, previous)

    def maps(self, pixels: Tensor) -> Tensor:
        """The convolutions' output (n, channels, 12, 12)."""
        x = pixels
        for conv in self.convs:
            x = conv(x)
        return x

    def tokens(self, maps: Tensor, pixels: Tensor, previous: Tensor) -> tuple[Tensor, ...]:
        """What `forward` gives, from the convolutions' output.

        Cells (n, 144, hidden), separators (n, hidden), crop cells (n, 144, hidden), concept
        logits (n, 144, classes) and row ends (n, 24, hidden). A cell's token carries its concepts,
        the separator their sums, and each row's end an object or what lies beside the objects.
        """
        seen = maps.flatten(2).transpose(1, 2)
        cells = self.project(seen) + self.compare(seen - seen[previous]) + self.place
        for layer in self.encoder:
            cells = layer(cells)
        cells = self.norm(cells)
        logits = self.concepts(cells)
        parts = logits.split(list(CONCEPTS.values()), -1)
        shares = torch.cat([part.softmax(-1) for part in parts], -1) * self.present
        shares, things = self.ordered(shares)
        facts = torch.cat([shares.sum(1), cells.mean(1), cells.amax(1)], -1)
        separator = self.summary_out(functional.relu(self.summary_in(facts)))
        mean = functional.avg_pool2d(pixels, 28).flatten(2).transpose(1, 2)
        ends = self.row_ends(things)
        return cells + self.meaning(shares), separator, self.crop_cell(mean), logits, ends

    def ordered(self, shares: Tensor) -> tuple[Tensor, Tensor]:
        """(concepts with exact ranks, the same of the cells that hold a thing, made whole).

        A thing is a peak of "some kind" among its neighbours; its place is the mean around it.
        """
        found = shares[..., : CONCEPTS["kind"]].sum(-1)
        board = found.view(-1, 1, CELLS, CELLS)
        peak = (board >= functional.max_pool2d(board, 3, 1, 1)) & (board > FOUND)
        kept = peak.flatten(1).to(shares.dtype)
        weight = functional.avg_pool2d(board, 3, 1, 1) + 1e-6
        ranks = []
        for steps in (self.column_steps, self.row_steps):
            place = (functional.avg_pool2d(board * steps, 3, 1, 1) / weight).flatten(1)
            before = (place[:, None] < place[:, :, None]).to(shares.dtype)
            rank = before @ kept[..., None]
            ranks.append(functional.relu(1 - (rank - self.rank_numbers).abs()) * kept[..., None])
        looks, changes = shares[..., :LOOKS], shares[..., LOOKS + 8 :]
        whole = (kept / found.clamp_min(FOUND))[..., None]
        things = torch.cat([looks * whole, *ranks, changes * whole], -1)
        return torch.cat([looks, *ranks, changes], -1), things

    def row_ends(self, shares: Tensor) -> Tensor:
        """(n, 24, hidden): three things from the left, five nouns, four sides of each noun.

        The first twelve end the rows of the global view, the others the first rows of the crops.
        """
        slots = (shares @ self.picks).transpose(1, 2) @ shares
        columns, rows, nouns = slots[:, :3], slots[:, 3:6], slots[:, 6 : 6 + NOUNS]
        first_column = LOOKS + 1
        column = nouns[..., first_column : first_column + 3]
        row = nouns[..., first_column + 4 : first_column + 7]
        sides = [
            column[..., 1:] @ columns[:, :2, :LOOKS],
            column[..., :2] @ columns[:, 1:, :LOOKS],
            row[..., 1:] @ rows[:, :2, :LOOKS],
            row[..., :2] @ rows[:, 1:, :LOOKS],
        ]
        things = self.slot(torch.cat([columns, slots[:, 6:]], 1))
        beside = torch.stack(sides, 2)
        nobody = 1 - beside[..., : CONCEPTS["kind"]].sum(-1, keepdim=True)
        beside = self.side(torch.cat([nobody, beside[..., 1:]], -1)).flatten(1, 2)
        return self.newline + self.row_tag + torch.cat([things, beside], 1)


class RootNorm(nn.Module):
    """Root-mean-square norm."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """The input scaled to unit mean square, times a weight."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


def rotary_frequencies(shape: Shape) -> Tensor:
    """Radians a position: half geometric, half zero, so that content matches at any distance."""
    half = shape.head_size // 2
    moving = torch.exp(-torch.arange(half // 2) * math.log(2000.0) / (half // 2 - 1))
    return torch.cat([moving, torch.zeros(half - half // 2)])


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Queries or keys (b, heads, n, size) turned by `angles` (b, n, size / 2)."""
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class DecoderLayer(nn.Module):
    """One pre-norm layer: rotary attention, then a gated feed-forward."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        inner = shape.heads * shape.head_size
        self.heads = shape.heads
        self.norm1 = RootNorm(shape.hidden)
        self.q = nn.Linear(shape.hidden, inner, bias=False)
        self.k = nn.Linear(shape.hidden, inner, bias=False)
        self.v = nn.Linear(shape.hidden, inner, bias=False)
        self.o = nn.Linear(inner, shape.hidden, bias=False)
        self.norm2 = RootNorm(shape.hidden)
        self.gate = nn.Linear(shape.hidden, shape.feed_forward, bias=False)
        self.up = nn.Linear(shape.hidden, shape.feed_forward, bias=False)
        self.down = nn.Linear(shape.feed_forward, shape.hidden, bias=False)

    def first_head_scores(self, x: Tensor, angles: Tensor, bias: Tensor) -> Tensor:
        """Attention scores (b, n, n) of the first head."""
        y, size = self.norm1(x), self.q.out_features // self.heads
        q = rotate((y @ self.q.weight[:size].T)[:, None], angles)
        k = rotate((y @ self.k.weight[:size].T)[:, None], angles)
        return (q @ k.transpose(2, 3) * size**-0.5 + bias)[:, 0]

    def forward(self, x: Tensor, angles: Tensor, bias: Tensor) -> Tensor:
        """Tokens (b, n, hidden) after the layer; `bias` (b, 1, n, n) is added to the scores."""
        b, n, _ = x.shape
        y = self.norm1(x)
        q, k, v = (
            f(y).view(b, n, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        q, k = rotate(q, angles), rotate(k, angles)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.o(mixed.transpose(1, 2).reshape(b, n, -1))
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


def quantise_rows(weight: Tensor, block: int = 32) -> tuple[Tensor, Tensor]:
    """Int4 codes 0..15 and scales of rows cut in blocks: weight = (code - 8) * scale."""
    rows = weight.reshape(weight.shape[0], -1, block)
    scale = (rows.abs().amax(-1, keepdim=True) / 7).clamp_min(1e-8)
    return (torch.round(rows / scale) + 8).clamp(0, 15), scale


class Head(nn.Module):
    """The rows of the language head that are in use, trained as the int4 they will become."""

    def __init__(self, hidden: int, words: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(words, hidden) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits over the words in use."""
        codes, scale = quantise_rows(self.weight.detach())
        hard = ((codes - 8) * scale).view_as(self.weight)
        return x @ (self.weight + (hard - self.weight).detach()).T


class TinyVision(nn.Module):
    """Eye, embedding, decoder and head."""

    def __init__(self, shape: Shape, words: int) -> None:
        super().__init__()
        self.shape = shape
        self.eye = Eye(shape)
        self.embedding = nn.Parameter(torch.randn(words, shape.hidden) * 0.5)
        self.image_index = nn.Parameter(torch.randn(shape.image_slots, shape.hidden) * 0.3)
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(shape.layers))
        self.norm = RootNorm(shape.hidden)
        self.head = Head(shape.hidden, words)
        # Training only: what the question's noun should know after the second layer.
        self.hint = nn.Linear(shape.hidden, HINTED * words)
        self.register_buffer("frequencies", rotary_frequencies(shape))

    def decode(self, x: Tensor, positions: Tensor, bias: Tensor) -> tuple[list[Tensor], Tensor]:
        """The layers' inputs and the final hidden states of tokens at these positions."""
        angles = positions[..., None] * self.frequencies
        states = []
        for layer in self.layers:
            states.append(x)
            x = layer(x, angles, bias)
        return states, self.norm(x)
