"""Measure an exported tiny phi3v folder through onnxruntime-genai on scenes it was never shown."""

import argparse
import collections
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import cv2
import numpy as np
import onnxruntime_genai as og
import scenes
from frames import chat, encode, stack, transform
from scenes import WIDTH, Scene

SIZES = ((640, 480), (640, 480), (640, 480), (800, 600), (640, 360), (512, 512), (480, 640))
# Training seeds its steps from (seed, step); these scenes come from three numbers.
HELD_OUT = (20261123, 1)
STOCK = 0
# The share of exact answers to questions about one frame, and about two.
WANTED = {1: 0.95, 2: 0.9}

Case = tuple[list[Path], str, str]


class Answerer:
    """A loaded model that answers questions about frames."""

    def __init__(self, folder: Path) -> None:
        self.model = og.Model(str(folder))
        self.tokenizer = og.Tokenizer(self.model)
        self.processor = self.model.create_multimodal_processor()

    def inputs(self, paths: Sequence[Path], question: str, budget: int) -> og.NamedTensors:
        """The generator's inputs, by hand for a crop budget, by the stock processor for 0."""
        prompt = chat(question, len(paths))
        if budget == STOCK:
            images = og.Images.open(*(str(path) for path in paths))
            return self.processor(prompt, images=images)
        frames = [
            transform(cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB), budget)
            for path in paths
        ]
        pixel_values, image_sizes, tokens = stack(frames)
        named = og.NamedTensors()
        named["input_ids"] = encode(self.tokenizer, prompt, [int(n) for n in tokens])
        named["pixel_values"] = pixel_values
        named["image_sizes"] = image_sizes
        named["num_image_tokens"] = tokens
        return named

    def answer(self, paths: Sequence[Path], question: str, budget: int) -> tuple[str, float]:
        """The greedy answer and the seconds from set_inputs to its end."""
        named = self.inputs(paths, question, budget)
        params = og.GeneratorParams(self.model)
        params.set_search_options(max_length=named["input_ids"].shape()[1] + 40, do_sample=False)
        generator = og.Generator(self.model, params)
        started = time.monotonic()
        generator.set_inputs(named)
        ids: list[int] = []
        while not generator.is_done():
            generator.generate_next_token()
            ids.append(int(generator.get_next_tokens()[0]))
        if ids and ids[-1] in (32000, 32001, 32007):
            ids.pop()
        return self.tokenizer.decode(ids).strip(), time.monotonic() - started


def shoot(scene: Scene, size: tuple[int, int], path: Path, rng: np.random.Generator) -> Path:
    """A camera frame of the scene as a JPEG or PNG file."""
    image = scenes.photograph(scenes.render(scene, *size), rng)
    path = path.with_suffix(".jpg" if rng.random() < 0.7 else ".png")
    cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    return path


def single_cases(count: int, asks: int, folder: Path) -> Iterator[Case]:
    """`asks` questions about each of `count` scenes, of different templates where possible."""
    for index in range(count):
        rng = np.random.default_rng((*HELD_OUT, index))
        size = SIZES[rng.integers(len(SIZES))]
        scene = scenes.random_scene(rng, WIDTH * size[1] / size[0])
        path = shoot(scene, size, folder / f"single{index}", rng)
        pairs = scenes.questions(scene)
        for pick in rng.permutation(len(pairs))[:asks]:
            yield [path], *pairs[pick]


def pair_cases(count: int, folder: Path) -> Iterator[Case]:
    """Pairs of frames to ask "What changed?" about, `count` of them."""
    for index in range(count):
        rng = np.random.default_rng((*HELD_OUT, index, 2))
        size = SIZES[rng.integers(len(SIZES))]
        before = scenes.random_scene(rng, WIDTH * size[1] / size[0])
        after, change = scenes.random_change(before, rng)
        first = shoot(before, size, folder / f"pair{index}a", rng)
        yield (
            [first, shoot(after, size, folder / f"pair{index}b", rng)],
            "What changed?",
            change.answer,
        )


def template(question: str, answer: str) -> str:
    """The group a case is counted in."""
    if question == "What changed?":
        words = answer.split()
        return "changed: " + next(
            (w for w in ("added", "removed", "moved", "turned", "switched") if w in words), answer
        )
    for noun in (*scenes.SHAPES, "lamp"):
        question = question.replace(f"the {noun}", "the X").replace(f"{noun}s", "Xs")
    return question


def measure(answerer: Answerer, cases: Sequence[Case], budget: int, show: int) -> dict[str, Any]:
    """Exact matches in all and by template, and the median seconds of an answer."""
    right: collections.Counter[str] = collections.Counter()
    asked: collections.Counter[str] = collections.Counter()
    took = []
    for paths, question, wanted in cases:
        got, seconds = answerer.answer(paths, question, budget)
        took.append(seconds)
        group = template(question, wanted)
        asked[group] += 1
        right[group] += got == wanted
        if got != wanted and show > 0:
            show -= 1
            print(f"  {paths[0].name} {question} wanted={wanted!r} got={got!r}")
    return {
        "budget": budget or "stock",
        "exact": round(sum(right.values()) / max(len(cases), 1), 4),
        "cases": len(cases),
        "median_s": round(float(np.median(took)), 3),
        "by_template": {name: f"{right[name]}/{asked[name]}" for name in sorted(asked)},
    }


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="the exported folder")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--asks", type=int, default=2, help="questions a scene")
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--budgets", type=int, nargs="+", default=[1], help="0: stock processor")
    parser.add_argument("--show", type=int, default=10, help="mistakes to print")
    return parser.parse_args()


def main() -> int:
    """Print one JSON line for each budget and number of frames; 1 if one is less than wanted."""
    args, short = parse_args(), False
    answerer = Answerer(args.model)
    with tempfile.TemporaryDirectory() as name:
        singles = list(single_cases(args.scenes, args.asks, Path(name)))
        pairs = list(pair_cases(args.pairs, Path(name)))
        for budget in args.budgets:
            for frames, cases in ((1, singles), (2, pairs)):
                if cases:
                    figures = measure(answerer, cases, budget, args.show)
                    print(json.dumps({"frames": frames} | figures), flush=True)
                    short |= figures["exact"] < WANTED[frames]
    return int(short)


if __name__ == "__main__":
    sys.exit(main())
