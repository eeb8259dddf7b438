"""Where a Phi-3 model of a long context changes its rotary scale, and what that asks of a job."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# By model type, as in the runtime (InitializePhi3RopeThreshold): no file of a model says it.
_LINES = {"phi3": 4096, "phimoe": 4096, "phi3v": 4096, "phi3small": 8192}
# What genai's builder calls the cosines up to the line, in a graph that has others beyond it.
_TWO_CACHES = b"cos_cache_small"
# While many tokens are computed in one call, each takes its logits and so many times its width.
# Measured: 416 KiB a token with Phi-3.5's geometry, 138 with a twin of two layers (reckoned: 141).
_WIDTHS = 24


@dataclass(frozen=True, slots=True)
class Line:
    """The model's graph takes one rotary scale up to `at` tokens, and another beyond.

    The length at a call decides, for all tokens of that call; what is in the cache stays as it was.
    So a longer prompt is right only if its first call goes beyond the line, and an answer only if
    it does not get there, or all is computed anew then. The runtime does that for text models, in
    one call; `crossed` says that it is short enough to wait for.
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
    # Computing all anew takes a second on a GPU; on a CPU so long that it counts as a hang.
    crossed = config["type"] != "phi3v" and provider == "cuda"
    return Line(at, 4 * floats, crossed)
