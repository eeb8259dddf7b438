"""Pictures on the wire: raw and in JSON, sound and not; with the scripted engine."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rig import Daemon, DaemonFactory, serving, until
from wire import BASE, Heard, Requester

pytestmark = pytest.mark.mosquitto

TOKENS = 313  # what the scripted engine says of every picture


def png(width: int, height: int, body: bytes | None = None, *before: tuple[bytes, bytes]) -> bytes:
    """A PNG file; its header may lie about its body, and there may be chunks before it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    if body is None:
        body = zlib.compress(b"".join(b"\0" + b"\x80\x90\xa0" * width for _ in range(height)))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    head += b"".join(chunk(*part) for part in before)
    return head + chunk(b"IDAT", body) + chunk(b"IEND", b"")


SOUND = png(64, 48)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder: Path = tmp_path_factory.mktemp("frames")
    limits = {"vision__image_bytes": "200000", "limits__backlog_bytes": "1000000"}
    cameras = {"vision__camera_topics": '["cam/+"]', "vision__camera_age_s": "2"}
    with serving(folder, vision__parts_s="2", **limits, **cameras) as daemon:
        yield daemon


@pytest.fixture
def asker(daemon: Daemon) -> Iterator[Requester]:
    with Requester(daemon.port) as client:
        yield client


def send(
    asker: Requester, payload: bytes | dict[str, Any], *user: tuple[str, str], **options: Any
) -> Heard:
    """What came back for a frame."""
    correlation = uuid.uuid4().bytes
    topic = f"{BASE}/dut/in/frame/{asker.name}"
    asker.publish(topic, payload, reply_to=asker.rx, correlation=correlation, user=user, **options)
    return asker.wait(lambda h: h.correlation == correlation and h.type != "accepted", 20)


def in_json(*pictures: bytes, **fields: Any) -> dict[str, Any]:
    images = [{"b64": base64.b64encode(p).decode()} for p in pictures]
    return {"prompt": "what is it?", "images": images, **fields}


def test_a_raw_frame_with_its_prompt_as_a_property_is_answered(asker: Requester) -> None:
    result = send(asker, SOUND, ("prompt", "what is it?"), ("max_tokens", "2")).json
    assert result["type"] == "result"
    assert result["text"] == "what is "
    assert result["finish"] == "length"
    assert result["usage"]["image_tokens"] == TOKENS


def test_pictures_in_json_are_answered(asker: Requester) -> None:
    result = send(asker, in_json(SOUND, SOUND, detail="low")).json
    assert result["text"] == "what is it?"
    assert result["usage"]["image_tokens"] == 2 * TOKENS


def test_the_same_frame_again_is_answered_from_memory_and_another_is_a_conflict(
    asker: Requester,
) -> None:
    first = send(asker, SOUND, ("prompt", "x"), ("id", "frame1")).json
    again = send(asker, SOUND, ("prompt", "x"), ("id", "frame1")).json
    assert again == first | {"duplicate": True}
    other = send(asker, png(65, 48), ("prompt", "x"), ("id", "frame1")).json
    assert other["code"] == "id_conflict"


RAW = {
    "nothing": (b"", "bad_request"),
    "text": (b"hello, I am image/jpeg", "unsupported"),
    "cut off in its header": (SOUND[:20], "unsupported"),
    "a bomb": (png(65_000, 65_000, b"x"), "too_large"),
    "too long a side": (png(20_000, 1, b"x"), "too_large"),
    "too many bytes": (SOUND + bytes(200_000), "too_large"),
    "a GIF": (b"GIF89a" + bytes(100), "unsupported"),
    "a GIF with a PNG behind it": (b"GIF89a" + SOUND, "unsupported"),
    "a film": (bytes(4) + b"ftypisom" + SOUND, "unsupported"),
    "too high": (png(1, 20_000, b"x"), "too_large"),
    "an animated PNG": (png(64, 48, None, (b"acTL", bytes(7) + b"\2")), "unsupported"),
    "an animated WebP": (
        b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\2\0\0\0\x3f\0\0\x2f\0\0",
        "unsupported",
    ),
}


@pytest.mark.parametrize(("payload", "code"), RAW.values(), ids=RAW.keys())
def test_a_bad_raw_frame_is_told_so(asker: Requester, payload: bytes, code: str) -> None:
    error = send(asker, payload, ("prompt", "x"), ("id", f"r{uuid.uuid4().hex[:8]}")).json
    assert (error["type"], error["code"]) == ("error", code)
    assert send(asker, SOUND, ("prompt", "still here")).json["text"] == "still here"


def test_a_picture_is_told_by_its_bytes_and_not_by_its_name(asker: Requester) -> None:
    prompt = ("prompt", "what is it?")
    text = send(asker, b"a cat", prompt, content_type="image/jpeg").json
    assert (text["type"], text["code"]) == ("error", "unsupported")
    for name in ("image/jpeg", "text/plain", "application/json"):
        assert send(asker, SOUND, prompt, content_type=name).json["text"] == "what is it?"


def test_a_raw_frame_without_a_prompt_or_with_a_wrong_property_is_told_so(
    asker: Requester,
) -> None:
    assert send(asker, SOUND).json["field"] == "prompt"
    wrong = send(asker, SOUND, ("promt", "x")).json
    assert "did you mean prompt" in wrong["message"]
    wrongs = {"max_tokens": ("0", "many"), "detail": ("0", "17", "99", "-1", "1.5", "medium", "")}
    for name, values in wrongs.items():
        for value in values:
            error = send(asker, SOUND, ("prompt", "x"), (name, value)).json
            assert (error["code"], error["field"]) == ("bad_request", name), value
    assert send(asker, SOUND, ("prompt", "x"), ("images", "[]")).json["code"] == "bad_request"


JSON = {
    "none": (in_json(), "bad_request"),
    "five": (in_json(*[SOUND] * 5), "too_large"),
    "junk": ({"prompt": "x", "images": [{"b64": "*not base64*"}]}, "bad_request"),
    "no picture": ({"prompt": "x", "images": [{"b64": "aGVsbG8="}]}, "unsupported"),
    "no source": ({"prompt": "x", "images": [{"label": "front"}]}, "bad_request"),
    "a wrong hash": (
        {
            "prompt": "x",
            "images": [{"b64": base64.b64encode(SOUND).decode(), "sha256": "0" * 64}],
        },
        "bad_request",
    ),
    "detail 0": (in_json(SOUND, detail=0), "bad_request"),
    "detail 99": (in_json(SOUND, detail=99), "bad_request"),
    "two sources": ({"prompt": "x", "images": [{"part": 0, "topic": "cam/a"}]}, "bad_request"),
    "a filter": ({"prompt": "x", "images": [{"topic": "cam/+"}]}, "bad_request"),
    "a topic not allowed": ({"prompt": "x", "images": [{"topic": "secret/a"}]}, "unauthorized"),
    "a camera never heard": ({"prompt": "x", "images": [{"topic": "cam/never"}]}, "incomplete"),
    "a path": ({"prompt": "x", "images": [{"path": "/etc/passwd"}]}, "bad_request"),
    "an address": ({"prompt": "x", "images": [{"url": "http://x/y.jpg"}]}, "bad_request"),
}


@pytest.mark.parametrize(("payload", "code"), JSON.values(), ids=JSON.keys())
def test_bad_pictures_in_json_are_told_so(
    asker: Requester, payload: dict[str, Any], code: str
) -> None:
    error = send(asker, payload).json
    assert (error["type"], error["code"]) == ("error", code)


CODED = base64.b64encode(SOUND).decode()
JUNK = {
    "a line break": CODED[:40] + "\n" + CODED[40:],
    "a space": CODED[:40] + " " + CODED[40:],
    "junk at its end": CODED + "!",
    "padding in its middle": CODED[:40] + "==" + CODED[40:],
    "too short": CODED[:-1] if CODED.endswith("=") else CODED[:-2],
    "a data URL that is not base64": "data:image/png," + CODED,
    "a data URL without bytes": "data:image/png;base64",
    "a data URL with junk": "data:image/png;base64,!" + CODED,
    "another alphabet": CODED.replace("/", "_").replace("+", "-") + "-_-_",
    "no ASCII": "é" + CODED,
    "a NUL": CODED[:40] + "\0" + CODED[40:],
}


@pytest.mark.parametrize("coded", JUNK.values(), ids=JUNK.keys())
def test_base64_with_junk_is_told_where(asker: Requester, coded: str) -> None:
    images = [{"b64": CODED}, {"b64": coded}]
    error = send(asker, {"prompt": "x", "images": images}).json
    assert (error["code"], error["field"]) == ("bad_request", "images.1.b64")


@pytest.mark.parametrize(
    "head", ["data:image/png;base64,", "DATA:;BASE64,", "data:a/b;c=d;base64,"]
)
def test_a_data_url_is_taken_and_its_bytes_tell_the_type(asker: Requester, head: str) -> None:
    request = {"id": uuid.uuid4().hex, "prompt": "x"}
    result = send(asker, request | {"images": [{"b64": head + CODED}]}).json
    assert result["usage"]["image_tokens"] == TOKENS
    # It is the same request without that head: the digest is of the bytes.
    again = send(asker, request | {"images": [{"b64": CODED}]}).json
    assert (again["type"], again["duplicate"]) == ("result", True)


@pytest.mark.parametrize("behind", [b"PK\3\4" + bytes(60), b"<script>1</script>", SOUND])
def test_what_lies_behind_a_picture_is_not_looked_at(asker: Requester, behind: bytes) -> None:
    assert send(asker, SOUND + behind, ("prompt", "what is it?")).json["text"] == "what is it?"


def test_one_pixel_is_a_picture(asker: Requester) -> None:
    assert send(asker, png(1, 1), ("prompt", "what is it?")).json["type"] == "result"


def test_without_mqtt_5_pictures_are_sent_in_json_and_in_parts(daemon: Daemon) -> None:
    with Requester(daemon.port, mqtt_5=False) as old:
        ask_for(old, in_json(SOUND, id="old"))
        assert old.outcome("old")["usage"]["image_tokens"] == TOKENS
        part(old, "old-parts", 1, SOUND)
        ask_for(old, in_parts(0, 1, id="old-parts"))
        part(old, "old-parts", 0, SOUND)
        assert old.outcome("old-parts")["usage"]["image_tokens"] == 2 * TOKENS


def test_a_right_hash_is_taken(asker: Requester) -> None:
    payload = in_json(SOUND)
    payload["images"][0]["sha256"] = hashlib.sha256(SOUND).hexdigest()
    assert send(asker, payload).json["type"] == "result"


def test_waiting_frames_take_no_more_memory_than_allowed(daemon: Daemon, asker: Requester) -> None:
    large = png(64, 48, bytes(190_000))
    ids = [f"big{n}" for n in range(8)]
    with daemon.engine_held():
        asker.request({"id": "hold", "prompt": "x"})
        for request_id in ids:
            asker.publish(
                f"{BASE}/dut/in/frame/{asker.name}",
                large,
                reply_to=asker.rx,
                user=(("prompt", "x"), ("id", request_id)),
            )
        asker.ctl("ping")  # what came before it is decided
    codes = [asker.outcome(request_id).get("code") for request_id in ids]
    assert codes.count("busy") == 3  # five of 190 kB fit into a megabyte
    assert json.loads(json.dumps(codes)).count(None) == 5


def part(asker: Requester, request_id: str, n: int, payload: bytes, client: str = "") -> None:
    asker.publish(f"{BASE}/dut/in/part/{client or asker.name}/{request_id}/{n}", payload)


def in_parts(*numbers: int, **fields: Any) -> dict[str, Any]:
    return {"prompt": "what is it?", "images": [{"part": n} for n in numbers], **fields}


def ask_for(asker: Requester, payload: dict[str, Any]) -> None:
    asker.publish(f"{BASE}/dut/in/frame/{asker.name}", payload, reply_to=asker.rx)


@pytest.mark.parametrize("order", ["before", "after", "around"])
def test_parts_may_come_before_or_after_their_request(asker: Requester, order: str) -> None:
    request_id = f"parts-{order}"
    if order in ("before", "around"):
        part(asker, request_id, 0, SOUND)
    if order == "before":
        part(asker, request_id, 7, SOUND)
    ask_for(asker, in_parts(0, 7, id=request_id))
    if order == "after":
        part(asker, request_id, 0, SOUND)
    if order in ("after", "around"):
        part(asker, request_id, 7, SOUND)
    result = asker.outcome(request_id)
    assert result["type"] == "result"
    assert result["usage"]["image_tokens"] == 2 * TOKENS


def test_parts_that_never_come_are_named(asker: Requester) -> None:
    part(asker, "gaps", 1, SOUND)
    ask_for(asker, in_parts(0, 1, 2, id="gaps"))
    error = asker.outcome("gaps")
    assert (error["code"], error["status"]) == ("incomplete", 424)
    assert error["message"].endswith("0, 2")
    assert asker.ask("still here")["text"] == "still here"


def test_a_part_that_comes_twice_counts_once_and_the_last_one_counts(asker: Requester) -> None:
    part(asker, "twice", 0, b"no picture")
    part(asker, "twice", 0, SOUND)
    ask_for(asker, in_parts(0, id="twice"))
    assert asker.outcome("twice")["type"] == "result"


def test_a_part_that_comes_again_after_the_answer_changes_nothing(asker: Requester) -> None:
    part(asker, "again", 0, SOUND)
    ask_for(asker, in_parts(0, id="again"))
    first = asker.outcome("again")
    part(asker, "again", 0, png(9, 9))
    assert asker.ask("still here")["text"] == "still here"
    assert asker.outcomes("again") == [first]


def test_of_two_clients_with_one_id_each_is_shown_its_own_part(daemon: Daemon) -> None:
    pictures = [png(11, 11), png(12, 12)]
    with Requester(daemon.port) as one, Requester(daemon.port) as other:
        for asker in (one, other):
            ask_for(asker, in_parts(0, id="same") | {"prompt": '@script {"see": true}'})
        for asker, picture in zip((other, one), pictures, strict=True):
            part(asker, "same", 0, picture)
        for asker, picture in zip((other, one), pictures, strict=True):
            assert asker.outcome("same")["text"].split() == [digits(picture)]


def test_another_clients_part_is_not_ours(asker: Requester) -> None:
    ask_for(asker, in_parts(0, id="mine"))
    part(asker, "mine", 0, SOUND, client="stranger")
    assert asker.outcome("mine")["code"] == "incomplete"


def test_a_bad_part_is_its_requests_outcome(asker: Requester) -> None:
    ask_for(asker, in_parts(0, id="bad-part"))
    part(asker, "bad-part", 0, b"no picture")
    error = asker.outcome("bad-part")
    assert (error["code"], error["field"]) == ("unsupported", "part.0")
    payload = in_parts(id="bad-hash") | {"images": [{"part": 0, "sha256": "0" * 64}]}
    ask_for(asker, payload)
    part(asker, "bad-hash", 0, SOUND)
    assert asker.outcome("bad-hash")["field"] == "part.0"


def test_a_request_that_waits_for_parts_can_be_cancelled(asker: Requester) -> None:
    ask_for(asker, in_parts(0, id="given-up"))
    asker.cancel("given-up")
    assert asker.outcome("given-up")["code"] == "cancelled"
    part(asker, "given-up", 0, SOUND)
    assert asker.ask("still here")["text"] == "still here"
    assert len(asker.outcomes("given-up")) == 1


def test_parts_without_an_id_cannot_be_found(asker: Requester) -> None:
    assert send(asker, in_parts(0)).json["field"] == "id"


def test_parts_that_nobody_asks_for_are_forgotten_and_counted(asker: Requester) -> None:
    asker.listen(f"{BASE}/dut/out/health")
    for n in range(200):
        part(asker, "orphan", n, png(64, 48, bytes(190_000)))
    asker.ctl("discover")  # before it there may have been one that knew nothing of them
    health = asker.wait(
        lambda h: h.topic.endswith("/out/health") and h.json["parts_dropped_total"] > 0, 20
    ).json
    assert health["service_rss_mb"] < 150


# The newest frame of a camera.


def see(camera: str, **fields: Any) -> dict[str, Any]:
    """A request that has the scripted engine say which pictures it was given."""
    return {"prompt": '@script {"see": true}', "images": [{"topic": f"cam/{camera}"}], **fields}


def digits(picture: bytes) -> str:
    return hashlib.sha256(picture).hexdigest()[:12]


def test_the_newest_frame_of_a_camera_is_looked_at(asker: Requester) -> None:
    asker.publish("cam/door", png(8, 8))
    asker.publish("cam/door", SOUND)
    asker.publish("cam/yard", {"b64": base64.b64encode(png(9, 9)).decode()})
    both = see("door")
    both["images"].append({"topic": "cam/yard", "label": "yard"})
    result = send(asker, both).json
    assert result["text"].split() == [digits(SOUND), digits(png(9, 9))]
    assert result["usage"]["image_tokens"] == 2 * TOKENS


def test_a_retry_is_about_the_frame_that_was_there_when_it_was_asked(asker: Requester) -> None:
    asker.publish("cam/gate", SOUND)
    first = send(asker, see("gate", id="gate1")).json
    asker.publish("cam/gate", png(10, 10))
    again = send(asker, see("gate", id="gate1")).json
    assert (again["text"], again["duplicate"]) == (first["text"], True)
    fresh = send(asker, see("gate", id="gate2")).json
    assert fresh["text"].split() == [digits(png(10, 10))]


def test_a_camera_that_goes_silent_is_told(asker: Requester) -> None:
    asker.publish("cam/attic", SOUND)
    assert send(asker, see("attic")).json["type"] == "result"
    until(lambda: send(asker, see("attic")).json.get("code") == "incomplete", 10)
    error = send(asker, see("attic")).json
    assert error["field"] == "images.0.topic"
    assert "s old" in error["message"]


def test_a_retained_frame_shows_what_was_there_once(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    requester.publish("cam/cellar", SOUND, retain=True)
    start_daemon(vision__camera_topics='["cam/+"]')
    error = send(requester, see("cellar")).json
    assert (error["code"], error["message"]) == (
        "incomplete",
        "cam/cellar has sent no frame so far",
    )
    requester.publish("cam/cellar", SOUND)
    assert send(requester, see("cellar")).json["text"].split() == [digits(SOUND)]


def test_a_camera_with_a_broken_frame_is_its_requests_error(asker: Requester) -> None:
    asker.publish("cam/broken", b"no picture at all")
    error = send(asker, see("broken")).json
    assert (error["code"], error["field"]) == ("unsupported", "images")
