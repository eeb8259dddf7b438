"""How much is kept of what was said, and what is forgotten first."""

from __future__ import annotations

import queue
from pathlib import Path

import pytest

from phid.conversations import Conversations
from phid.entries import ConversationDropped, ConversationKept, JournalEvent, Left, Written
from phid.errors import Code, Refused
from phid.health import Health
from phid.jobs import Job, Turn
from phid.journal import Journal
from phid.ledger import ReplyAddress, Ticket
from phid.records import Records
from phid.requests import Request
from phid.sections import Sessions


def ticket(said: str, session: str | None = "s", client: str = "me", system: str = "") -> Ticket:
    turns = (Turn("user", said),)
    if system:
        turns = (Turn("system", system), *turns)
    return Ticket(
        client=client,
        id="x",
        digest="",
        request=Request(prompt=said, session=session),
        job=Job("1", turns),
        size_bytes=0,
        address=ReplyAddress("t"),
        arrived=0.0,
        deadline=9.0,
        topic="t",
        id_given=True,
    )


def conversations(records: Records | None = None, **limits: int) -> Conversations:
    health = Health(Path())
    return Conversations(Sessions(**limits), records or Records(None, health), health)


def said(kept: Conversations, session: str = "s", client: str = "me") -> list[str]:
    return [turn.content for turn in kept.job(ticket("?", session, client), 0.0).history or ()]


def test_the_oldest_exchanges_go_where_there_is_too_much_text() -> None:
    kept = conversations(chars=256)
    for n in range(8):
        history = len(said(kept))
        kept.add(ticket(f"{n}" * 50), f"{n}" * 50, history, 0.0)
    assert said(kept) == [f"{n}" * 50 for n in (6, 6, 7, 7)]
    # Of a system turn nothing is cut off.
    kept.add(ticket("8", system="y" * 200), "8", 4, 0.0)
    assert said(kept) == ["8", "8"]
    kept.add(ticket("9" * 300), "9", 2, 0.0)
    assert said(kept) == []


def test_what_the_model_was_not_shown_is_not_kept_either() -> None:
    kept = conversations()
    for n in range(3):
        kept.add(ticket(f"q{n}"), f"a{n}", 2 * n, 0.0)
    kept.add(ticket("q3"), "a3", 2, 0.0)
    assert said(kept) == ["q2", "a2", "q3", "a3"]
    kept.add(ticket("q4"), "a4", 0, 0.0)
    assert said(kept) == ["q4", "a4"]


def test_one_clients_many_do_not_cost_another_its_own() -> None:
    kept = conversations(most=4, per_client=3)
    kept.add(ticket("x", "s", "other"), "x", 0, 0.0)
    for n in range(5):
        kept.add(ticket(f"{n}", f"s{n}"), "x", 0, 1.0)
    assert said(kept, "s", "other") == ["x", "x"]
    assert [bool(said(kept, f"s{n}")) for n in range(5)] == [False, False, True, True, True]


def test_use_keeps_a_conversation() -> None:
    kept = conversations(keep_s=10)
    kept.add(ticket("used", "used"), "x", 0, 0.0)
    kept.add(ticket("idle", "idle"), "x", 0, 1.0)
    kept.job(ticket("?", "used"), 8.0)
    kept.prune(12.0)
    assert kept.job(ticket("?", "idle"), 12.0).history == ()
    assert len(kept.job(ticket("?", "used"), 12.0).history or ()) == 2
    kept.prune(22.0)
    assert kept.job(ticket("?", "used"), 22.0).history == ()


def test_a_request_without_a_session_is_left_as_it_is() -> None:
    kept = conversations()
    plain = ticket("x", None)
    kept.add(plain, "y", 0, 0.0)
    assert kept.job(plain, 0.0) is plain.job


@pytest.fixture
def unread(tmp_path: Path) -> Records:
    """The owner's side of a journal that could not be read yet."""
    journal = Journal(tmp_path / "journal.db", lambda _: None, max_bytes=1 << 20)
    journal.unread = True
    return Records(journal, Health(Path()))


def test_nothing_is_gone_on_with_before_what_was_kept_can_be_read(unread: Records) -> None:
    kept = conversations(unread)
    kept.check(None)
    with pytest.raises(Refused) as refused:
        kept.check("s")
    assert (refused.value.failure.code, refused.value.failure.field) == (Code.BUSY, "session")
    assert refused.value.failure.retry_after_ms


def test_what_is_forgotten_before_it_can_be_read_is_forgotten(unread: Records) -> None:
    kept = conversations(unread)
    kept.forget("me", "s")
    turns = Turn("user", "q"), Turn("assistant", "a")
    left = [ConversationKept("me", name, "", turns, 1e9) for name in ("s", "t")]
    kept.restore(tuple(left), 0.0, 1e9)
    unread.recovered()
    assert (said(kept), said(kept, "t")) == ([], ["q", "a"])


def test_those_left_are_forgotten_in_the_order_of_their_use(unread: Records) -> None:
    kept = conversations(unread, most=2, keep_s=100)
    turns = Turn("user", "q"), Turn("assistant", "a")
    ages = {"old": 90, "new": 10, "older": 95, "over": 101}
    left = [ConversationKept(f"c-{s}", s, "", turns, 1e9 - age) for s, age in ages.items()]
    kept.restore(tuple(left), 500.0, 1e9)
    assert [bool(said(kept, s, f"c-{s}")) for s in ages] == [True, True, False, False]


def test_each_change_is_on_the_disk_with_its_turn(tmp_path: Path) -> None:
    heard: queue.SimpleQueue[JournalEvent] = queue.SimpleQueue()
    journal = Journal(tmp_path / "journal.db", heard.put, max_bytes=1 << 20)
    assert journal.open() == Left()
    records = Records(journal, Health(Path()))
    kept = conversations(records)
    for n in range(2):
        kept.add(ticket(f"q{n} \U0001f600", system="Be brief."), f"a{n}", 2 * n, 0.0)
    records.commit()
    written = heard.get(timeout=10)
    assert isinstance(written, Written)
    assert [type(entry) for entry in written.entries] == [ConversationKept] * 2
    kept.forget("me", "t")  # there is none
    kept.add(ticket("x", "u"), "y", 0, 0.0)
    kept.forget("me", "u")
    records.commit()
    written = heard.get(timeout=10)
    assert isinstance(written, Written)
    assert [type(entry) for entry in written.entries] == [ConversationKept, ConversationDropped]
    journal.stop()
    again = Journal(tmp_path / "journal.db", heard.put, max_bytes=1 << 20)
    left = again.open()
    again.stop()
    assert left is not None
    (one,) = left.conversations
    turns = [(role, f"{letter}{n}{end}") for n in range(2) for role, letter, end in ROLES]
    assert (one.client, one.session, one.system) == ("me", "s", "Be brief.")
    assert [(turn.role, turn.content) for turn in one.turns] == turns


ROLES = (("user", "q", " \U0001f600"), ("assistant", "a", ""))
