"""A daemon, a broker and clients under faults, and the laws checked from the clients' records.

What is random is drawn from --seed: which request comes next, which fault, and when. How it falls
together is the machine's business, so a seed repeats the plan and not the run.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from _chaos_clients import Asked, Asker, Pinger
from _chaos_faults import KEEPALIVE_S, Faults
from cable import Cable
from phid import demo, settings
from phid.progress import Progress
from rig import Daemon, Mosquitto, until

CLIENTS = 5
MOST_PING_MS = 100


def judge(askers: list[Asker], pinger: Pinger, faults: Faults) -> dict[str, Any]:
    """What the clients' books say of the laws."""
    records = [one for asker in askers for one in asker.records.values()]
    errors: list[str] = []
    turns: list[str] = []
    for one in records:
        errors += stream_errors(one)
        turns += turn_errors(one)
    quiet = [ms for sent, ms in pinger.times() if not any(a <= sent <= b for a, b in faults.down)]
    codes = Counter(
        outcome.get("code") or outcome["finish"] for one in records for outcome in one.outcomes[:1]
    )
    return {
        "asked": len(records),
        "accepted": sum(one.accepted for one in records),
        "answered": sum(one.ended for one in records),
        "lost": sum(not one.ended for one in records),
        "asked_once": sum(one.once for one in records),
        "refused_once": sum(one.refused for one in records),
        "gone_with_the_broker": sum(
            one.void and not (one.outcomes or one.refused) for one in records
        ),
        "answered_twice": sum(len(one.outcomes) > 1 for one in records),
        "conflicts": sum(asker.conflicts for asker in askers),
        "stream_errors": len(errors),
        "went_on": sum(bool(one.turns) and one.answered_well for one in records),
        "turn_errors": len(turns),
        "asked_again": sum(one.asked - 1 for one in records),
        "pings": len(quiet),
        "p99_ping_ms": round(sorted(quiet)[int(len(quiet) * 0.99)], 1) if quiet else None,
        "outcomes": dict(codes.most_common()),
        "faults": faults.counts.total(),
        **{name: faults.counts[name] for name in faults.kinds},
        "examples": errors[:5]
        + turns[:5]
        + [json.dumps(one.outcomes)[:600] for one in records if len(one.outcomes) > 1][:5]
        + [f"lost: {json.dumps(one.payload)}" for one in records if not one.ended][:5],
    }


def stream_errors(one: Asked) -> list[str]:
    """How the deltas of a request, or its text, contradict its outcome."""
    if not one.outcomes:
        return []
    outcome, request_id = one.outcomes[0], one.payload["id"]
    found = []
    if any(len(texts) > 1 for texts in one.deltas.values()):
        found.append(f"{request_id}: a seq with two texts")
    if one.late_deltas:
        found.append(f"{request_id}: {one.late_deltas} deltas after the outcome")
    text = outcome.get("text")
    joined = ""
    for seq in range(len(one.deltas)):  # QoS 0: what follows a gap proves nothing
        if seq not in one.deltas:
            break
        joined += next(iter(one.deltas[seq]))
    if text is not None and not text.startswith(joined):
        found.append(f"{request_id}: {joined!r} is no prefix of {text!r}")
    if outcome["type"] == "result" and one.expected is not None:
        whole = outcome["finish"] in ("stop", "length")
        if not one.expected.startswith(text) or (whole and text != one.expected):
            found.append(f"{request_id}: {text!r} is not {one.expected!r}")
    return found


def turn_errors(one: Asked) -> list[str]:
    """How a request of a session was not shown just what was said in it before."""
    if one.turns is None or not one.answered_well:
        return []
    shown = one.outcomes[0]["session_turns"]
    return [f"{one.payload}: {shown} turns, not {one.turns}"] if shown != one.turns else []


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    chance = random.Random(options.seed)
    scripted = options.model == "scripted"
    broker = Mosquitto(folder, "autosave_interval 1\n")
    broker.start()
    cable = Cable(broker.port)
    own: dict[str, object] = {} if scripted else {"engine__runtime": "genai"}
    if not scripted:
        own |= {"engine__model": options.model, "models_dir": settings.default_models_dir()}
    daemon = Daemon(
        cable.port,
        folder,
        **own,
        engine__hang_s=1,
        engine__restart_max_s=0.5,
        mqtt__reconnect_max_s=1,
        mqtt__keepalive_s=KEEPALIVE_S,
        limits__drain_s=2,
        limits__per_client=64,
        limits__backlog=12,
    )
    daemon.start()
    progress = Progress()
    with ExitStack() as stack:
        stack.callback(broker.stop)
        stack.callback(daemon.close)
        # Who asks before anybody has subscribed asks nobody.
        until(lambda: daemon.logged("state_changed", state="online"), 120, "the daemon")
        askers = [
            Asker(n, broker.port, random.Random(chance.random()), scripted=scripted)
            for n in range(CLIENTS)
        ]
        pinger = Pinger(broker.port)
        for one in (*askers, pinger):
            stack.callback(one.stop)
        faults = Faults(random.Random(chance.random()), daemon, broker, cable, askers)
        ended = threading.Event()

        breaker = threading.Thread(
            target=faults.go_on, args=(ended, options.every), name="faults", daemon=True
        )
        began = time.monotonic()
        breaker.start()
        max_rss = ask_on(options, askers, pinger, faults, daemon)
        ended.set()
        breaker.join(60)
        settle(askers, options.settle)
        progress(f"{time.monotonic() - began:.0f} s", 1.0)
        figures = judge(askers, pinger, faults)
        figures["max_service_rss_mb"] = round(max_rss, 1)
        figures |= {"seconds": options.seconds, "seed": options.seed, "model": options.model}
        if options.keep:
            (options.keep / "chaos-daemon.log").write_text(daemon.log, encoding="utf-8")
    return figures


def ask_on(
    options: argparse.Namespace,
    askers: list[Asker],
    pinger: Pinger,
    faults: Faults,
    daemon: Daemon,
) -> float:
    """Ask and ping while things break: the most memory that the service took, MiB."""
    began, most, turns = time.monotonic(), 0.0, 0
    progress = Progress()
    while (now := time.monotonic()) < began + options.seconds:
        for asker in askers:
            asker.tick(now, more=True)
        turns += 1
        if turns % 2 == 0:
            pinger.ping()
        if turns % 20 == 0:
            most = max(most, rss_mb(daemon))
            done = sum(one.ended for asker in askers for one in asker.records.values())
            says = f"{done} answered, {faults.counts.total()} faults"
            progress(says, (now - began) / options.seconds)
        time.sleep(0.05)
    return most


def settle(askers: list[Asker], patience_s: float) -> None:
    """With nothing breaking any more, ask again until all is answered, or nothing is any more."""
    records = [one for asker in askers for one in asker.records.values()]
    left, late = len(records), time.monotonic() + patience_s
    while left and (now := time.monotonic()) < late:
        for asker in askers:
            asker.tick(now, more=False)
        if (still := sum(not one.ended for one in records)) < left:
            left, late = still, now + patience_s
        time.sleep(0.05)


def rss_mb(daemon: Daemon) -> float:
    process = daemon.process
    with suppress(psutil.Error):
        if process is not None:
            return float(psutil.Process(process.pid).memory_info().rss / 2**20)
    return 0.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long things break (60)")
    parser.add_argument("--seed", type=int, default=1, help="of the plan (1)")
    parser.add_argument(
        "--model", default="scripted", help="scripted (default), or a model's name, such as demo"
    )
    parser.add_argument(
        "--every",
        type=float,
        nargs=2,
        default=(0.5, 3.0),
        metavar=("MIN", "MAX"),
        help="seconds between two faults (0.5 3)",
    )
    parser.add_argument(
        "--settle", type=float, default=60.0, help="most seconds without an answer, after it (60)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the daemon's log there")
    options = parser.parse_args()
    if options.keep:  # now, and not when all is done
        options.keep.mkdir(parents=True, exist_ok=True)
    if options.model == "demo":
        options.model = demo.NAME
        demo.prepare(settings.default_models_dir(), Progress())
    with tempfile.TemporaryDirectory(prefix="phid-chaos-") as name:
        figures = run(options, Path(name))
    print(json.dumps(figures, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 1 if is_broken(figures) else 0


def is_broken(figures: dict[str, Any]) -> bool:
    """True if a law is, or nothing was shown."""
    # Of fewer pings than a hundred the slowest one is the 99th percentile: that is the machine's.
    deaf = figures["pings"] >= 100 and figures["p99_ping_ms"] > MOST_PING_MS
    wrong = figures["lost"] or figures["answered_twice"] or figures["stream_errors"]
    wrong = wrong or figures["turn_errors"]
    return bool(deaf or wrong or not figures["answered"])


if __name__ == "__main__":
    sys.exit(main())
