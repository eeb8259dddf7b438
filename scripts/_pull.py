"""scripts/prove-pull: a pull killed at random many times, from a server of ours on loopback.

It counts what is fetched more than once, and holds the outcome's hashes against the source's.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import hub_server  # noqa: E402 - where the tests have it
from phid import demo, settings  # noqa: E402

CATALOG = """\
[[catalog]]
name = "proved"
repo = "acme/proved"
folder = "cpu"
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/prove-pull", description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=20e6, help="bytes a second")
    parser.add_argument(
        "--model", type=Path, default=settings.default_models_dir() / demo.NAME, metavar="FOLDER"
    )
    options = parser.parse_args()
    chance = random.Random(options.seed)
    source = {path.name: path for path in options.model.iterdir() if path.name != "manifest.json"}
    size = sum(path.stat().st_size for path in source.values())
    with hub_server.hub() as hub, tempfile.TemporaryDirectory() as folder:
        hub.commit("acme/proved", {f"cpu/{n}": path.read_bytes() for n, path in source.items()})
        hub.rate = options.rate
        config = Path(folder) / "phid.toml"
        config.write_text(CATALOG)
        models = Path(folder) / "models"
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PHID_"))}
        environment |= {
            "HF_ENDPOINT": hub.endpoint,
            "PHID_CONFIG": str(config),
            "PHID_MODELS_DIR": str(models),
        }
        command = [sys.executable, "-m", "phid", "models", "pull", "proved"]
        for kill in range(options.kills):
            # Most in mid-file, some before the first byte.
            early = chance.random() < 0.2
            after = 0 if early else chance.uniform(0.2, 1.0) * size / options.kills
            target = hub.sent + after
            child = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
            if early:
                time.sleep(chance.uniform(0, 2))
            while not early and hub.sent < target and child.poll() is None:
                time.sleep(0.002)
            child.kill()
            ended = child.wait()
            print(f"kill {kill + 1}: status {ended}, {hub.sent / 1e6:.1f} MB sent")
            assert not (models / "proved").exists() or ended == 0, "half a model was visible"
        subprocess.run(command, env=environment, check=True)
        made = models / "proved"
        for name, path in source.items():
            assert _hash(made / name) == _hash(path), f"{name} is not what it was"
        again = (hub.sent - size) / size
    print(f"{options.kills} kills: every hash is right, {again:.2%} of {size} bytes came twice")
    return int(again >= 0.05)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
