from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from phid import vocabulary

if TYPE_CHECKING:
    from pathlib import Path


def test_byte_level_pieces_are_bytes() -> None:
    tokens = vocabulary.parse(
        {
            "decoder": {"type": "ByteLevel"},
            "model": {"vocab": {"a": 0, "Ġok": 1, "ðŁ": 2, "ĺĢ": 3, "Ċ": 4}},
            "added_tokens": [
                {"id": 5, "content": "<|end|>", "special": True},
                {"id": 6, "content": "</think>", "special": False},
            ],
        }
    )
    assert tokens.pieces == (b"a", b" ok", b"\xf0\x9f", b"\x98\x80", b"\n", b"", b"</think>")
    assert tokens.markers == {"<|end|>": 5, "</think>": 6}


def test_the_byte_alphabet_is_complete() -> None:
    alphabet = vocabulary.byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert (alphabet["A"], alphabet["Ġ"], alphabet["Ċ"]) == (0x41, 0x20, 0x0A)


SENTENCE_PIECES = {
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    },
    "model": {"vocab": {"▁The": 0, "▁sea": 1, "<0xF0>": 2, "<0x0A>": 3, "é": 4, "<s>": 5}},
    "added_tokens": [{"id": 5, "content": "<s>", "special": True}],
}


def test_sentence_pieces_lose_the_first_space_and_no_other() -> None:
    decode = vocabulary.parse(SENTENCE_PIECES).decoder()
    assert decode is not None
    assert [decode(token) for token in (5, 0, 1, 2, 3, 4)] == [
        *(b"", b"The", b" sea"),
        *(b"\xf0", b"\n", "é".encode()),
    ]


def test_each_answer_has_a_first_space_of_its_own() -> None:
    tokens = vocabulary.parse(SENTENCE_PIECES)
    for _ in range(2):
        decode = tokens.decoder()
        assert decode is not None
        assert decode(0) == b"The"


@pytest.mark.parametrize("decoder", [None, {"type": "WordPiece"}, {"type": "Metaspace"}])
def test_an_unknown_decoder_has_no_pieces(decoder: object) -> None:
    tokens = vocabulary.parse({"decoder": decoder, "model": {"vocab": {"a": 0}}})
    assert tokens.decoder() is None


def test_markers_that_texts_are_full_of_are_left_out() -> None:
    added = [
        {"id": n, "content": text, "special": False} for n, text in enumerate(["  ", "\n", "a"])
    ]
    assert vocabulary.parse({"added_tokens": added}).markers == {}


def test_a_missing_file_knows_nothing(tmp_path: Path) -> None:
    assert vocabulary.read(tmp_path / "tokenizer.json") == vocabulary.Vocabulary({}, None)


@pytest.mark.parametrize("strips", [True, False])
def test_an_id_that_the_tokenizer_does_not_name_adds_nothing(strips: bool) -> None:
    tokens = vocabulary.Vocabulary({}, (b"a", b" b"), strips_first_space=strips)
    decode = tokens.of_size(5).decoder()
    assert decode is not None
    assert [decode(token) for token in (4, 0, 2, 1)] == [b"", b"a", b"", b" b"]
    assert tokens.of_size(0).pieces == tokens.pieces
    assert vocabulary.Vocabulary({}, None).of_size(5).pieces is None
