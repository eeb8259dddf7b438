"""Make a geometry twin of Phi-3.5-mini: its graph and sizes with random weights.

It costs what a CPU build of that model costs (int4, accuracy level 4), in time, memory and disk,
and so tells how fast a device would decode. It has learnt nothing: its answers are noise. 2.4 to
2.8 GB, made in half a minute or so with 1 GB of memory; nothing is fetched, and no torch is needed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import text
from graph import Weights
from make_vision_twin import COPIED, ENDS, Report, genai_config, parser, run, whole, write
from shape import Shape

from phid.progress import Progress

ROOM_BYTES = 3_000_000_000
CARD = """\
# A geometry twin of Phi-3.5-mini

The graph and sizes of an int4 CPU build, with random weights, made by scripts/make-text-twin.
It costs what the real model costs and its answers are noise.
"""


def make(
    folder: Path, shape: Shape, block: int, seed: int, report: Report, *, half: bool = False
) -> None:
    """Put the whole model in place of `folder`, which is not there; nothing half-made stays."""
    weights = Weights(seed, block)
    copied = tuple(name for name in COPIED if name != "processor_config.json")
    with whole(folder, copied, CARD, text_config(shape)) as work:
        write(
            work / "model.onnx",
            lambda g, done: text.build(g, shape, weights, ENDS, done, embeds=True),
            report,
            half=half,
        )


def text_config(shape: Shape) -> dict[str, Any]:
    """The folder's genai_config.json: the vision model's, without what looks."""
    config = genai_config(shape)
    model = config["model"]
    del model["vision"], model["embedding"]
    model["type"] = "phi3"
    decoder = model["decoder"]
    decoder["filename"] = "model.onnx"
    del decoder["inputs"]["inputs_embeds"]
    decoder["inputs"]["input_ids"] = "input_ids"
    return config


def main() -> int:
    asked = parser("scripts/make-text-twin", __doc__, "phi-3.5-mini")
    asked.add_argument(
        "--block",
        type=int,
        choices=(32, 128),
        default=128,
        help="weights that share a scale: 128 as in Microsoft's Phi-3.5-mini (default), or 32",
    )
    asked.add_argument("--layers", type=int, default=Shape.layers, help="default: %(default)s")
    options = asked.parse_args()
    shape = Shape(layers=options.layers)
    return run(
        options.folder,
        ROOM_BYTES,
        lambda folder: make(
            folder, shape, options.block, options.seed, Progress(), half=options.float16
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
