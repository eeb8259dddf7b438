"""Bad input is answered with a code, on the reply topic, and disturbs nothing else."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rig import Daemon, DaemonFactory, serving
from wire import BASE, Heard, Requester, held_to

pytestmark = pytest.mark.mosquitto

ANON = f"{BASE}/dut/out/res/anon/+"
EVENTS = f"{BASE}/dut/out/event"
LONG = '@script {"tokens": 4000, "token_ms": 20}'


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with serving(tmp_path_factory.mktemp("bad-input")) as daemon:
        yield daemon


@pytest.fixture
def asker(daemon: Daemon) -> Iterator[Requester]:
    with Requester(daemon.port) as client:
        client.listen(EVENTS)
        yield client


def text(**fields: Any) -> str:
    return json.dumps({"prompt": "x", **fields})


def told(asker: Requester, correlation: bytes) -> Heard:
    """What came for this correlation data: one message, on whichever topic."""
    return asker.wait(lambda h: h.correlation == correlation, 20, "an answer")


def refused(asker: Requester, payload: bytes | str | dict[str, Any], **options: Any) -> Heard:
    """The error that a request got; a sound one after it is answered, and nothing else came."""
    correlation = uuid.uuid4().bytes
    asker.request(payload, correlation=correlation, **options)
    heard = told(asker, correlation)
    assert heard.type == "error", heard.payload
    assert heard.json["message"]
    assert heard.user["status"] == str(heard.json["status"])
    assert asker.ask("still here")["text"] == "still here"
    assert [h for h in asker.heard if h.correlation == correlation] == [heard]
    assert len(heard.payload) < 2000, "an error must not echo what it was sent"
    return heard


BAD: dict[str, tuple[bytes | str, str, str | None]] = {
    "empty": (b"", "bad_request", None),
    "not JSON": (b"what is the time?", "bad_request", None),
    "half JSON": (b'{"prompt": "x"', "bad_request", None),
    "JSON and more": (b'{"prompt": "x"} {}', "bad_request", None),
    "not UTF-8": (b'{"prompt": "\xff\xfe"}', "bad_request", None),
    "UTF-16": ('{"prompt": "x"}'.encode("utf-16"), "bad_request", None),
    "half a surrogate pair": (rb'{"prompt": "\ud800"}', "bad_request", None),
    "an array": (b"[]", "bad_request", None),
    "a string": (b'"x"', "bad_request", None),
    "null": (b"null", "bad_request", None),
    "unknown field": (text(max_token=3), "bad_request", "max_token"),
    "unknown field deep down": (
        '{"messages": [{"role": "user", "content": "x", "name": "y"}]}',
        "bad_request",
        "messages.0.name",
    ),
    "session": (text(session="a b"), "bad_request", "session"),
    "session 7": (text(session=7), "bad_request", "session"),
    "images as text": (text(images=[{"b64": "aGk="}]), "unsupported", "images"),
    "an image of a camera": (text(images=[{"topic": "a/b"}]), "unsupported", "images"),
    "detail 0": (text(detail=0), "bad_request", None),
    "detail 99": (text(detail=99), "bad_request", None),
    "format is a string": (text(response_format="json"), "bad_request", "response_format"),
    "unknown format": (
        text(response_format={"type": "xml"}),
        "bad_request",
        "response_format.type",
    ),
    "format without its schema": (
        text(response_format={"type": "json_schema"}),
        "bad_request",
        "response_format",
    ),
    "format with a schema of its own kind": (
        text(response_format=held_to({"type": "string", "pattern": "a+"})),
        "bad_request",
        "response_format.json_schema.schema",
    ),
    "a schema that nothing satisfies": (
        text(response_format=held_to({"$ref": "#/$defs/none"})),
        "bad_request",
        "response_format",
    ),
    "no prompt": (b"{}", "bad_request", "prompt"),
    "null prompt": (b'{"prompt": null}', "bad_request", "prompt"),
    "empty prompt": (b'{"prompt": ""}', "bad_request", "prompt"),
    "blank prompt": (b'{"prompt": " \\n\\t"}', "bad_request", "prompt"),
    "prompt with NUL": (b'{"prompt": "a\\u0000b"}', "bad_request", "prompt"),
    "prompt is a number": (b'{"prompt": 1}', "bad_request", "prompt"),
    "prompt and messages": (
        text(messages=[{"role": "user", "content": "y"}]),
        "bad_request",
        "messages",
    ),
    "no messages": (b'{"messages": []}', "bad_request", "messages"),
    "messages are strings": (b'{"messages": ["x"]}', "bad_request", "messages.0"),
    "unknown role": (
        b'{"messages": [{"role": "tool", "content": "x"}]}',
        "bad_request",
        "messages.0.role",
    ),
    "last turn is not the user's": (
        b'{"messages": [{"role": "assistant", "content": "x"}]}',
        "bad_request",
        "messages",
    ),
    "prompt over the context": (text(prompt="w " * 5000), "too_large", "prompt"),
    "wrong version": (text(v=2), "bad_request", "v"),
    "max_tokens 0": (text(max_tokens=0), "bad_request", "max_tokens"),
    "max_tokens negative": (text(max_tokens=-1), "bad_request", "max_tokens"),
    "max_tokens huge": (text(max_tokens=10**9), "bad_request", "max_tokens"),
    "max_tokens of 4000 digits": (
        '{"prompt": "x", "max_tokens": ' + "9" * 4000 + "}",
        "bad_request",
        "max_tokens",
    ),
    "max_tokens is a string": (text(max_tokens="5"), "bad_request", "max_tokens"),
    "max_tokens is true": (text(max_tokens=True), "bad_request", "max_tokens"),
    "max_tokens is a fraction": (text(max_tokens=1.5), "bad_request", "max_tokens"),
    "temperature negative": (text(temperature=-0.1), "bad_request", "temperature"),
    "temperature over 2": (text(temperature=2.1), "bad_request", "temperature"),
    "temperature NaN": (text(temperature=float("nan")), "bad_request", "temperature"),
    "temperature infinite": (text(temperature=float("inf")), "bad_request", "temperature"),
    "top_p 0": (text(top_p=0), "bad_request", "top_p"),
    "top_k 0": (text(top_k=0), "bad_request", "top_k"),
    "seed negative": (text(seed=-1), "bad_request", "seed"),
    "nine stop strings": (text(stop=["s"] * 9), "bad_request", "stop"),
    "an empty stop string": (text(stop=[""]), "bad_request", "stop.0"),
    "deadline 0": (text(deadline_ms=0), "bad_request", "deadline_ms"),
    "priority 10": (text(priority=10), "bad_request", "priority"),
    "stream unknown": (text(stream="sse"), "bad_request", "stream"),
    "tags NaN": (text(tags={"a": float("nan")}), "bad_request", "tags.a"),
    "a tag is a list": (text(tags={"a": []}), "bad_request", "tags.a"),
    "a long tag": (text(tags={"a": "x" * 5000}), "bad_request", "tags.a"),
    "a tag with a long name": (text(tags={"a" * 5000: []}), "bad_request", None),
    "60000 bad tags": (text(tags={f"k{n}": [] for n in range(60_000)}), "bad_request", "tags"),
    "60000 unknown fields": (
        json.dumps({f"k{n}": n for n in range(60_000)}),
        "bad_request",
        None,
    ),
    "300000 bad messages": (json.dumps({"messages": [1] * 300_000}), "bad_request", None),
    "2 MB": (text(prompt="x" * 2_000_000), "too_large", None),
    "200 deep": (
        b'{"prompt": "x", "tags": ' + b'{"a":' * 200 + b"1" + b"}" * 201,
        "bad_request",
        None,
    ),
    "100000 deep": (b"[" * 100_000, "bad_request", None),
    "a million digits": (
        '{"prompt": "x", "seed": ' + "9" * 1_000_000 + "}",
        "bad_request",
        None,
    ),
    "id with /": (text(id="a/b"), "bad_request", "id"),
    "id with +": (text(id="a+b"), "bad_request", "id"),
    "id with #": (text(id="#"), "bad_request", "id"),
    "id with NUL": (text(id="a\0b"), "bad_request", "id"),
    "id with a dot": (text(id="a.b"), "bad_request", "id"),
    "empty id": (text(id=""), "bad_request", "id"),
    "long id": (text(id="i" * 65), "bad_request", "id"),
    "id is a number": (text(id=7), "bad_request", "id"),
    "another client's name": (text(client="somebody"), "unauthorized", "client"),
    "unknown model": (text(model="gpt-5"), "not_found", "model"),
}


@pytest.mark.parametrize(("payload", "code", "field"), BAD.values(), ids=BAD.keys())
def test_is_refused_and_the_next_one_answered(
    asker: Requester, payload: bytes | str, code: str, field: str | None
) -> None:
    error = refused(asker, payload).json
    assert error["code"] == code, error
    if field is not None:
        assert error.get("field") == field, error
    # What is refused leaves no trace but its answer; only the engine knows a prompt's length, and
    # what a schema comes to.
    if (field, code) not in {("prompt", "too_large"), ("response_format", "bad_request")}:
        assert error["id"] not in {e["id"] for e in events(asker)}


def events(asker: Requester) -> list[dict[str, Any]]:
    return [h.json for h in asker.heard if h.topic == EVENTS and h.type == "job"]


@pytest.mark.parametrize(
    "user",
    [(("", ""),) * 20_000, (("a", "x" * 65_535),) * 17],
    ids=["20000 of them", "a megabyte"],
)
def test_more_user_properties_than_anybody_needs_are_refused_and_acknowledged(
    asker: Requester, daemon: Daemon, user: tuple[tuple[str, str], ...]
) -> None:
    heard = refused(asker, {"id": "many", "prompt": "x"}, user=user)
    assert (heard.json["id"], heard.json["code"]) == ("many", "bad_request")
    assert "properties: more than 1" in heard.json["message"]
    assert "broker_away" not in daemon.log


def test_a_byte_order_mark_in_a_property_breaks_no_connection(
    asker: Requester, daemon: Daemon
) -> None:
    assert refused(asker, "{", user=(("note", "\ufeffx"),)).json["code"] == "bad_request"
    assert "broker_away" not in daemon.log


def test_an_error_names_the_nearest_field(asker: Requester) -> None:
    assert "max_tokens" in refused(asker, text(max_token=3)).json["message"]


@pytest.mark.parametrize(
    "reply_to",
    [
        f"{BASE}/client/+/rx",
        f"{BASE}/client/#",
        f"{BASE}/client/somebody/rx",
        f"{BASE}/dut/out/res/somebody/1",
        f"{BASE}/dut/out/status",
        f"{BASE}/dut/in/text/somebody",
        f"{BASE}/dut/in/ctl/restart",
        f"{BASE}/client/ASKER",
        f"{BASE}/client/ASKER/../somebody/rx/a/b/c/d",
        f"{BASE}/client/ASKER/\0",
        "$SYS/broker/uptime",
        "elsewhere",
        "",
    ],
)
def test_a_reply_topic_outside_the_rule_is_refused_on_the_default_one(
    asker: Requester, reply_to: str
) -> None:
    asker.listen(f"{BASE}/dut/out/res/{asker.name}/+")
    wanted = reply_to.replace("ASKER", asker.name)
    heard = refused(asker, text(id="r1", reply_to=wanted), reply_to=None)
    assert heard.topic == f"{BASE}/dut/out/res/{asker.name}/r1"
    assert heard.json["code"] == "unauthorized"
    assert heard.json["field"] == "reply_to"


def test_a_response_topic_outside_the_rule_is_refused_on_the_default_one(asker: Requester) -> None:
    asker.listen(f"{BASE}/dut/out/res/{asker.name}/+")
    heard = refused(asker, text(id="r2"), reply_to=f"{BASE}/dut/out/status")
    assert heard.topic == f"{BASE}/dut/out/res/{asker.name}/r2"
    assert heard.json["code"] == "unauthorized"


@pytest.mark.parametrize("payload", [b"not JSON", text(), text(priority=99)])
def test_without_reply_topic_and_client_level_the_answer_is_under_anon(
    asker: Requester, payload: bytes | str
) -> None:
    asker.listen(ANON)
    correlation = uuid.uuid4().bytes
    asker.publish(f"{BASE}/dut/in/text", payload, correlation=correlation)
    heard = told(asker, correlation)
    assert heard.topic == f"{BASE}/dut/out/res/anon/{heard.json['id']}"


@pytest.mark.parametrize(
    "tail",
    [
        "txt",
        "text/a/b",
        "text/a/b/c/d",
        "text/",
        "text/a.b",
        "part/c/i/x",
        "part/c/0",
        "",
        "ctl",
        "ctl/ping/now",
    ],
)
def test_an_unknown_topic_under_in_is_told_to_be_none(asker: Requester, tail: str) -> None:
    asker.listen(ANON)
    correlation = uuid.uuid4().bytes
    asker.publish(f"{BASE}/dut/in/{tail}", text(id="lost"), correlation=correlation)
    heard = told(asker, correlation)
    assert heard.topic == f"{BASE}/dut/out/res/anon/lost"
    assert heard.json["code"] == "not_found"
    assert asker.ask("still here")["text"] == "still here"


@pytest.mark.parametrize("payload", [b"", b"{}", b'{"id": 5}', b'{"id": "a/b"}', b"[1]"])
def test_a_cancel_without_a_sound_id_is_refused(asker: Requester, payload: bytes) -> None:
    correlation = uuid.uuid4().bytes
    topic = f"{BASE}/dut/in/cancel/{asker.name}"
    asker.publish(topic, payload, reply_to=asker.rx, correlation=correlation)
    assert told(asker, correlation).json["code"] == "bad_request"


@pytest.mark.parametrize(
    ("verb", "payload", "code"),
    [
        ("pong", b"", "not_found"),
        ("pauze", b"{}", "not_found"),
        ("v" * 5000, b"{}", "not_found"),
        ("ping", b"{", "bad_request"),
        ("ping", b"[]", "bad_request"),
        ("ping", b'{"verbose": 1}', "bad_request"),
        ("log", b"{}", "bad_request"),
        ("log", b'{"level": "loud"}', "bad_request"),
        ("restart", b'{"what": "world"}', "bad_request"),
        ("ping", b" " * 100_000, "too_large"),
    ],
)
def test_a_wrong_command_is_answered_as_a_command(
    asker: Requester, verb: str, payload: bytes, code: str
) -> None:
    correlation = uuid.uuid4().bytes
    topic = f"{BASE}/dut/in/ctl/{verb}"
    asker.publish(topic, payload, reply_to=asker.rx, correlation=correlation)
    answer = told(asker, correlation).json
    assert (answer["type"], answer["ok"]) == ("ctl", False)
    assert answer["error"]["code"] == code
    assert answer["error"]["message"]
    assert asker.ctl("ping")["ok"]


def test_the_same_id_alike_is_answered_again_and_different_is_a_conflict(asker: Requester) -> None:
    first = asker.ask("one two", id="same")
    asker.request({"prompt": "one two", "id": "same"}, correlation=b"again")
    again = told(asker, b"again").json
    assert again.pop("duplicate") is True
    assert again == first
    asker.request({"prompt": "three", "id": "same"}, correlation=b"other")
    conflict = told(asker, b"other").json
    assert (conflict["code"], conflict["status"], conflict["field"]) == ("id_conflict", 409, "id")
    # Neither hurt the first one's memory.
    asker.request({"prompt": "one two", "id": "same"}, correlation=b"third")
    assert told(asker, b"third").json["text"] == "one two"


def test_the_same_id_of_another_client_is_another_request(asker: Requester, daemon: Daemon) -> None:
    assert asker.ask("mine", id="shared")["text"] == "mine"
    with Requester(daemon.port) as other:
        assert other.ask("theirs", id="shared")["text"] == "theirs"


def test_an_expired_request_is_told_so(asker: Requester, daemon: Daemon) -> None:
    with blocked(daemon):
        asker.request(text(id="late"), expiry_s=1)
        error = asker.outcome("late", 10)
    assert (error["code"], error["status"]) == ("expired", 504)


def test_the_smaller_of_expiry_and_deadline_holds(asker: Requester, daemon: Daemon) -> None:
    with blocked(daemon):
        asker.request(text(id="soon", deadline_ms=200), expiry_s=1000)
        assert asker.outcome("soon", 10)["code"] == "expired"


class blocked:  # noqa: N801 - reads as a with statement
    """The engine is busy with somebody's endless answer inside this block."""

    def __init__(self, daemon: Daemon) -> None:
        self._client = Requester(daemon.port)

    def __enter__(self) -> Requester:
        self._id = uuid.uuid4().hex[:8]
        long = {"prompt": LONG, "id": self._id, "max_tokens": 4000, "stream": "delta"}
        self._client.request(long)
        self._client.wait(lambda h: h.type == "delta", 20, "its first delta")
        return self._client

    def __exit__(self, *_: object) -> None:
        self._client.cancel(self._id)
        self._client.outcome(self._id)
        self._client.close()


def test_of_a_hundred_at_once_of_one_client_its_share_is_taken_and_the_rest_told_to_come_again(
    asker: Requester, daemon: Daemon
) -> None:
    ids = [f"h{n}" for n in range(100)]
    with blocked(daemon):
        for request_id in ids:
            asker.request(text(id=request_id))
        errors = [asker.outcome(request_id) for request_id in ids[16:]]
        assert {(e["code"], e["status"]) for e in errors} == {("busy", 429)}
        assert all(e["retry_after_ms"] > 0 for e in errors)
        with Requester(daemon.port) as other:  # its share is not eaten up by the flood
            other.request(text(id="h0", stream="delta"))
            accepted = other.wait(lambda h: h.type == "accepted", 10).json
            assert accepted["queue_pos"] == 17  # sixteen wait, one runs
    results = [asker.outcome(request_id) for request_id in ids[:16]]
    assert all(r["type"] == "result" for r in results)
    assert all(len(asker.outcomes(request_id)) == 1 for request_id in ids)


def test_of_a_hundred_at_once_of_many_clients_the_backlog_is_taken(daemon: Daemon) -> None:
    askers = [Requester(daemon.port) for _ in range(10)]
    with blocked(daemon):
        for n in range(10):
            for asker in askers:
                asker.request(text(id=f"m{n}"))
        late = [a.outcome(f"m{n}") for n in range(7, 10) for a in askers]
        assert {e["code"] for e in late} == {"busy"}
    outcomes = [asker.outcome(f"m{n}") for n in range(10) for asker in askers]
    for asker in askers:
        asker.close()
    assert Counter(o.get("code", "result") for o in outcomes) == {"result": 64, "busy": 36}


@pytest.mark.parametrize(
    ("verb", "code"), [("pause", "paused"), ("drain", "draining")], ids=["paused", "draining"]
)
def test_a_device_that_takes_none_says_so(asker: Requester, verb: str, code: str) -> None:
    answered = asker.ask("before", id="before")
    assert asker.ctl(verb)["ok"]
    try:
        asker.request(text(id="now"))
        error = asker.outcome("now")
        assert (error["code"], error["status"]) == (code, 503)
        # Bad ones are still told what is wrong with them, and known ones what came of them.
        asker.request(text(priority=99), correlation=b"bad")
        assert told(asker, b"bad").json["code"] == "bad_request"
        asker.request({"prompt": "before", "id": "before"}, correlation=b"known")
        assert told(asker, b"known").json["text"] == answered["text"]
    finally:
        assert asker.ctl("resume")["ok"]
    assert asker.ask("after")["text"] == "after"


def test_while_the_model_cannot_load_requests_are_refused_with_the_reason(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    start_daemon(wait=False, engine__model="slow?load_fail")
    requester.listen(f"{BASE}/dut/out/status")
    requester.status("degraded")
    error = requester.ask("anyone?")
    assert (error["code"], error["status"]) == ("loading", 503)
    assert "the script says that loading fails" in error["message"]


def test_while_the_model_loads_requests_wait(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    start_daemon(wait=False, engine__model="slow?load_ms=1500")
    requester.listen(f"{BASE}/dut/out/status")
    requester.status("loading")
    assert requester.ask("patience")["text"] == "patience"


def test_a_retained_request_is_not_answered_at_each_connect(
    start_daemon: DaemonFactory, requester: Requester, tmp_path: Path
) -> None:
    requester.listen(ANON, EVENTS)
    topic = f"{BASE}/dut/in/text"
    requester.publish(topic, {"prompt": "kept", "id": "kept"}, retain=True, correlation=b"kept")
    requester.publish(f"{BASE}/dut/in/text/{requester.name}", b"not JSON", retain=True)
    requester.publish(f"{BASE}/dut/in/ctl/restart", {"what": "service"}, retain=True)
    daemon = start_daemon()
    assert requester.ask("live")["text"] == "live"
    daemon.stop()
    daemon.start()
    assert requester.ask("live again")["text"] == "live again"
    assert [h for h in requester.heard if h.correlation == b"kept"] == []
    assert {e["id"] for e in events(requester)}.isdisjoint({"kept"})
    assert [h for h in requester.heard if h.type in ("ctl", "error")] == []
