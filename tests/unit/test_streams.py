"""Deltas: they count from 0 and join to a prefix of the answer, whatever is sent and when."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from phid.messages import Delta
from phid.streams import DeltaStream

INTERVAL = 0.1
steps = st.lists(
    st.tuples(
        st.sampled_from(["add", "look", "fail", "mute"]),
        st.text(max_size=4),
        st.floats(0, 0.3),
    ),
    max_size=40,
)


@given(steps, st.booleans())
def test_whatever_happens_deltas_count_up_and_join_to_a_prefix(
    steps: list[tuple[str, str, float]], wanted: bool
) -> None:
    stream = DeltaStream("i", wanted=wanted, interval_s=INTERVAL)
    now, whole, muted = 0.0, "", False
    sent: list[tuple[float, Delta]] = []
    for what, text, pause in steps:
        now += pause
        if what == "add":
            stream.add(text)
            whole += text
        elif what == "mute":
            stream.mute()
            muted = muted or bool(sent)
        elif (delta := stream.due(now)) is not None and what == "look":
            stream.sent(now)
            sent.append((now, delta))
            assert not muted, "after a loss nothing more is sent"
    if (delta := stream.due(now, last=True)) is not None:
        stream.sent(now)
        sent.append((now + INTERVAL, delta))
    assert [d.seq for _, d in sent] == list(range(len(sent)))
    assert all(d.text for _, d in sent)
    joined = "".join(d.text for _, d in sent)
    assert whole.startswith(joined)
    assert stream.text == whole
    assert stream.published == len(sent)
    if wanted and not muted:
        assert joined == whole
    if not wanted:
        assert sent == []
    times = [at for at, _ in sent]
    assert all(b - a > INTERVAL - 1e-9 for a, b in pairwise(times))


def test_the_first_delta_is_due_at_once_and_the_next_after_the_interval() -> None:
    stream = DeltaStream("i", wanted=True, interval_s=INTERVAL)
    assert stream.due_at is None
    stream.add("a")
    assert stream.due(5.0) == Delta(id="i", seq=0, text="a")
    stream.sent(5.0)
    stream.add("b")
    stream.add("c")
    assert stream.due_at == 5.1
    assert stream.due(5.05) is None
    assert stream.due(5.1) == Delta(id="i", seq=1, text="bc")


def test_a_delta_that_could_not_be_sent_waits_and_grows() -> None:
    stream = DeltaStream("i", wanted=True, interval_s=INTERVAL)
    stream.add("a")
    assert stream.due(0.0) is not None
    stream.add("b")
    assert stream.due(0.0) == Delta(id="i", seq=0, text="ab")


def test_a_lost_connection_before_the_first_delta_costs_nothing() -> None:
    stream = DeltaStream("i", wanted=True, interval_s=INTERVAL)
    stream.add("a")
    stream.mute()
    assert stream.due(0.0) == Delta(id="i", seq=0, text="a")


def test_what_is_not_sent_is_counted() -> None:
    stream = DeltaStream("i", wanted=True, interval_s=INTERVAL)
    stream.add("a")
    stream.end()
    stream.end()
    assert stream.dropped == 1
    assert stream.due(0.0, last=True) is None
    assert stream.text == "a"
