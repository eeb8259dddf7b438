from __future__ import annotations

import base64
import json
import sys
from types import FrameType
from typing import Any

import pytest

from phid.attachments import TopicRef
from phid.errors import Code, Refused
from phid.gallery import Gallery, Rules
from phid.slots import MAX_CAMERAS
from pictures import jpeg

SOUND = jpeg()
TS = 1_800_000_000.0


def ref(topic: str, label: str = "") -> TopicRef:
    return TopicRef(topic, "images.0.topic", label)


def refusal(gallery: Gallery, topic: str, now: float = 0.0) -> Code:
    with pytest.raises(Refused) as raised:
        gallery.picture(ref(topic), now)
    assert raised.value.failure.field == "images.0.topic"
    assert topic in raised.value.failure.message
    return raised.value.failure.code


@pytest.fixture
def gallery() -> Gallery:
    return Gallery(Rules(("cam/+",), max_age_s=5.0, room_bytes=10 * len(SOUND)))


def test_the_newest_frame_is_what_a_camera_shows(gallery: Gallery) -> None:
    for n, payload in enumerate((b"old", SOUND)):
        gallery.offer("cam/door", payload, float(n), TS + n)
    image = gallery.picture(ref("cam/door", "the door"), 2.0)
    assert (image.data, image.label) == (SOUND, "the door")
    # It stays there for the next one who asks.
    assert gallery.picture(ref("cam/door"), 3.0).data == SOUND


def test_a_frame_in_json_is_taken_too(gallery: Gallery) -> None:
    payload = {"b64": base64.b64encode(SOUND).decode(), "ts": TS}
    gallery.offer("cam/door", json.dumps(payload).encode(), 0.0, TS)
    assert gallery.picture(ref("cam/door"), 1.0).data == SOUND


def test_only_the_topics_allowed_are_kept_and_given(gallery: Gallery) -> None:
    gallery.offer("secret/door", SOUND, 0.0, TS)
    assert refusal(gallery, "secret/door") is Code.UNAUTHORIZED
    gallery.offer("cam/door", SOUND, 0.0, TS)
    gallery.rules = Rules(("other/#",))
    assert refusal(gallery, "cam/door") is Code.UNAUTHORIZED


def test_a_camera_that_is_silent_is_told(gallery: Gallery) -> None:
    assert refusal(gallery, "cam/door") is Code.INCOMPLETE
    gallery.offer("cam/door", SOUND, 0.0, TS)
    assert gallery.picture(ref("cam/door"), 5.0)
    assert refusal(gallery, "cam/door", 5.1) is Code.INCOMPLETE


@pytest.mark.parametrize(("said", "taken"), [(TS - 4, True), (TS - 6, False), (TS + 3600, True)])
def test_a_frame_from_the_past_is_old_and_one_from_the_future_is_not(
    gallery: Gallery, said: float, *, taken: bool
) -> None:
    payload = {"b64": base64.b64encode(SOUND).decode(), "ts": said}
    gallery.offer("cam/door", json.dumps(payload).encode(), 0.0, TS)
    if taken:
        assert gallery.picture(ref("cam/door"), 0.5).data == SOUND
    else:
        assert refusal(gallery, "cam/door", 0.5) is Code.INCOMPLETE


def test_what_is_no_picture_is_told_to_who_asks_for_it(gallery: Gallery) -> None:
    gallery.offer("cam/door", b"no picture", 0.0, TS)
    with pytest.raises(Refused) as raised:
        gallery.picture(ref("cam/door"), 0.0)
    assert raised.value.failure.code is Code.UNSUPPORTED


def test_memory_is_bounded_and_the_longest_unheard_goes_first(gallery: Gallery) -> None:
    for n in range(11):
        gallery.offer(f"cam/{n}", SOUND, n / 100, TS)
    assert refusal(gallery, "cam/0") is Code.INCOMPLETE
    assert all(gallery.picture(ref(f"cam/{n}"), 0.0) for n in range(1, 11))
    # One that is heard again is not the longest unheard.
    gallery.offer("cam/1", SOUND, 0.2, TS)
    gallery.offer("cam/11", SOUND, 0.3, TS)
    assert refusal(gallery, "cam/2") is Code.INCOMPLETE
    assert gallery.picture(ref("cam/1"), 0.0)
    # A frame that alone is too large shows that the old one is not the newest any more.
    gallery.offer("cam/1", SOUND * 11, 0.0, TS)
    assert refusal(gallery, "cam/1") is Code.INCOMPLETE


def test_the_number_of_cameras_is_bounded() -> None:
    gallery = Gallery(Rules(("cam/+",)))
    for n in range(MAX_CAMERAS + 1):
        gallery.offer(f"cam/{n}", SOUND, 0.0, TS)
    assert refusal(gallery, "cam/0") is Code.INCOMPLETE
    assert gallery.picture(ref("cam/1"), 0.0)


def test_a_camera_that_has_shown_something_shows_something_at_every_step_of_the_next_frame(
    gallery: Gallery,
) -> None:
    """The owner's thread looks at any moment while the network's thread is at it."""
    looked = []

    def look(_frame: FrameType, _event: str, _arg: Any) -> Any:
        looked.append(gallery.picture(ref("cam/door"), 2.0).data)
        return look

    gallery.offer("cam/door", SOUND, 0.0, TS)
    before = sys.gettrace()
    sys.settrace(look)
    try:
        gallery.offer("cam/door", SOUND, 1.0, TS + 1)
    finally:
        sys.settrace(before)
    assert len(looked) > 5
