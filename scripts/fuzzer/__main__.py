"""Fuzzes the decoders in this process, pictures in one of their own, or floods a daemon."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from fuzzer.runs import in_parts
from fuzzer.source import ROOT


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="how many inputs (100000)")
    parser.add_argument("--seed", type=int, default=1, help="the first part's (1)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--pixels",
        type=int,
        metavar="N",
        help="N picture files through the decoder, in one process",
    )
    parser.add_argument("--flood", type=int, metavar="N", help="flood a daemon with N bad requests")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    if options.flood:
        sys.path.insert(0, str(ROOT / "tests"))
        from flood import flood  # noqa: PLC0415 - what the tests run

        figures = flood(options.flood)
        bad = abs(figures["rss_growth_pct"]) > 2
    elif options.pixels:
        from fuzzer.pixels import figures as told  # noqa: PLC0415 - only this needs OpenCV
        from fuzzer.pixels import fuzz_pixels  # noqa: PLC0415

        began = time.monotonic()
        seen = fuzz_pixels(options.pixels, options.seed)
        figures, bad = told(seen, time.monotonic() - began), not seen.clean
    else:
        began = time.monotonic()
        tally = in_parts(options.count, options.seed, options.processes)
        figures = {
            "count": sum(tally.runs.values()),
            "escapes": len(tally.escapes),
            "seconds": round(time.monotonic() - began, 1),
            "decoders": {
                name: {
                    "runs": tally.runs[name],
                    "taken": tally.taken[name],
                    "slowest_ms": round(tally.slowest_ms[name], 1),
                }
                for name in sorted(tally.runs)
            },
            "examples": tally.escapes[:20],
        }
        bad = bool(tally.escapes)
    print(json.dumps(figures, indent=1, ensure_ascii=False))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
