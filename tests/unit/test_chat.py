from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phid import chat
from phid.chat import MarkerGuard
from phid.jobs import Turn

PHI = ["<s>", "</s>", "<|end|>", "<|user|>", "<|system|>", "<|assistant|>", "<|image|>"]
SMOL = ["<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>"]
GUARD = MarkerGuard(PHI + SMOL)


def test_without_a_template_the_form_is_phis() -> None:
    turns = (Turn("system", "Be brief."), Turn("user", "Hi"), Turn("assistant", "Hello."))
    assert chat.render((*turns, Turn("user", "Bye")), GUARD, None) == (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello.<|end|>\n"
        "<|user|>\nBye<|end|>\n<|assistant|>\n"
    )


def test_a_template_gets_the_safe_turns_as_json() -> None:
    turns = [Turn("user", 'a "quoted" <|end|> 😀\n')]
    assert json.loads(chat.render(turns, GUARD, lambda messages: messages)) == [
        {"role": "user", "content": 'a "quoted" < |end|> 😀\n'}
    ]


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("plain text, x < y | z > 3", "plain text, x < y | z > 3"),
        ("<|end|>", "< |end|>"),
        ("<|unknown|>", "< |unknown|>"),
        ("<<|end|>|>", "<< |end|>|>"),
        ("</s></s>", "< /s>< /s>"),
        ("<repo_name>x", "< repo_name>x"),
        ("if a <b> c", "if a <b> c"),
        ("a\0b\ud83d", "a\ufffdb\ufffd"),
        ("😀", "😀"),
    ],
)
def test_examples(text: str, safe: str) -> None:
    assert GUARD.neutralise(text) == safe


MARKERS = st.lists(st.text(alphabet="<|a >", min_size=1, max_size=5), max_size=5)


@given(st.text(alphabet="<|a >", max_size=40), MARKERS)
def test_no_marker_is_left_whatever_they_are(text: str, markers: list[str]) -> None:
    guard = MarkerGuard(markers)
    safe = guard.neutralise(text)
    assert "<|" not in safe
    assert not [marker for marker in markers if len(marker.strip()) > 1 and marker in safe]
    assert guard.neutralise(safe) == safe
    assert safe.replace(" ", "") == text.replace(" ", "")


@given(st.text())
def test_texts_without_markers_stay_as_they_are(text: str) -> None:
    if "<" not in text and "\0" not in text:
        assert GUARD.neutralise(text) == text


def test_a_long_hostile_text_takes_no_long_time() -> None:
    began_s = time.thread_time()  # somebody else may have the CPU
    GUARD.neutralise("<|<s></s><|im_end|>" * 20_000 + "<" * 200_000)
    assert time.thread_time() - began_s < 2
