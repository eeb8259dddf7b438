from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from phid import messages, recovery
from phid.entries import Accepted, Row
from phid.errors import Code, Failure
from phid.intake import Intake
from phid.ledger import Ledger, ReplyAddress
from phid.messages import ErrorMessage
from phid.recovery import Again, Over
from phid.topics import Topics
from phid.traffic import Inbound

INTAKE = Intake(Topics("phid/v1", "dev"), payload_bytes=1 << 20, max_tokens=100, deadline_ms=90_000)
ADDRESS = ReplyAddress("phid/v1/client/c/rx", b"corr")
LATE = messages.error_message("r", Failure(Code.EXPIRED, "late"))
OUTCOME = messages.encode(LATE).decode()
WALL, NOW = 1_800_000_000.0, 500.0


def row(payload: bytes = b'{"prompt": "x"}', **fields: Any) -> Row:
    """Accepted ten seconds ago, with a deadline of a minute."""
    inbound = Inbound("phid/v1/dev/in/text/c", payload, qos=1, retain=False, dup=False)
    accepted = Accepted(
        *(3, "c", "r", False, "digest", inbound, ADDRESS),
        accepted_ts=WALL - 10,
        deadline_ts=WALL + 50,
    )
    known: dict[str, Any] = {"marked": False, "addresses": (), "outcome": None}
    return Row(**{"accepted": accepted, "ended_ts": 0.0, "told": False} | known | fields)


def ledger() -> Ledger:
    return Ledger(keep_s=600, keep_entries=10)


def one(*rows: Row, wall: float = WALL) -> Again | Over:
    (found,) = recovery.read(rows, INTAKE, ledger(), now=NOW, wall=wall)
    assert isinstance(found, Again | Over)
    return found


def test_what_had_not_begun_runs_again_with_the_time_that_is_left() -> None:
    again = one(row(addresses=(ReplyAddress("other"),)))
    assert isinstance(again, Again)
    arrived = again.arrived
    assert (arrived.client, arrived.id, arrived.id_given) == ("c", "r", False)
    assert (arrived.digest, arrived.reply) == ("digest", ADDRESS)
    assert again.arrived_at == NOW - 10
    assert again.arrived_at + arrived.deadline_s == NOW + 50
    assert again.addresses == (ReplyAddress("other"),)


def test_a_clock_that_is_not_set_yet_makes_nothing_late() -> None:
    again = one(row(), wall=3600.0)
    assert isinstance(again, Again)
    assert again.arrived_at == NOW
    assert again.arrived.deadline_s == 60


def test_a_clock_that_was_not_set_then_makes_nothing_late() -> None:
    early = replace(row().accepted, accepted_ts=100.0, deadline_ts=160.0)
    again = one(replace(row(), accepted=early))
    assert isinstance(again, Again)
    assert (again.arrived_at, again.arrived.deadline_s) == (NOW, 60)
    over = one(row(outcome=OUTCOME, ended_ts=100.0))
    assert isinstance(over, Over)
    assert over.ticket.forget_at == NOW + 600


def test_what_was_heard_of_is_not_run_again() -> None:
    over = one(row(marked=True))
    assert isinstance(over, Over)
    assert over.failure is not None
    assert over.failure.code is Code.ENGINE_LOST
    assert (over.ticket.key, over.ticket.address) == (("c", "r"), ADDRESS)


def test_what_these_settings_do_not_take_is_told_why() -> None:
    over = one(row(b'{"prompt": "x", "max_tokens": 101}'))
    assert isinstance(over, Over)
    assert over.failure is not None
    assert (over.failure.code, over.failure.field) == (Code.BAD_REQUEST, "max_tokens")


@pytest.mark.parametrize("told", [True, False])
def test_an_outcome_is_kept_as_long_as_it_would_have_been(*, told: bool) -> None:
    over = one(row(outcome=OUTCOME, ended_ts=WALL - 100, told=told))
    assert isinstance(over, Over)
    assert over.failure is None
    assert isinstance(over.ticket.outcome, ErrorMessage)
    assert over.ticket.outcome == LATE
    assert over.ticket.told is told
    assert over.ticket.forget_at == NOW - 100 + 600


@pytest.mark.parametrize("outcome", ["{", "{}", '{"type":"result","id":7}', '{"type":"ctl"}'])
@pytest.mark.parametrize("told", [True, False])
def test_an_outcome_that_cannot_be_read_any_more_is_told_as_that(
    outcome: str, *, told: bool
) -> None:
    over = one(row(outcome=outcome, told=told))
    assert isinstance(over, Over)
    assert over.failure is None
    message = over.ticket.outcome
    assert isinstance(message, ErrorMessage)
    assert (message.id, message.code) == ("r", Code.INTERNAL)
    assert over.ticket.told is told, "what was told is not told again"


def test_a_request_that_cannot_be_read_any_more_is_answered_and_not_guessed_at() -> None:
    over = one(row(damaged=True))
    assert isinstance(over, Over)
    assert over.failure is not None
    assert over.failure.code is Code.INTERNAL
    assert over.ticket.outcome is None


def test_a_request_whose_way_back_was_allowed_is_not_read_by_another() -> None:
    inbound = replace(row().accepted.inbound, payload=b'{"prompt": "x", "reply_to": "not/ours"}')
    told = replace(row().accepted, inbound=replace(inbound, response_topic=ADDRESS.topic))
    again = one(row(accepted=told))
    assert isinstance(again, Again)
    assert again.arrived.reply == ADDRESS


NEVER = (math.nan, math.inf, -math.inf, 1e300, -1e300)


@pytest.mark.parametrize(
    ("accepted_ts", "deadline_ts"),
    [
        *((never, WALL) for never in NEVER),
        *((WALL, never) for never in NEVER),
        *((never, never) for never in NEVER),
        (0.0, WALL),
        (WALL, 0.0),
        (WALL, WALL + 1e9),
    ],
)
@pytest.mark.parametrize("wall", [WALL, 3600.0])
def test_a_request_whose_times_cannot_be_right_is_answered_and_not_kept(
    accepted_ts: float, deadline_ts: float, wall: float, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = replace(row().accepted, accepted_ts=accepted_ts, deadline_ts=deadline_ts)
    over = one(row(accepted=damaged), wall=wall)
    assert isinstance(over, Over)
    assert over.failure is not None
    assert over.failure.code is Code.INTERNAL
    assert NOW - wall <= over.ticket.arrived <= over.ticket.deadline <= NOW
    assert "times_unreadable" in "".join(capsys.readouterr())
    over = one(row(accepted=damaged, outcome=OUTCOME, ended_ts=wall), wall=wall)
    assert isinstance(over, Over)
    assert (over.ticket.outcome, over.ticket.forget_at) == (LATE, NOW + 600)


@pytest.mark.parametrize("ended_ts", [*NEVER, 0.0, WALL + 1e9])
def test_an_outcome_of_an_unknown_time_counts_as_new(ended_ts: float) -> None:
    over = one(row(outcome=OUTCOME, ended_ts=ended_ts))
    assert isinstance(over, Over)
    assert over.ticket.forget_at == NOW + 600


def test_the_order_is_that_of_acceptance() -> None:
    rows = [named(n, f"r{n}", b'{"prompt": "x"}') for n in (1, 2, 5)]
    found = recovery.read(tuple(rows), INTAKE, ledger(), now=NOW, wall=WALL)
    assert [entry.number for entry in found if isinstance(entry, Again)] == [1, 2, 5]


def named(number: int, request_id: str, message: bytes) -> Row:
    """A request under this name on the disk, and what its message says."""
    was = row(message)
    return replace(was, accepted=replace(was.accepted, number=number, id=request_id))


R1, R2, UNNAMED, LOST = (
    *(b'{"prompt": "x", "id": "r%d"}' % n for n in (1, 2)),
    *(b'{"prompt": "x"}', b"{"),
)


@pytest.mark.parametrize(
    ("messages_said", "own", "told"),
    [
        ((R1, R2), 1, "r1"),
        ((R2, R1), 0, "r1"),
        ((R2, R2), 0, "r2"),
        ((UNNAMED, R1), 0, "r1"),
        ((R1, LOST), 1, "r1"),
        ((LOST, R2), 1, "r2"),
    ],
)
def test_of_two_open_requests_with_one_name_the_one_it_belongs_to_keeps_it(
    messages_said: tuple[bytes, bytes], own: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tuple(named(1 + n, "r2", said) for n, said in enumerate(messages_said))
    found = list(recovery.read(rows, INTAKE, ledger(), now=NOW, wall=WALL))
    (over,) = [entry for entry in found if isinstance(entry, Over) and entry.number != own + 1]
    assert over.failure is not None
    assert over.failure.code is Code.INTERNAL
    assert over.ticket.key == ("c", told)
    assert "name_unreadable" in "".join(capsys.readouterr())
    kept = next(entry for entry in found if entry is not over)
    assert isinstance(kept, Over if messages_said[own] == LOST else Again)
    assert len(found) == 2


def test_the_name_of_an_outcome_is_the_one_that_it_was_told_under() -> None:
    ended = replace(named(1, "other", R1), outcome=OUTCOME)
    over = one(ended)
    assert isinstance(over, Over)
    assert over.ticket.key == ("c", "r")


@pytest.mark.parametrize(
    ("name", "told"),
    [("r", "phid/v1/dev/out/res/c/r"), ("r#", "phid/v1/dev/out/res/anon/unreadable")],
)
@pytest.mark.parametrize("outcome", [None, OUTCOME])
def test_a_way_back_that_is_none_any_more_is_not_taken(
    name: str, told: str, outcome: str | None
) -> None:
    lost, sound = ReplyAddress("phid/v1/client/#/rx", b"corr"), ReplyAddress("other")
    accepted = replace(row().accepted, address=lost, id=name)
    over = one(row(accepted=accepted, addresses=(lost, sound), outcome=outcome))
    assert isinstance(over, Over)
    assert over.ticket.address == ReplyAddress(told, b"corr")
    assert over.ticket.late_addresses == [sound]
    if outcome is None:
        assert over.failure is not None
        assert over.failure.code is Code.INTERNAL
    else:
        assert over.ticket.outcome == LATE
    again = one(row(addresses=(lost, sound)))
    assert isinstance(again, Again)
    assert (again.arrived.reply, again.addresses) == (ADDRESS, (sound,))
