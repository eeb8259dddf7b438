"""What is gathered of a fleet, whoever it was that published it."""

from __future__ import annotations

import json

import pytest

from phid.fleet import Fleet, table
from phid.traffic import Inbound


def heard(*said: tuple[str, bytes]) -> Fleet:
    fleet = Fleet("phid/v1")
    for out, payload in said:
        fleet.take(Inbound(f"phid/v1/porch/out/{out}", payload, 0, retain=True, dup=False))
    return fleet


def status(**fields: object) -> tuple[str, bytes]:
    return "status", json.dumps({"state": "online", "session": "s2", "ts": 1} | fields).encode()


def test_a_will_of_an_earlier_connection_is_stale() -> None:
    fleet = heard(status(), status(state="offline", session="s1", reason="lwt"))
    assert fleet.devices()[0].row()["state"] == "online"


def test_a_will_of_this_connection_is_not() -> None:
    fleet = heard(status(), status(state="offline", session="s2", reason="lwt"))
    assert fleet.devices()[0].row()["state"] == "offline"


@pytest.mark.parametrize("ts", [0, -1, 2**32, 2**63, 1e308, "soon", None, [], True])
def test_no_time_stamp_ends_the_table(ts: object) -> None:
    assert heard(status(ts=ts)).devices()[0].row()["seen_s_ago"] >= 0


@pytest.mark.parametrize(
    "payload",
    [b"", b"[]", b"1", b"\xff", b"[" * 100_000, b'{"ts":' * 50_000, b'{"ts": 1e400}', b"NaN"],
)
def test_what_is_no_object_of_ours_is_passed_over(payload: bytes) -> None:
    fleet = heard(status(), ("info", payload), ("health", payload))
    assert fleet.devices()[0].row()["state"] == "online"
    assert table(fleet)


def test_what_would_move_the_cursor_is_shown_and_not_sent() -> None:
    shown = table(heard(status(reason="\x1b[2J\r\nporch  online\u202e", model="x" * 10_000)))
    assert len(shown.splitlines()) == 2
    assert shown.replace("\n", "").isprintable()
    assert len(shown) < 2000


@pytest.mark.parametrize("model", ["phi", 7, [], {"model": {}}])
def test_a_model_may_be_anything(model: object) -> None:
    assert table(heard(status(), ("info", json.dumps({"model": model}).encode())))
