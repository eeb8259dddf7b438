"""Where a Phi-3 model of a long context changes its rotary scale, and what that asks of a job."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Of the model's type, as the runtime has them (InitializePhi3RopeThreshold): no file says it.
_LINES = {"phi3": 4096, "phimoe": 4096, "phi3v": 4096, "phi3small": 8192}
# How genai's builder calls the cosines up to the line, where a graph has others beyond it.
_TWO_CACHES = b"cos_cache_small"
# What a token of many takes while they are computed in one call: its logits, and so many times its
# width. Phi-3.5's geometry took 416 KiB; a twin of two layers 138, which this makes 141.
_WIDTHS = 24


@dataclass(frozen=True, slots=True)
class Line:
    """The model's graph takes one rotary scale up to `at` tokens, and another beyond.

    It goes by the length at each call, for all tokens of that call; what is in the cache stays as
    it was. So a longer prompt is right only if its first call goes beyond the line, and an answer
    only if it does not get there, or all is computed anew then. That the runtime does for text
    models, in one call that `crossed` says can be waited for.
    """

    at: int
    token_bytes: int
    crossed: bool

    def first_call(self, prompt_tokens: int) -> int:
        """How many tokens the first call must have at the least; 0: any number."""
        return self.at + 1 if prompt_tokens > self.at else 0

    def end(self, prompt_tokens: int, context: int) -> int:
        """How long prompt and answer may become together."""
        return context if self.crossed or prompt_tokens > self.at else min(context, self.at)


def of_model(folder: Path, config: dict[str, Any], provider: str) -> Line | None:
    """The line of the model that `config` (its genai_config's) describes; None if it has none."""
    at = _LINES.get(str(config.get("type")))
    if at is None or int(config["context_length"]) <= at:
        return None
    decoder = config["decoder"]
    path = folder / decoder["filename"]
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data.find(_TWO_CACHES) < 0:
            return None
    floats = int(config["vocab_size"]) + _WIDTHS * int(decoder["hidden_size"])
    # On a GPU to compute them anew takes a second; on a CPU so long that it counts as a hang.
    crossed = config["type"] != "phi3v" and provider == "cuda"
    return Line(at, 4 * floats, crossed)
