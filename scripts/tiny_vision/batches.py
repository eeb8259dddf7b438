"""Training batches: rendered views, packed questions with their positions, and per-cell targets."""

import dataclasses
import re
from typing import Any

import cv2
import numpy as np
import scenes
import torch
from frames import MEAN, SIDE, STD, Grid, chat, plan
from net import CELLS, CONCEPTS, VIEW_TOKENS
from scenes import CHANGES, COLOURS, KINDS, WIDTH, Change, Scene
from torch import Tensor

BUDGETS = (1, 1, 1, 4, 6, 9, 16, 16)
ASPECTS = (4 / 3, 4 / 3, 4 / 3, 16 / 9, 1.0, 5 / 4, 3 / 4)
CROP_SAMPLES = 8
CELL_SAMPLES = 28
# The row end that tells of the digit.
DIGIT_END = 7
NOUN = re.compile(r"(circle|square|triangle|lamp|shape)s?")
NOISE = 6
# The share of single-frame prompts whose frame is hidden: the answer is "nothing".
BLIND = 0.05
IGNORED = -100
# An empty cell beside a thing's centre.
BESIDE = -1


class Words:
    """The tokens in use: token id to row and back, with the encodings of every text met."""

    def __init__(self, tokenizer: Any, seed: int, scenes_read: int = 20000) -> None:
        self.tokenizer = tokenizer
        self.texts: dict[str, list[int]] = {}
        self.nouns: dict[str, int] = {}
        self.lead = self._encode("<|user|>\n")
        self.between = self._encode("\n")
        rng = np.random.default_rng(seed)
        for _ in range(scenes_read):
            scene = scenes.random_scene(rng)
            for question, answer in scenes.questions(scene):
                self.pair(question, answer)
            self.pair("What changed?", scenes.random_change(scene, rng)[1].answer)
        used = {token for ids in self.texts.values() for token in ids}
        self.ids = sorted(used)
        self.row = {token: row for row, token in enumerate(self.ids)}

    def _encode(self, text: str) -> list[int]:
        if text not in self.texts:
            self.texts[text] = [int(token) for token in self.tokenizer.encode(text)]
        return self.texts[text]

    def pair(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Token ids of what follows the image, and of the answer with its end."""
        prompt = chat(question, 1).split("<|image_1|>")[1]
        start = self._encode(prompt)
        return start, self._encode(prompt + answer + "<|end|>")[len(start) :]

    def noun_at(self, question: str) -> int:
        """The place of the question's noun in what follows the image; -1 if it has none."""
        if question not in self.nouns:
            found = NOUN.search(question)
            text = "\n" + question[: found.end()] if found else ""
            self.nouns[question] = len(self.tokenizer.encode(text)) - 1 if found else -1
        return self.nouns[question]

    def rows(self, ids: list[int]) -> list[int]:
        """Embedding rows of token ids."""
        return [self.row[token] for token in ids]


@dataclasses.dataclass
class View:
    """One rendered global view: its picture, token count and grid, and its cells' targets."""

    pixels: np.ndarray
    crop_tokens: int
    row_length: int
    columns: int
    down: int
    cells: dict[str, np.ndarray]


@dataclasses.dataclass
class Prompt:
    """One prompt: the sampled crop cells, the prefix's positions and weights, the questions.

    `start` is the position of each question's first token.
    """

    crop_choice: list[int]
    positions: list[int]
    weights: list[float]
    start: int
    questions: list[tuple[list[int], list[int]]]
    nouns: list[int]
    cell_choice: list[int]
    noun_guides: list[int]
    list_guides: list[list[int]]


@dataclasses.dataclass
class Batch:
    """Tensors of one step; `previous` and `images` index views, one row of the rest per prompt."""

    pixels: Tensor
    previous: Tensor
    cells: dict[str, Tensor]
    images: Tensor
    crop_choice: Tensor
    cell_choice: Tensor
    nouns: Tensor
    noun_guides: Tensor
    list_guides: Tensor
    positions: Tensor
    weights: Tensor
    text: Tensor
    targets: Tensor
    noise: Tensor
    lead: Tensor
    between: Tensor


def render_view(
    scene: Scene, width: int, height: int, budget: int, rng: np.random.Generator
) -> np.ndarray:
    """The 336 x 336 global view of the scene's frame, as uint8 RGB."""
    grid = plan(width, height, budget)
    across = round(grid.width / grid.columns)
    down = round(grid.height / grid.rows)
    if rng.random() < 0.25:
        image = scenes.photograph(scenes.render(scene, width, height), rng)
        methods = (cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_CUBIC)
        image = cv2.resize(image, (across, down), interpolation=methods[rng.integers(3)])
    else:
        image = scenes.photograph(scenes.render(scene, across, down), rng)
    if rng.random() < 0.2:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(50, 95))]
        image = cv2.imdecode(cv2.imencode(".jpg", image, quality)[1], cv2.IMREAD_COLOR)
    view = np.full((SIDE, SIDE, 3), 255, np.uint8)
    left, top = grid.left // grid.columns, grid.top // grid.rows
    view[top : top + down, left : left + across] = image
    return view


def cell_targets(
    scene: Scene, grid: Grid, change: Change | None, old: Scene
) -> dict[str, np.ndarray]:
    """For each task the class of each of the 144 cells; BESIDE by a centre, else 0."""
    maps = {name: np.zeros((CELLS, CELLS), np.int64) for name in CONCEPTS}

    def mark(thing: scenes.Thing, values: dict[str, int]) -> None:
        x = (grid.left + thing.x / WIDTH * grid.width) / grid.columns / SIDE * CELLS
        y = (grid.top + thing.y / scene.height * grid.height) / grid.rows / SIDE * CELLS
        row, column = min(int(y), CELLS - 1), min(int(x), CELLS - 1)
        for name, value in values.items():
            near = maps[name][max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            near[near == 0] = BESIDE
            maps[name][row, column] = value

    def looks(thing: scenes.Thing) -> tuple[int, int]:
        return KINDS.index(thing.kind) + 1, COLOURS.index(thing.colour) + 1 if thing.shape else 0

    rows = sorted(scene.things, key=lambda thing: thing.y)
    for rank, thing in enumerate(scene.from_left()):
        kind, colour = looks(thing)
        values = {"kind": kind, "colour": colour, "column_rank": rank + 1}
        mark(thing, values | {"row_rank": rows.index(thing) + 1})
    for thing in old.things:
        kind, colour = looks(thing)
        mark(thing, {"old_kind": kind, "old_colour": colour})
    if change is not None and change.name != "nothing":
        thing = change.after or change.before
        assert thing is not None
        mark(thing, {"change": CHANGES.index(change.name) + 1})
    return {name: target.reshape(-1) for name, target in maps.items()}


def make_views(
    story: list[tuple[Scene, Change | None]], aspect: float, rng: np.random.Generator
) -> list[View]:
    """The views of the successive scenes of one story, in one frame size and crop budget."""
    width = int(rng.choice((320, 480, 640)))
    height = round(width / aspect)
    budget = int(rng.choice(BUDGETS))
    grid = plan(width, height, budget)
    row_length = grid.columns * CELLS + 1
    views = []
    for index, (scene, change) in enumerate(story):
        old = story[max(index - 1, 0)][0]
        views.append(
            View(
                render_view(scene, width, height, budget, rng),
                grid.rows * CELLS * row_length,
                row_length,
                grid.columns,
                grid.rows,
                cell_targets(scene, grid, change, old),
            )
        )
    return views


def make_batch(
    words: Words, prompts: int, frames: int, asks: int, rng: np.random.Generator
) -> Batch:
    """A batch of `prompts` prompts about `frames` frames each, with `asks` questions in each.

    A prompt is: noise (a stand-in for other text before the user's), lead, then per image a few
    sampled crop tokens, the separator and the global view, then the questions side by side: each
    sees the frames and itself. A sampled crop token weighs as many as it stands for.
    """
    views: list[View] = []
    rows: list[Prompt] = []
    for _ in range(prompts):
        aspect = float(rng.choice(ASPECTS))
        scene = scenes.random_scene(rng, WIDTH / aspect)
        story: list[tuple[Scene, Change | None]] = [(scene, None)]
        if frames == 2:
            story.append(scenes.random_change(scene, rng))
            pairs = [("What changed?", story[1][1].answer)]  # type: ignore[union-attr]
        else:
            pairs = choose(scenes.questions(scene), asks, rng)
        own = make_views(story, aspect, rng)
        rows.append(prompt_row(words, own, pairs, rng))
        views += own
    text, targets, positions = pack_questions(rows)
    order = np.arange(len(views)).reshape(prompts, frames)
    previous = np.maximum(order - 1, order[:, :1]).reshape(-1)
    pixels = np.stack([view.pixels for view in views])
    return Batch(
        torch.from_numpy(pixels),
        torch.from_numpy(previous),
        {n: torch.from_numpy(np.stack([view.cells[n] for view in views])) for n in CONCEPTS},
        torch.from_numpy(order),
        torch.tensor([row.crop_choice for row in rows]).view(prompts, frames, CROP_SAMPLES),
        torch.tensor([row.cell_choice for row in rows]).view(prompts, frames, -1),
        torch.tensor([row.nouns for row in rows]),
        torch.tensor([row.noun_guides for row in rows]),
        torch.from_numpy(pack_guides(rows, text.shape)),
        torch.from_numpy(positions),
        torch.tensor([row.weights for row in rows], dtype=torch.float32),
        torch.from_numpy(text),
        torch.from_numpy(targets),
        torch.from_numpy(rng.standard_normal((prompts, NOISE, 64), np.float32) * 0.5),
        torch.tensor(words.rows(words.lead)),
        torch.tensor(words.rows(words.between)),
    )


def pack_questions(rows: list[Prompt]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(text, targets), both (prompts, asks, longest), and positions (prompts, all tokens)."""
    asks = len(rows[0].questions)
    longest = max(len(text) for row in rows for text, _ in row.questions)
    text = np.zeros((len(rows), asks, longest), np.int64)
    targets = np.full((len(rows), asks, longest), IGNORED, np.int64)
    positions = np.zeros((len(rows), len(rows[0].positions) + asks * longest), np.float32)
    for index, row in enumerate(rows):
        after = np.tile(row.start + np.arange(longest), asks)
        positions[index] = np.concatenate([row.positions, after])
        for ask, (ids, answer) in enumerate(row.questions):
            text[index, ask, : len(ids)] = ids
            targets[index, ask, len(ids) - len(answer) - 1 : len(ids) - 1] = answer
    return text, targets, positions


def choose(
    pairs: list[tuple[str, str]], asks: int, rng: np.random.Generator
) -> list[tuple[str, str]]:
    """`asks` of the questions: each at most once while they last, counts a little rarer."""
    rarer = {"How": 0.35, "Describe": 1.6}
    weights = np.array([rarer.get(question.split()[0], 1.0) for question, _ in pairs])
    picked = rng.choice(len(pairs), min(asks, len(pairs)), replace=False, p=weights / weights.sum())
    return [pairs[picked[k % len(picked)]] for k in range(asks)]


def prompt_row(
    words: Words, views: list[View], pairs: list[tuple[str, str]], rng: np.random.Generator
) -> Prompt:
    """One prompt about these views, at its true positions."""
    shift = int(rng.integers(NOISE, 150)) if rng.random() < 0.15 else 0
    weight = float(np.log(shift / NOISE)) if shift else -1e9
    positions = [int(p) for p in np.sort(rng.integers(0, max(shift, 1), NOISE))]
    weights = [weight] * NOISE
    positions += [shift + k for k in range(len(words.lead))]
    weights += [0.0] * len(words.lead)
    at = shift + len(words.lead)
    blind = len(views) == 1 and rng.random() < BLIND
    if blind:
        pairs = [(question, "nothing") for question, _ in pairs]
    choices: list[int] = []
    cell_choice: list[int] = []
    for index, view in enumerate(views):
        if index:
            positions += [at + k for k in range(len(words.between))]
            weights += [0.0] * len(words.between)
            at += len(words.between)
        chosen = np.sort(rng.integers(0, view.crop_tokens, CROP_SAMPLES))
        positions += [at + (row + 1) * view.row_length - 1 for row in range(CELLS)]
        weights += [0.0] * CELLS
        positions += [at + int(c) for c in chosen]
        weights += [float(np.log(view.crop_tokens / CROP_SAMPLES))] * CROP_SAMPLES
        kept, kept_weights = sample_view(view, rng)
        at += view.crop_tokens
        positions += [at, *(at + 1 + k for k in kept)]
        weights += [0.0, *kept_weights]
        at += 1 + VIEW_TOKENS
        cell_choice += kept
        choices += [_crop_cell(view, int(c)) for c in chosen]
    encoded, nouns, noun_guides, list_guides = [], [], [], []
    ends = end_indices(len(words.lead), cell_choice)
    for question, answer in pairs:
        start, end = words.pair(question, answer)
        start = start[len(words.between) :] if blind else start
        noun = words.noun_at(question)
        nouns.append(noun - len(words.between) if blind and noun >= 0 else noun)
        guided = not blind and len(views) == 1
        noun_guides.append(ends.get(noun_end(question), -1) if guided else -1)
        guide: list[int] = []
        if guided and question.startswith("Describe"):
            guide = list_ends(words, len(start), end, ends)
        elif guided and "digit" in question:
            guide = [-1] * (len(start) - 1) + [ends[DIGIT_END]] * len(end)
        list_guides.append(guide)
        encoded.append((words.rows(start + end), words.rows(end)))
    if blind:
        at = shift + len(words.lead)
        image = CELLS + CROP_SAMPLES + 1 + len(cell_choice)
        weights[-image:] = [-1e9] * image
    return Prompt(
        choices, positions, weights, at, encoded, nouns, cell_choice, noun_guides, list_guides
    )


def end_indices(lead: int, cell_choice: list[int]) -> dict[int, int]:
    """Where in the sequence each of the first frame's 24 row ends is."""
    base = NOISE + lead
    found = {CELLS + row: base + row for row in range(CELLS)}
    for index, place in enumerate(cell_choice[: CELL_SAMPLES + CELLS]):
        if place % (CELLS + 1) == CELLS:
            found[place // (CELLS + 1)] = base + CELLS + CROP_SAMPLES + 1 + index
    return found


def noun_end(question: str) -> int:
    """The row end that tells what the question's noun should know; -1 if none does."""
    found = NOUN.search(question)
    nouns = ("circle", "square", "triangle", "lamp")
    if found is None or found[1] not in nouns:
        return -1
    noun = nouns.index(found[1])
    sides = ("left of", "right of", "above", "below")
    for side, name in enumerate(sides):
        if name in question:
            return 8 + 4 * noun + side
    return 3 + noun


def list_ends(words: Words, start: int, answer: list[int], ends: dict[int, int]) -> list[int]:
    """For each token, the row end of the thing that the next one must name; -1 for none."""
    breaks = {words.tokenizer.encode("a, a and a")[k] for k in (1, 3)}
    thing, guides = 0, [-1] * (start - 1)
    for token in answer:
        thing += token in breaks or token == answer[-1]
        guides.append(ends[thing] if thing < 3 else -1)
    return guides


def pack_guides(rows: list[Prompt], shape: tuple[int, ...]) -> np.ndarray:
    """(prompts, asks, longest): the guides of descriptions, -1 elsewhere."""
    guides = np.full(shape, -1, np.int64)
    for index, row in enumerate(rows):
        for ask, guide in enumerate(row.list_guides):
            guides[index, ask, : len(guide)] = guide
    return guides


def sample_view(view: View, rng: np.random.Generator) -> tuple[list[int], list[float]]:
    """Places 0..155 in the global view's tokens, in order, and their log weights.

    All row ends, all things' centres and some other cells, which weigh for the rest.
    """
    busy = np.any([target > 0 for target in view.cells.values()], axis=0)
    rest = np.flatnonzero(~busy)
    some = rng.choice(rest, CELL_SAMPLES - int(busy.sum()), replace=False)
    log_weight = float(np.log(len(rest) / len(some)))
    weight = {int(cell) + int(cell) // CELLS: log_weight for cell in some}
    weight |= {int(cell) + int(cell) // CELLS: 0.0 for cell in np.flatnonzero(busy)}
    weight |= {row * (CELLS + 1) + CELLS: 0.0 for row in range(CELLS)}
    kept = sorted(weight)
    return kept, [weight[place] for place in kept]


def _crop_cell(view: View, token: int) -> int:
    """The global cell that a crop token lies in, or 144 for a newline."""
    row, column = divmod(token, view.row_length)
    if column == view.row_length - 1:
        return CELLS * CELLS
    return row // view.down * CELLS + column // view.columns


def normalised(pixels: Tensor) -> Tensor:
    """CLIP-normalised float views (n, 3, 336, 336) of uint8 RGB ones."""
    # Whole rows at once: over the three channels alone torch takes ten times as long.
    scale = torch.from_numpy(1 / (255 * STD)).repeat(pixels.shape[2])
    shift = torch.from_numpy(MEAN / STD).repeat(pixels.shape[2])
    values = pixels.flatten(2).float().mul_(scale).sub_(shift)
    return values.view(pixels.shape).permute(0, 3, 1, 2)
