from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phid.stops import StopFilter

LETTERS = st.text(alphabet="ab ", max_size=30)
STOPS = st.lists(st.text(alphabet="ab ", min_size=1, max_size=5), max_size=4)


def run(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    """The whole text shown, and whether it ended at a stop string."""
    stop_filter = StopFilter(stops)
    shown = ""
    for piece in pieces:
        text, matched = stop_filter.feed(piece)
        shown += text
        if matched:
            return shown + stop_filter.flush(), True
    return shown + stop_filter.flush(), False


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if stop and text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(st.lists(st.text(alphabet="ab ", max_size=6), max_size=10), STOPS)
def test_the_cuts_between_pieces_do_not_matter(pieces: list[str], stops: list[str]) -> None:
    assert run(pieces, stops) == expected("".join(pieces), stops)


@given(LETTERS, STOPS)
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    stop_filter = StopFilter(stops)
    shown, matched = stop_filter.feed(text)
    held = stop_filter.flush()
    if not matched:
        assert shown + held == text
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


@pytest.mark.parametrize(
    ("pieces", "stops", "result"),
    [
        (["Hello <", "end", ">", " more"], ["<end>"], ("Hello ", True)),
        (["Hello <", "en", " d>"], ["<end>"], ("Hello <en d>", False)),
        (["aaa", "ab"], ["aab"], ("aa", True)),
        (["abc"], ["c", "bc"], ("a", True)),
        (["abcd"], ["abcd", "bc"], ("a", True)),
        (["text"], [""], ("text", False)),
        (["t", "", "ext"], [], ("text", False)),
    ],
)
def test_examples(pieces: list[str], stops: list[str], result: tuple[str, bool]) -> None:
    assert run(pieces, stops) == result


def test_text_before_a_possible_stop_is_shown_at_once() -> None:
    stop_filter = StopFilter(["\n\nUser:"])
    assert stop_filter.feed("Done.\n") == ("Done.", False)
    assert stop_filter.feed("\nUs") == ("", False)
    assert stop_filter.feed("ing") == ("\n\nUsing", False)
