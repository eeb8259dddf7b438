"""Make a geometry twin of Phi-3.5-vision: its graphs and sizes with random weights.

It costs what the official CPU build (int4, block 32, accuracy level 4) costs, in time, memory and
disk, and so tells what a picture costs on a device. It has learnt nothing: its answers are noise.
3.2 GB, made in half a minute or so with 1 GB of memory; nothing is fetched, and no torch is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import embedding
import text
import vision
from graph import Graph, Weights
from shape import Shape

from phid.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "tests" / "models" / "tiny-phi3v"
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "processor_config.json",
)
STEM = "phi-3.5-v-instruct"  # the official files' names begin with it
ENDS = [32007, 32001, 32000]  # <|end|>, <|assistant|>, <|endoftext|>
ROOM_BYTES = 3_400_000_000
CARD = """\
# A geometry twin of Phi-3.5-vision

The graphs and sizes of the official int4 CPU build, with random weights, made by
scripts/make-vision-twin. It costs what the real model costs and its answers are noise.
"""

Report = Callable[[str, float | None], None]
Build = Callable[[Graph, Callable[[float], None]], None]


def make(folder: Path, shape: Shape, seed: int, report: Report, *, half: bool = False) -> None:
    """Put the whole model in place of `folder`, which is not there; nothing half-made stays."""
    weights = Weights(seed)
    with whole(folder, COPIED, CARD, genai_config(shape)) as work:

        def write_part(part: str, build: Build) -> None:
            write(work / f"{STEM}-{part}.onnx", build, report, half=half)

        write_part("vision", lambda g, done: vision.build(g, shape, weights, done))
        write_part("embedding", lambda g, _: embedding.build(g, shape, weights))
        write_part("text", lambda g, done: text.build(g, shape, weights, ENDS, done))


@contextmanager
def whole(
    folder: Path, copied: tuple[str, ...], card: str, config: dict[str, Any]
) -> Iterator[Path]:
    """A folder to put the graphs into, which becomes `folder` with what else a model needs."""
    work = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(work, ignore_errors=True)  # a killed run left it
    work.mkdir(parents=True)
    try:
        yield work
        for name in copied:
            shutil.copyfile(TOKENIZER / name, work / name)
        (work / "README.md").write_text(card, encoding="utf-8")
        (work / "genai_config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write(path: Path, build: Build, report: Report, *, half: bool = False) -> None:
    """Write a graph, and its weights to a file beside it."""
    location = f"{path.name}.data"
    with path.with_name(location).open("wb") as data:
        graph = Graph(path.stem.rpartition("-")[2], data, location, half=half)
        build(graph, lambda done: report(f"writing {path.name}", done))
    graph.save(path)
    report(f"writing {path.name}", 1)


def genai_config(shape: Shape) -> dict[str, Any]:
    """The folder's genai_config.json."""
    caches = {
        f"{when}_{part}_names": f"{stem}.%d.{part}"
        for when, stem in (("past", "past_key_values"), ("present", "present"))
        for part in ("key", "value")
    }
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": f"{STEM}-text.onnx",
        "head_size": shape.head_size,
        "hidden_size": shape.width,
        "inputs": {name: name for name in ("inputs_embeds", "attention_mask")}
        | {key: name for key, name in caches.items() if key.startswith("past")},
        "outputs": {"logits": "logits"}
        | {key: name for key, name in caches.items() if key.startswith("present")},
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.heads,
    }
    model = {
        "bos_token_id": 1,
        "context_length": shape.context,
        "decoder": decoder,
        "embedding": {
            "filename": f"{STEM}-embedding.onnx",
            "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
            "outputs": {"inputs_embeds": "inputs_embeds"},
        },
        "vision": {
            "filename": f"{STEM}-vision.onnx",
            "inputs": {"pixel_values": "pixel_values", "image_sizes": "image_sizes"},
            "outputs": {"image_features": "image_features"},
        },
        "eos_token_id": ENDS,
        "pad_token_id": 32000,
        "type": "phi3v",
        "vocab_size": shape.vocabulary,
    }
    search = {
        "do_sample": False,
        "max_length": shape.context,
        "num_beams": 1,
        "past_present_share_buffer": True,
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 1.0,
    }
    return {"model": model, "search": search}


def default_folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "phid" / "twins" / "phi-3.5-vision"


def parser(prog: str, says: str | None, name: str) -> argparse.ArgumentParser:
    """What a maker is told on its command line."""
    made = argparse.ArgumentParser(
        prog=prog, description=says, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=default_folder().with_name(name),
        metavar="FOLDER",
        help="where to put it (default: %(default)s)",
    )
    made.add_argument("--float16", action="store_true", help="as a build for CUDA has it")
    made.add_argument("--seed", type=int, default=0, help="of the weights (default: 0)")
    return made


def run(folder: Path, room_bytes: int, make_it: Callable[[Path], None]) -> int:
    """Make the twin unless it is there: the exit status."""
    folder = folder.absolute()
    if folder.exists():
        print(f"{folder} is there already: remove it to have it made anew", file=sys.stderr)
        return 0 if (folder / "genai_config.json").is_file() else 1
    folder.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder.parent).free < room_bytes:
        sys.exit(f"the twin needs {room_bytes / 1e9:.1f} GB free in {folder.parent}")
    make_it(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 1e9:.2f} GB")
    return 0


def main() -> int:
    options = parser("scripts/make-vision-twin", __doc__, "phi-3.5-vision").parse_args()
    return run(
        options.folder,
        ROOM_BYTES,
        lambda folder: make(folder, Shape(), options.seed, Progress(), half=options.float16),
    )


if __name__ == "__main__":
    sys.exit(main())
