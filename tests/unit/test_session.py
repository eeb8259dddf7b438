"""Which protocol is spoken, who gives way, and what silence means: decided without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from phid.loopback import Loopback
from phid.messages import Status, encode
from phid.rivals import Rivals
from phid.sections import Mqtt
from phid.session import Protocols
from phid.topics import Topics
from phid.traffic import Connected, End, Endpoint, Link, Protocol, Sent

DAY = 86_400.0


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def protocols(memory: Path | None, clock: Clock, protocol: Any = "auto") -> Protocols:
    return Protocols(Endpoint(Mqtt(protocol=protocol), "me", ()), memory, clock)


def refuse_5(policy: Protocols, times: int) -> None:
    for _ in range(times):
        assert policy.choose() is Protocol.V5
        policy.failed(Protocol.V5, End.NO_SUCH_PROTOCOL)


def test_three_refusals_of_mqtt_5_lead_to_a_try_with_3_1_1(tmp_path: Path, clock: Clock) -> None:
    policy = protocols(tmp_path / "b.json", clock)
    refuse_5(policy, 3)
    assert policy.choose() is Protocol.V311
    assert not (tmp_path / "b.json").exists()  # nothing is known before it has worked
    policy.connected(Protocol.V311)
    assert policy.choose() is Protocol.V311
    assert protocols(tmp_path / "b.json", clock).choose() is Protocol.V311


def test_a_broker_that_takes_neither_is_not_taken_for_an_old_one(clock: Clock) -> None:
    policy = protocols(None, clock)
    refuse_5(policy, 3)
    policy.failed(Protocol.V311, End.NO_SUCH_PROTOCOL)
    refuse_5(policy, 3)
    assert policy.choose() is Protocol.V311


def test_a_broker_known_to_speak_mqtt_5_is_not_given_up_for_a_bad_minute(
    tmp_path: Path, clock: Clock
) -> None:
    """A proxy whose broker is down closes connections just as an old broker does."""
    policy = protocols(tmp_path / "b.json", clock)
    policy.connected(Protocol.V5)
    refuse_5(policy, 29)
    policy.connected(Protocol.V5)
    policy = protocols(tmp_path / "b.json", clock)  # a restart does not forget it
    refuse_5(policy, 30)
    assert policy.choose() is Protocol.V311


def test_an_unreachable_broker_says_nothing_of_what_it_speaks(clock: Clock) -> None:
    policy = protocols(None, clock)
    for _ in range(10):
        policy.failed(Protocol.V5, End.UNREACHABLE)
    assert policy.choose() is Protocol.V5


def test_mqtt_5_is_tried_again_after_a_day_and_one_refusal_is_enough_then(
    tmp_path: Path, clock: Clock
) -> None:
    policy = protocols(tmp_path / "b.json", clock)
    refuse_5(policy, 3)
    policy.connected(Protocol.V311)
    clock.now += DAY + 1
    refuse_5(policy, 1)
    assert policy.choose() is Protocol.V311
    policy.connected(Protocol.V311)
    assert protocols(tmp_path / "b.json", clock).choose() is Protocol.V311


def test_a_broker_that_has_learnt_mqtt_5_is_forgotten_as_an_old_one(
    tmp_path: Path, clock: Clock
) -> None:
    policy = protocols(tmp_path / "b.json", clock)
    refuse_5(policy, 3)
    policy.connected(Protocol.V311)
    clock.now += DAY + 1
    policy.connected(policy.choose())
    clock.now -= DAY
    assert protocols(tmp_path / "b.json", clock).choose() is Protocol.V5


@pytest.mark.parametrize("setting", ["5", "3.1.1"])
def test_what_is_set_is_spoken_whatever_happens(clock: Clock, setting: str) -> None:
    policy = protocols(None, clock, setting)
    wanted = policy.choose()
    for _ in range(5):
        policy.failed(wanted, End.NO_SUCH_PROTOCOL)
    assert policy.choose() is wanted
    assert wanted is (Protocol.V5 if setting == "5" else Protocol.V311)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"schema": 2, "brokers": {"localhost:1883": {"fell_back_at": 1800000000}}}',
        '{"schema": 1, "brokers": []}',
        '{"schema": 1, "brokers": {"localhost:1883": 7}}',
        '{"schema": 1, "brokers": {"localhost:1883": {"fell_back_at": "x"}}}',
        # From a clock that was set back since.
        json.dumps({"schema": 1, "brokers": {"localhost:1883": {"fell_back_at": 1_900_000_000}}}),
    ],
)
def test_a_memory_that_makes_no_sense_is_none(tmp_path: Path, clock: Clock, content: str) -> None:
    (tmp_path / "b.json").write_text(content)
    assert protocols(tmp_path / "b.json", clock).choose() is Protocol.V5


def test_a_memory_that_cannot_be_written_is_no_fault(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "file").touch()
    policy = protocols(tmp_path / "file" / "b.json", clock)
    refuse_5(policy, 3)
    policy.connected(Protocol.V311)
    assert policy.choose() is Protocol.V311


def status(session: str, ts: int = 1, state: Any = "online") -> bytes:
    return encode(Status(state=state, session=session, since=1, ts=ts, version="0"))


def rivals_of(process: str) -> Rivals:
    """Of one that has heard its own first word come back: what waited for it came before."""
    rivals = Rivals(process)
    assert not rivals.heard(status(f"{process}-1"), 0)
    return rivals


def test_the_last_words_of_a_process_before_us_are_no_rival() -> None:
    rivals = rivals_of("mmmm")
    assert not rivals.heard(status("aaaa-7"), 0)
    assert not rivals.heard(status("aaaa-7", 2, "draining"), 0.1)
    assert not rivals.heard(status("aaaa-7", 3, "offline"), 20)  # its will, by a broker that waits
    assert not rivals.heard(status("aaaa-7"), 90)  # retained, and told again when we reconnect
    assert not rivals.heard(status("mmmm-1"), 0)
    assert not rivals.heard(status("mmmm-2", 9), 90)


def test_what_a_process_that_has_ended_never_read_of_itself_is_no_rival() -> None:
    """It had lost a connection with each; the broker kept them in the session that is ours now."""
    rivals = Rivals("mmmm")
    left = [status(f"aaaa-{n}", n, state) for n in (1, 2, 3) for state in ("online", "offline")]
    # A slow link brings the last of them late.
    assert not any(rivals.heard(word, 20.0 * at) for at, word in enumerate(left))
    assert not rivals.heard(status("mmmm-1", 9, "offline"), 130)  # a will: we may not have spoken
    assert not rivals.heard(status("aaaa-4", 4), 140)
    assert not rivals.heard(status("mmmm-2", 9), 150)
    assert rivals.heard(status("aaaa-5", 5), 151), "it spoke after us"


def test_the_wills_of_a_process_that_has_ended_are_no_rival() -> None:
    """Each connection it lost left one, and the broker may have kept them all for us."""
    rivals = rivals_of("mmmm")
    wills = [status(f"aaaa-{n}", n, "offline") for n in range(1, 4)]
    assert not any(rivals.heard(will, at) for at, will in enumerate(wills))
    assert not rivals.heard(status("aaaa-4"), 20)  # nor is what it said between them
    assert not rivals.heard(status("aaaa-4", 9, "offline"), 40)


def test_one_with_a_client_id_of_its_own_is_a_rival_once_it_goes_on_speaking() -> None:
    smaller, greater = rivals_of("aaaa"), rivals_of("zzzz")
    at = (0, 5, 30)
    assert not any(smaller.heard(status("zzzz-1", 1 + n), n) for n in at)
    assert [greater.heard(status("aaaa-1", 1 + n), n) for n in at] == [False, False, True]


def test_of_two_rivals_exactly_one_gives_way() -> None:
    smaller, greater = rivals_of("aaaa"), rivals_of("zzzz")
    gave_way = {
        "smaller": [smaller.heard(status(f"zzzz-{n}"), 0) for n in range(1, 4)],
        "greater": [greater.heard(status(f"aaaa-{n}"), 0) for n in range(1, 4)],
    }
    assert gave_way == {"smaller": [False] * 3, "greater": [False, True, True]}


@pytest.mark.parametrize("payload", [b"", b"{}", b"\xff", b'{"session": "aaaa-1"}'])
def test_what_is_no_status_is_no_rival(payload: bytes) -> None:
    assert not Rivals("zzzz").heard(payload, 0)


class Wire:
    """Keeps what is published, as a connection would send it."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, bytes]] = []

    def publish(self, topic: str, payload: bytes) -> int:
        self.sent.append((topic, payload))
        return len(self.sent)


def connected(wire: Wire, protocol: Protocol = Protocol.V5, *, beside: bool = True) -> Connected:
    link = cast("Link", wire)
    return Connected(
        link,
        "p-1",
        protocol,
        resumed=False,
        refused=(),
        packet_bytes=10_000,
        window=20,
        beside=beside,
    )


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
def loopback(wire: Wire) -> Loopback:
    loopback = Loopback(Topics("phid/v1", "dut"))
    loopback.connect(connected(wire), 0.0)
    assert wire.sent[0][0] == "phid/v1/dut/in/ctl/ping"
    return loopback


def ping_id(wire: Wire) -> str:
    return str(json.loads(wire.sent[-1][1])["id"])


def test_a_ping_that_comes_back_proves_the_way(loopback: Loopback, wire: Wire) -> None:
    assert loopback.heard(ping_id(wire))
    loopback.tick(1000.0)
    assert not loopback.silenced
    assert not loopback.heard("somebody-elses")


def test_a_ping_that_does_not_come_back_is_tried_again(loopback: Loopback, wire: Wire) -> None:
    loopback.tick(9.0)
    assert not loopback.silenced
    loopback.tick(11.0)
    assert loopback.silenced
    loopback.tick(80.0)
    assert len(wire.sent) == 2
    assert loopback.heard(ping_id(wire))
    assert not loopback.silenced


def test_a_ping_that_may_not_be_sent_proves_nothing(loopback: Loopback) -> None:
    loopback.sent(Sent("p-1", 1, refusal="Not authorized"))
    loopback.tick(1000.0)
    assert not loopback.silenced


def test_a_ping_that_nobody_is_subscribed_to_is_silence_at_once(loopback: Loopback) -> None:
    loopback.sent(Sent("p-1", 1, heard=False))
    assert loopback.silenced


def test_in_3_1_1_it_is_not_tried(wire: Wire) -> None:
    loopback = Loopback(Topics("phid/v1", "dut"))
    loopback.connect(connected(wire, Protocol.V311), 0.0)
    loopback.tick(1000.0)
    assert not wire.sent
    assert not loopback.silenced


def test_a_broker_that_takes_one_at_a_time_is_not_asked(wire: Wire) -> None:
    loopback = Loopback(Topics("phid/v1", "dut"))
    loopback.connect(connected(wire, beside=False), 0.0)
    loopback.tick(1000.0)
    assert not wire.sent
    assert not loopback.silenced
