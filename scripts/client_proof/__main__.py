"""What the examples for Node-RED and Home Assistant promise, tried in them: see prove-clients."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from client_proof import home_assistant, node_red  # noqa: E402 - found by the line above
from client_proof.house import House  # noqa: E402

PROGRAMS = {"node-red": node_red, "home-assistant": home_assistant}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="REGEX", help="just the promises whose name has this")
    parser.add_argument("--folder", type=Path, required=True, help="the program's own, for a run")
    parser.add_argument("--inside", metavar="PATH", help="what the program calls that folder")
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("command", nargs="+", help="what starts it")
    options = parser.parse_args()
    proof = PROGRAMS[options.program]
    broken = tried = 0
    with tempfile.TemporaryDirectory(prefix="phid-clients-") as folder:
        house = House(Path(folder))
        try:
            inside = options.inside or str(options.folder)
            with proof.running(house, options.command, options.folder, inside) as program:
                print(f"{options.program} {program.version}", flush=True)
                for n, promise in enumerate(proof.PROMISES):
                    name, began = promise.__name__.replace("_", " "), time.monotonic()
                    # The first ones set it up.
                    if options.only and n >= proof.NEEDED and not re.search(options.only, name):
                        continue
                    tried += 1
                    try:
                        verdict, says = "ok    ", promise(program)
                    except Exception as error:  # noqa: BLE001 - the others are tried too
                        broken += 1
                        verdict, says = "FAILED", f"{type(error).__name__}: {error}"
                    took_s = time.monotonic() - began
                    print(f"{verdict} {name} ({took_s:.1f} s)\n       {says}", flush=True)
                if broken:
                    print(f"--- its last words\n{program.program.log[-4000:]}", file=sys.stderr)
        finally:
            house.close()
    print(f"{broken} of {tried} promises are broken" if broken else f"all {tried} are kept")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
