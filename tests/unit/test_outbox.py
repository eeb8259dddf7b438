"""What is published: in order, within the window, and an outcome never lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phid.backlog import Backlog
from phid.bulletin import Bulletin
from phid.crew import Crew
from phid.errors import Code, Failure
from phid.health import Health
from phid.jobs import Finish
from phid.ledger import ReplyAddress
from phid.lineup import Lineup
from phid.messages import CtlReply, Result, StateEvent, Timing, UsageReport, error_message
from phid.outbox import Outbox, Publication
from phid.settings import Settings
from phid.traffic import Connected, Decision, Link, Protocol, Sent
from phid.worker import Worker

HERE = ReplyAddress("here", b"c")


class Recorder(Link):
    """A link that keeps what is published and acknowledges nothing by itself."""

    def __init__(self, session: str = "s") -> None:
        self.session = session
        self.published: list[dict[str, Any]] = []

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, **fields: Any) -> int:
        self.published.append(
            {"topic": topic, "payload": json.loads(payload), "qos": qos, **fields}
        )
        return len(self.published)

    @property
    def ids(self) -> list[str]:
        return [p["payload"]["id"] for p in self.published if "id" in p["payload"]]


def connected(link: Recorder, *, window: int = 20, packet_bytes: int = 10_000) -> Connected:
    return Connected(
        link,
        link.session,
        Protocol.V5,
        resumed=False,
        refused=(),
        packet_bytes=packet_bytes,
        window=window,
    )


def result(name: str, text: str = "x") -> Result:
    return Result(
        id=name,
        client="c",
        device="d",
        model="m",
        provider="cpu",
        text=text,
        finish=Finish.STOP,
        usage=UsageReport(prompt_tokens=1, output_tokens=1),
        timing=Timing(
            queued_ms=0, prefill_ms=0, ttft_ms=0, decode_ms=0, total_ms=0, tokens_per_s=0
        ),
        deltas=0,
    )


def refusal(name: str) -> Any:
    return error_message(name, Failure(Code.BUSY, "full", retry_after_ms=1))


def event(n: int = 0) -> Publication:
    return Publication("event", StateEvent(ts=n, state="online"))


def test_no_more_are_in_flight_than_the_window_allows_and_they_keep_their_order() -> None:
    outbox, link = Outbox(), Recorder()
    outbox.connect(connected(link, window=2))
    for n in range(5):
        outbox.answer(HERE, result(f"r{n}"))
    assert link.ids == ["r0", "r1"]
    outbox.sent(Sent("s", 1))
    assert link.ids == ["r0", "r1", "r2"]
    for mid in (2, 3, 4, 5):
        outbox.sent(Sent("s", mid))
    assert link.ids == [f"r{n}" for n in range(5)]
    assert len(outbox) == 0


def test_an_outcome_that_was_not_acknowledged_is_sent_again_first_and_marked() -> None:
    outbox, link = Outbox(), Recorder()
    outbox.connect(connected(link, window=2))
    for n in range(4):
        outbox.answer(HERE, result(f"r{n}"))
    outbox.sent(Sent("s", 1))  # r0 has arrived; r1 and r2 are in flight, r3 waits
    outbox.disconnect()
    again = Recorder("s2")
    outbox.connect(connected(again))
    assert again.ids == ["r1", "r2", "r3"]
    assert [p["payload"].get("duplicate", False) for p in again.published] == [True, True, False]
    assert {p["correlation"] for p in again.published} == {b"c"}


def test_a_late_word_of_an_old_connection_changes_nothing() -> None:
    outbox = Outbox()
    outbox.connect(connected(Recorder("old")))
    outbox.answer(HERE, result("r"))
    outbox.disconnect()
    outbox.sent(Sent("old", 1))
    outbox.connect(connected(Recorder("new")))
    outbox.sent(Sent("old", 1))
    assert len(outbox) == 1


def test_outcomes_of_a_time_without_a_link_are_sent_unmarked() -> None:
    outbox, link = Outbox(), Recorder()
    outbox.answer(HERE, result("r"))
    outbox.connect(connected(link))
    assert link.ids == ["r"]
    assert "duplicate" not in link.published[0]["payload"]


def test_answers_due_while_the_link_is_being_made_are_kept_and_reports_are_not() -> None:
    """What waited for us at the broker comes before its word that we are subscribed."""
    outbox, link = Outbox(), Recorder()
    outbox.refuse(HERE, refusal("early"))
    outbox.put(event())
    assert outbox.dropped == 1
    outbox.connect(connected(link))
    assert link.ids == ["early"]
    assert len(link.published) == 1


def test_refusals_do_not_outlive_their_connection() -> None:
    outbox, link = Outbox(), Recorder()
    outbox.connect(connected(Recorder(), window=1))
    for n in range(3):
        outbox.refuse(HERE, refusal(f"r{n}"))
    outbox.disconnect()
    outbox.connect(connected(link))
    assert link.published == []


def test_what_is_lost_with_its_connection_is_counted() -> None:
    outbox = Outbox()
    outbox.connect(connected(Recorder(), window=2))
    for n in range(3):
        outbox.put(event(n))
    outbox.refuse(HERE, refusal("refused"))
    outbox.answer(HERE, result("r"))
    outbox.sent(Sent("s", 1))
    assert outbox.dropped == 0
    outbox.disconnect()
    assert (outbox.dropped, len(outbox)) == (3, 1)
    outbox.disconnect()
    assert outbox.dropped == 3


def test_numbers_that_nobody_takes_are_counted(tmp_path: Path) -> None:
    outbox = Outbox()
    crew = Crew(Lineup((), None, None), lambda load: Worker(load, print, restart_max_s=1))
    bulletin = Bulletin(Settings(device="d"), outbox, Health(tmp_path), crew)
    backlog = Backlog(limit=1, per_client=1)
    bulletin.publish_health(backlog, paused=False)
    assert outbox.dropped == 1
    link = Recorder()
    outbox.connect(connected(link))
    bulletin.publish_health(backlog, paused=False)
    (numbers,) = (p["payload"] for p in link.published)
    assert (outbox.dropped, numbers["messages_dropped_total"]) == (1, 1)


def test_a_refusal_is_owed_until_it_is_on_its_way_and_for_good_if_the_link_breaks_first() -> None:
    outbox = Outbox()
    outbox.connect(connected(Recorder(), window=1))
    decisions = [Decision() for _ in range(3)]
    for n, decided in enumerate(decisions):
        outbox.refuse(HERE, refusal(f"r{n}"), decided)
        decided.set()
    assert [d.acknowledges for d in decisions] == [True, False, False]
    outbox.sent(Sent("s", 1))
    assert [d.acknowledges for d in decisions] == [True, True, False]
    outbox.disconnect()
    outbox.connect(connected(Recorder()))
    assert [d.acknowledges for d in decisions] == [True, True, False]


def test_what_can_never_be_published_is_not_owed() -> None:
    outbox, decided = Outbox(), Decision()
    outbox.connect(connected(Recorder(), packet_bytes=20))
    outbox.refuse(HERE, refusal("r"), decided)
    decided.set()
    assert decided.acknowledges


def test_nothing_but_outcomes_grows_without_bound() -> None:
    outbox = Outbox()
    outbox.connect(connected(Recorder(), window=1))
    for n in range(3000):
        outbox.refuse(HERE, refusal(f"r{n}"))
        outbox.repeat(HERE, result(f"d{n}"))
        outbox.put(event(n))
    assert len(outbox) <= 2100
    assert outbox.dropped >= 6900


def test_nothing_new_is_promised_while_outcomes_pile_up_and_a_flood_of_refusals_is_none() -> None:
    outbox = Outbox()
    outbox.connect(connected(Recorder(), window=1))
    for n in range(3000):
        outbox.refuse(HERE, refusal(f"q{n}"))
    assert not outbox.full
    for n in range(1100):
        outbox.answer(HERE, result(f"r{n}"))
    assert outbox.full
    outbox.disconnect()
    assert outbox.full
    outbox.connect(connected(Recorder("s2"), window=200))
    assert not outbox.full


def test_reports_go_first_and_commands_are_answered_last() -> None:
    outbox, link = Outbox(), Recorder()
    outbox.connect(connected(link, window=1))
    for n in range(1500):
        outbox.put(event(n))
        outbox.refuse(HERE, refusal(f"q{n}"))
    owed = [Decision() for _ in range(3000)]
    for n, decided in enumerate(owed):
        outbox.refuse(HERE, refusal(f"r{n}"), decided)
    waiting = sum(decided.owed for decided in owed)
    assert 1000 < waiting < 3000
    assert len(outbox) < 4200
    outbox.answer(HERE, CtlReply(id="c", verb="ping", ok=True))
    for mid in range(1, 5000):
        outbox.sent(Sent("s", mid))
    assert not any(decided.owed for decided in owed)
    assert link.ids[-1] == "c"


def test_deltas_are_not_piled_up_in_front_of_a_link_that_does_not_write() -> None:
    outbox, link = Outbox(), Recorder()
    assert outbox.congested
    assert not outbox.send_now("t", b"{}")
    outbox.connect(connected(link))
    sent = [outbox.send_now("t", b"{}") for _ in range(100)]
    assert sent.count(True) < 50
    assert outbox.congested
    for mid in range(1, 51):
        outbox.sent(Sent("s", mid))
    assert not outbox.congested
    assert outbox.send_now("t", b"{}")


def test_an_answer_that_the_broker_would_not_take_becomes_an_error_that_it_does() -> None:
    outbox, link = Outbox(), Recorder()
    outbox.connect(connected(link, packet_bytes=1000))
    outbox.answer(HERE, result("big", "x" * 2000))
    (told,) = (p["payload"] for p in link.published)
    assert (told["id"], told["type"], told["code"]) == ("big", "error", "too_large")
    assert not outbox.send_now("t", b'"' + b"x" * 2000 + b'"')


def test_a_report_that_the_broker_would_not_take_is_dropped_and_the_next_one_sent() -> None:
    outbox, link = Outbox(), Recorder()
    outbox.connect(connected(link, packet_bytes=400))
    outbox.put(Publication("event", StateEvent(ts=0, state="x" * 500)))
    outbox.put(event())
    assert len(link.published) == 1
    assert outbox.dropped == 1


@given(st.lists(st.sampled_from(["answer", "ack", "cut", "connect"]), max_size=60))
def test_every_outcome_is_published_and_only_marked_ones_twice(steps: list[str]) -> None:
    outbox, links, count = Outbox(), [Recorder("s0")], 0
    acked: set[str] = set()
    outbox.connect(connected(links[-1], window=3))
    up, given_back = True, 0
    for step in [*steps, "connect", *["ack"] * 60]:
        if step == "answer":
            outbox.answer(HERE, result(f"r{count}"))
            count += 1
        elif step == "ack" and up and given_back < len(links[-1].published):
            given_back += 1
            acked.add(links[-1].ids[given_back - 1])
            outbox.sent(Sent(links[-1].session, given_back))
        elif step == "cut" and up:
            outbox.disconnect()
            up = False
        elif step == "connect" and not up:
            links.append(Recorder(f"s{len(links)}"))
            outbox.connect(connected(links[-1], window=3))
            up, given_back = True, 0
    assert acked == {f"r{n}" for n in range(count)}
    assert len(outbox) == 0
    unmarked = [
        p["payload"]["id"]
        for link in links
        for p in link.published
        if "duplicate" not in p["payload"]
    ]
    assert len(unmarked) == len(set(unmarked))


@pytest.mark.parametrize("code", list(Code))
def test_an_error_tells_its_status_to_clients_that_read_no_json(code: Code) -> None:
    outbox, link = Outbox(), Recorder()
    outbox.connect(connected(link))
    outbox.answer(HERE, error_message("i", Failure(code, "why")))
    assert dict(link.published[0]["user"])["status"] == str(code.status)
