"""What decoding a picture takes of memory: the kernel's word against what the header promises."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import pictures
from phid import frames, images
from phid.errors import Code, Refused
from phid.gate import ChangeGate
from phid.jobs import Gate, Image
from rig import ROOT

CROPS = 1
# A process of its own, whose peak is set back before each file (proc(5), clear_refs).
LOOK = """
import ctypes, json, sys
from pathlib import Path
from phid import frames

def of_status(name):
    return int(Path("/proc/self/status").read_text().partition(name + ":")[2].split()[0]) * 1024

took = {}
for file in sorted(Path(sys.argv[1]).iterdir()):
    data = file.read_bytes()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = of_status("VmRSS")
    frames.look(data, int(sys.argv[2]))
    took[file.name] = of_status("VmHWM") - before
print(json.dumps(took))
"""


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    rgb = pictures.two_colours(1800, 1500)
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    rgba = np.dstack([rgb, grey])
    deep: Callable[[Any], Any] = lambda picture: picture.astype(np.uint16) * 257  # noqa: E731
    lossless = (cv2.IMWRITE_WEBP_QUALITY, 101)
    whole = (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)
    progressive = (cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    return {
        "0 the first of all": pictures.jpeg(rgb),
        "16 bits with alpha": pictures.encode(".png", deep(rgba)),
        "16 bits": pictures.encode(".png", deep(rgb)),
        "8 bits with alpha": pictures.encode(".png", rgba),
        "8 bits": pictures.encode(".png", rgb),
        "grey, 16 bits": pictures.encode(".png", deep(grey)),
        "lossless with alpha": pictures.encode(".webp", rgba, *lossless),
        "lossy with alpha": pictures.encode(".webp", rgba, cv2.IMWRITE_WEBP_QUALITY, 80),
        "lossy": pictures.encode(".webp", rgb, cv2.IMWRITE_WEBP_QUALITY, 80),
        "jpeg": pictures.jpeg(rgb),
        "progressive": pictures.encode(".jpg", rgb, *progressive),
        "progressive 4:4:4": pictures.encode(".jpg", rgb, *progressive, *whole),
        "bmp": pictures.encode(".bmp", rgb),
    }


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is the Linux kernel's word")
def test_no_kind_of_file_takes_more_than_its_header_promised(
    files: dict[str, bytes], tmp_path: Path
) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", LOOK, str(tmp_path), str(CROPS)],
        # A block that is freed goes back to the kernel, whatever an emulator makes of malloc_trim.
        env={"PYTHONPATH": str(ROOT / "daemon"), "MALLOC_MMAP_THRESHOLD_": "131072"},
        capture_output=True,
        text=True,
        check=True,
    )
    took = json.loads(done.stdout)
    over = {}
    for name, data in files.items():
        facts = images.inspect(data)
        cut = images.plan(*facts.upright, CROPS)
        times = images.shrink(facts, cut.width, cut.height)
        promised = images.decoding_bytes(facts, times) + len(data)
        # Its crops as they are cut, and what the allocator rounds up to.
        if took[name] > promised + (8 << 20) or took[name] < promised / 2:
            over[name] = took[name] >> 20, promised >> 20
    over.pop("0 the first of all", None)
    assert not over, over
    assert took["16 bits with alpha"] > 15 * 1800 * 1500


def test_a_header_tells_depth_transparency_and_scans(files: dict[str, bytes]) -> None:
    per_pixel = {
        name: images.decoding_bytes(images.inspect(data)) / (1800 * 1500)
        for name, data in files.items()
    }
    assert per_pixel["16 bits with alpha"] == 16
    assert per_pixel["16 bits"] == 12
    assert per_pixel["8 bits with alpha"] == 8
    assert per_pixel["8 bits"] == per_pixel["jpeg"] == per_pixel["bmp"] == 6
    assert per_pixel["progressive 4:4:4"] == 10
    assert images.decoding_bytes(images.inspect(files["jpeg"]), 8) < 300_000


def test_a_frame_that_its_watch_cannot_decode_for_want_of_memory_is_refused_before() -> None:
    deep = pictures.encode(".png", np.zeros((1000, 1000, 4), np.uint16))
    assert ChangeGate().change_pct(Gate("w", 1), Image(deep)) is None
    with pytest.raises(Refused) as refused:
        ChangeGate(memory_bytes=1).change_pct(Gate("w", 1), Image(deep))
    assert refused.value.failure.code is Code.NO_MEMORY


def test_a_watch_decodes_a_large_jpeg_small_and_sees_the_same() -> None:
    data = pictures.jpeg(pictures.busy(1920, 1080))
    facts = images.inspect(data)
    assert frames.thumbnail_shrink(facts) == 8
    whole = cv2.cvtColor(frames.decode(data), cv2.COLOR_RGB2GRAY)
    mean = cv2.resize(whole, (32, 32), interpolation=cv2.INTER_AREA)
    assert frames.difference_pct(frames.thumbnail(data, facts), mean) < 0.8
