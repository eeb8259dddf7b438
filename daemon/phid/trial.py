"""One provider tried, in a process of its own: whatever native code does to it is an answer."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from phid import channel, devices
from phid.engine import load_runtime
from phid.errors import Refused
from phid.jobs import Job, Loading, Sampling, Turn
from phid.proofs import Evidence, Tried, Try

if TYPE_CHECKING:
    from collections.abc import Callable

    from phid.generation import Stream

# Most characters kept of a native error, which comes with the stack of its templates.
_WORDS = 1000


def attempt(task: Try, report: Callable[[Loading], None]) -> Evidence:
    """Load the model on its provider and have it answer, greedily; what came of it."""
    if task.load.provider == "cuda" and (absent := devices.cuda_absent()):
        return Evidence("looking for the device", says=absent.says, mend=absent.mend)
    runtime = load_runtime(task.load, report)
    report(Loading("answering"))
    sampling = Sampling(max_tokens=task.tokens)
    stream = runtime.open(Job("trial", (Turn("user", task.prompt),), sampling))
    for _ in stream.prefill():
        pass
    pieces, tokens_per_s = _decode(stream, task.tokens)
    stream.close()
    evidence = Evidence(
        "answering",
        pieces=pieces,
        placement=dict(runtime.facts.placement),
        tokens_per_s=tokens_per_s,
    )
    runtime.close()
    return evidence


def _decode(stream: Stream, tokens: int) -> tuple[tuple[bytes, ...], float | None]:
    """The first tokens of the answer, and how fast they came after the first.

    By the median: a GPU loads kernels as they are first met, which takes as long as 60 tokens.
    """
    pieces: list[bytes] = []
    took_s: list[float] = []
    began_s = time.monotonic()
    while len(pieces) < tokens and (piece := stream.step()) is not None:
        ended_s = time.monotonic()
        if pieces:
            took_s.append(ended_s - began_s)
        pieces.append(piece)
        began_s = ended_s
    usual_s = statistics.median(took_s) if took_s else 0.0
    return tuple(pieces), round(1 / usual_s, 1) if usual_s else None


def main() -> None:
    """Run one trial on the connection this process was started with; it ends in here."""
    os.dup2(2, 1)
    faulthandler.enable()
    # As for an engine: when memory runs out, the kernel kills this process first.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("900", encoding="ascii")
    connection = channel.inherited()
    with contextlib.suppress(EOFError, OSError):
        task = connection.recv()
        try:
            evidence = attempt(task, connection.send)
        except Refused as refused:
            evidence = Evidence(says=refused.failure.message)
        except Exception as error:  # noqa: BLE001 - the prover is told, whatever it was
            evidence = Evidence(says=str(error).strip()[:_WORDS] or type(error).__name__)
        # Frees the sessions now, which write their profiles.
        gc.collect()
        connection.send(Tried(evidence))
    sys.stderr.flush()
    # Native libraries that are torn down in the wrong order would end a good trial badly.
    os._exit(0)


if __name__ == "__main__":
    main()
