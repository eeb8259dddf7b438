"""The change gate: what counts as looking the same."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from phid.errors import Refused
from phid.gate import ChangeGate
from phid.jobs import Gate, Image

GATE = Gate("yard cam", 4.0)


def jpeg(noise: int = 0, person: bool = False, light: float = 1.0) -> Image:
    """A yard of 1280 x 720 with a wall and a path, as a camera sends it."""
    random = np.random.default_rng(noise)
    picture = np.full((720, 1280, 3), 90, np.float64)
    picture[400:, 500:800] = 160
    picture[:250] = 200
    if person:  # 30 x 90 pixels: a third of a percent
        picture[420:510, 600:630] = 30
    picture = picture * light + random.normal(0, 6, picture.shape)
    _, data = cv2.imencode(".jpg", picture.clip(0, 255).astype(np.uint8))
    return Image(data.tobytes())


def test_the_first_frame_has_nothing_to_be_held_against() -> None:
    gate = ChangeGate()
    assert gate.change_pct(GATE, jpeg()) is None
    assert gate.change_pct(GATE, jpeg()) is None  # and none was answered
    gate.answered()
    assert gate.change_pct(GATE, jpeg()) == 0
    assert gate.change_pct(Gate("other", 4.0), jpeg()) is None


def test_noise_is_no_change_and_a_small_person_is() -> None:
    gate = ChangeGate()
    gate.change_pct(GATE, jpeg())
    gate.answered()
    for n in range(1, 6):
        assert (gate.change_pct(GATE, jpeg(n)) or 0) < 2
        assert (gate.change_pct(GATE, jpeg(n, person=True)) or 0) > 10


def test_what_was_answered_counts_and_not_what_was_skipped() -> None:
    gate = ChangeGate()
    gate.change_pct(GATE, jpeg())
    gate.answered()
    # The light fades so slowly that no two frames differ: but from the one answered they do.
    changes = [gate.change_pct(GATE, jpeg(light=1 - n / 50)) or 0 for n in range(10)]
    assert changes == sorted(changes)
    assert changes[-1] > 4


def test_a_picture_of_another_size_can_be_held_against_it_and_a_broken_one_is_refused() -> None:
    gate = ChangeGate()
    gate.change_pct(GATE, jpeg())
    gate.answered()
    _, small = cv2.imencode(".png", np.zeros((1, 1, 3), np.uint8))
    assert (gate.change_pct(GATE, Image(small.tobytes())) or 0) > 50
    with pytest.raises(Refused):
        gate.change_pct(GATE, Image(jpeg().data[:2000]))


def test_its_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phid.gate._MOST_KEYS", 3)
    gate = ChangeGate()
    for n in range(10):
        gate.change_pct(Gate(f"k{n}", 1), jpeg())
        gate.answered()
    assert list(gate._answered) == ["k7", "k8", "k9"]
