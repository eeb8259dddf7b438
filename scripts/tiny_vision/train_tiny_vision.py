"""Train the tiny phi3v model from nothing and export it; goes on from its own checkpoint."""

import argparse
import dataclasses
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import onnxruntime_genai as og
import torch
from batches import IGNORED, Batch, Words, make_batch, normalised
from export import export
from net import CELLS, CONCEPTS, HINTED, Shape, TinyVision
from torch import Tensor
from torch.nn import functional

NEVER = -1e9


def image_tokens(net: TinyVision, batch: Batch, seen: Sequence[Tensor]) -> list[Tensor]:
    """Per frame, its tokens (prompts, crop row ends + crops + separator + view, hidden)."""
    cells, separators, crops, _, ends = seen
    newline = net.eye.newline
    per_frame = []
    for frame in range(batch.images.shape[1]):
        views = batch.images[:, frame]
        prompts, hidden = len(views), newline.shape[0]
        table = torch.cat([crops[views], newline.expand(prompts, 1, hidden)], 1)
        choice = batch.crop_choice[:, frame, :, None].expand(-1, -1, hidden)
        grid = cells[views].view(prompts, CELLS, CELLS, hidden)
        whole = torch.cat([grid, ends[views, :CELLS, None]], 2).flatten(1, 2)
        kept = batch.cell_choice[:, frame, :, None].expand(-1, -1, hidden)
        whole = whole.gather(1, kept)
        crop_ends, separator = ends[views, CELLS:], separators[views][:, None]
        tokens = torch.cat([crop_ends, table.gather(1, choice), separator, whole], 1)
        per_frame.append(tokens + net.image_index[frame])
    return per_frame


def score_bias(batch: Batch, prefix: int) -> Tensor:
    """(prompts, 1, n, n) added to the attention scores: who sees whom, and sampling weights."""
    prompts, asks, length = batch.text.shape
    n = prefix + asks * length
    group = torch.cat([torch.zeros(prefix), 1 + torch.arange(asks * length) // length])
    order = torch.arange(n)
    visible = (order[:, None] >= order) & ((group == 0) | (group[:, None] == group))
    keys = torch.cat([batch.weights, torch.zeros(prompts, asks * length)], 1)
    bias = torch.where(visible, 0.0, NEVER)[None] + keys[:, None]
    # A masked noise token still sees itself, so that no row of scores is empty.
    return bias.masked_fill(torch.eye(n, dtype=torch.bool), 0.0)[:, None]


def answer_loss(
    net: TinyVision, batch: Batch, seen: Sequence[Tensor]
) -> tuple[Tensor, Tensor, float]:
    """Cross-entropy of the answers, the hints' loss, and the share of answers right throughout."""
    prompts, asks, length = batch.text.shape
    frames = image_tokens(net, batch, seen)
    lead = net.embedding[batch.lead].expand(prompts, -1, -1)
    between = net.embedding[batch.between].expand(prompts, -1, -1)
    parts = [batch.noise, lead, frames[0]]
    for frame in frames[1:]:
        parts += [between, frame]
    prefix = sum(part.shape[1] for part in parts)
    parts.append(net.embedding[batch.text].flatten(1, 2))
    bias = score_bias(batch, prefix)
    states, hidden = net.decode(torch.cat(parts, 1), batch.positions, bias)
    hidden = hidden[:, prefix:].reshape(prompts, asks, length, -1)
    hint = hint_loss(net, batch, states[2][:, prefix:].reshape(prompts, asks, length, -1))
    hint = hint + guide_loss(net, batch, states, bias, prefix)
    wanted = batch.targets != IGNORED
    logits, targets = net.head(hidden[wanted]), batch.targets[wanted]
    wrong = torch.zeros(wanted.shape, dtype=torch.bool)
    wrong[wanted] = logits.argmax(-1) != targets
    loss = functional.cross_entropy(logits, targets)
    return loss, hint, 1 - wrong.any(-1).float().mean().item()


def hint_loss(net: TinyVision, batch: Batch, middle: Tensor) -> Tensor:
    """Cross-entropy of the first answer tokens, read at the question's noun."""
    asked = batch.nouns >= 0
    if not asked.any():
        return middle.new_zeros(())
    at = batch.nouns[asked][:, None, None].expand(-1, 1, middle.shape[-1])
    nouns = middle[asked].gather(1, at)[:, 0]
    logits = net.hint(nouns).view(len(nouns), HINTED, -1)
    targets = batch.targets[asked]
    first = (targets != IGNORED).int().argmax(-1, keepdim=True)
    place = first + torch.arange(HINTED)
    targets = functional.pad(targets, (0, HINTED), value=IGNORED).gather(1, place)
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def guide_loss(
    net: TinyVision, batch: Batch, states: list[Tensor], bias: Tensor, prefix: int
) -> Tensor:
    """Cross-entropy of where first heads look: a noun's in layer 2, an answer's in layer 3.

    The noun looks at the row end that knows; the answer looks at the noun, or, in a description,
    at the thing whose turn it is.
    """
    prompts, asks, length = batch.text.shape
    angles = batch.positions[..., None] * net.frequencies
    nouns = torch.full((prompts, asks, length), -1)
    nouns.scatter_(2, batch.nouns.clamp_min(0)[..., None], batch.noun_guides[..., None])
    own = prefix + length * torch.arange(asks)[:, None] + batch.nouns[..., None]
    reads_noun = (batch.targets != IGNORED) & (batch.nouns >= 0)[..., None]
    last = torch.where(reads_noun, own, batch.list_guides)
    total = bias.new_zeros(())
    for layer, guides in ((1, nouns), (2, last)):
        scores = net.layers[layer].first_head_scores(states[layer], angles, bias)
        flat = guides.flatten(1)
        if (flat >= 0).any():
            logits = scores[:, prefix:][flat >= 0]
            total = total + functional.cross_entropy(logits, flat[flat >= 0])
    return total


def cell_loss(batch: Batch, logits: Tensor) -> Tensor:
    """Mean over the concepts of the loss in and beside things' centres plus that elsewhere.

    A centre and the cells beside it weigh the same: a thing between two cells is half in each.
    """
    total = logits.new_zeros(())
    for name, part in zip(CONCEPTS, logits.split(list(CONCEPTS.values()), -1), strict=True):
        target = batch.cells[name]
        for chosen, weight in ((target != 0, 3.0), (target == 0, 1.0)):
            if chosen.any():
                wanted = target[chosen].clamp_min(0)
                total = total + weight * functional.cross_entropy(part[chosen], wanted)
    return total / len(CONCEPTS)


def train_step(
    net: TinyVision, words: Words, sizes: tuple[int, int, int], rng: np.random.Generator
) -> tuple[Tensor, dict[str, float]]:
    """The loss of one step over single-frame and two-frame prompts, and figures for the log."""
    singles, pairs, asks = sizes
    one = make_batch(words, singles, 1, asks, rng)
    two = make_batch(words, pairs, 2, 1, rng)
    pixels = normalised(torch.cat([one.pixels, two.pixels]))
    previous = torch.cat([one.previous, two.previous + len(one.pixels)])
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(net.eye.convs.training):
        maps = net.eye.maps(pixels)
    seen = net.eye.tokens(maps.float(), pixels, previous)
    cut = len(one.pixels)
    of_one, of_two = [part[:cut] for part in seen], [part[cut:] for part in seen]
    loss_one, hint, right_one = answer_loss(net, one, of_one)
    loss_two, _, right_two = answer_loss(net, two, of_two)
    loss_cells = cell_loss(one, of_one[3]) + cell_loss(two, of_two[3])
    figures = {
        "one": loss_one.item(),
        "two": loss_two.item(),
        "hint": hint.item(),
        "cells": loss_cells.item(),
        "right_one": right_one,
        "right_two": right_two,
    }
    return loss_one + loss_two + hint + 0.5 * loss_cells, figures


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the peak."""
    warm = min(1.0, (step + 1) / 100)
    return peak * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1))))


def load_words(net: TinyVision, tokenizer: Path, scratch: Path, seed: int) -> Words:
    """The words in use, by the runtime's own tokenizer (it needs a whole model folder)."""
    export(net, list(range(net.embedding.shape[0])), tokenizer, scratch, seed)
    return Words(og.Tokenizer(og.Model(str(scratch))), seed)


def averaged(net: TinyVision, average: dict[str, Tensor], decay: float) -> None:
    """Move the running average of the weights towards the net's."""
    for name, value in net.state_dict().items():
        if value.dtype.is_floating_point:
            average[name].lerp_(value, 1 - decay)
        else:
            average[name].copy_(value)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stretch of training with a learning rate of its own, from a warm-up down to little."""

    name: str
    steps: int
    rate: float
    singles: int  # single-frame prompts a step
    pairs: int  # two-frame prompts a step
    asks: int  # questions in a single-frame prompt
    convolutions: bool  # trained too; else as they are


# First everything at once; then, when the convolutions see well enough, the rest of it on more
# questions, at a rate that settles it.
STAGES = (
    Stage("all", 4000, 3e-3, 24, 16, 4, convolutions=True),
    Stage("words", 2000, 1.5e-3, 24, 24, 6, convolutions=False),
)


def stage_at(step: int) -> tuple[Stage, int] | None:
    """The stage that this step of the whole training lies in, and its number there."""
    for stage in STAGES:
        if step < stage.steps:
            return stage, step
        step -= stage.steps
    return None


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="folder of the Phi-3 tokenizer"
    )
    parser.add_argument("--work", type=Path, default=Path("work"), help="checkpoint and log")
    parser.add_argument("--out", type=Path, default=Path("tiny-phi3v"), help="the exported folder")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=250)
    return parser.parse_args()


def main() -> None:
    """Train, log, save and export."""
    args = parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    words = load_words(TinyVision(Shape(), 8), args.tokenizer, args.work / "untrained", args.seed)
    # On x86 the bfloat16 convolutions are four times as fast in this layout.
    net = TinyVision(Shape(), len(words.ids)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), STAGES[0].rate, (0.9, 0.98), weight_decay=0.01)
    average = {name: value.clone() for name, value in net.state_dict().items()}
    checkpoint, step, spent_s = args.work / "checkpoint.pt", 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        average, step, spent_s = saved["average"], saved["step"], saved["spent_s"]
    print(
        f"words={len(words.ids)} parameters={sum(p.numel() for p in net.parameters())}", flush=True
    )

    def save() -> None:
        state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
        torch.save(state | {"step": step, "spent_s": spent_s}, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").replace(checkpoint)
        smooth = TinyVision(Shape(), len(words.ids))
        smooth.load_state_dict(average)
        export(smooth, words.ids, args.tokenizer, args.out, args.seed)

    sums: dict[str, float] = {}
    started = time.monotonic()
    while (now_in := stage_at(step)) is not None:
        stage, at = now_in
        net.eye.convs.train(stage.convolutions)
        rng = np.random.default_rng((args.seed, step))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(at, stage.steps, stage.rate)
        loss, figures = train_step(net, words, (stage.singles, stage.pairs, stage.asks), rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        step += 1
        averaged(net, average, min(0.995, (step + 1) / (step + 10)))
        for name, value in figures.items():
            sums[name] = sums.get(name, 0.0) + value
        if step % 25 == 0:
            now = time.monotonic()
            spent_s, started = spent_s + now - started, now
            text = " ".join(f"{name}={value / 25:.3f}" for name, value in sums.items())
            print(f"stage={stage.name} step={step} spent_s={spent_s:.0f} {text}", flush=True)
            sums = {}
        if step % args.save_every == 0:
            save()
    save()


if __name__ == "__main__":
    main()
