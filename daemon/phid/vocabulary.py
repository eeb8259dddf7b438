"""The bytes of each token and the literals of the added ones, read from a tokenizer.json."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a tokenizer's own file says about its tokens.

    `markers` are the literals in a text that become a single added token, with its id; those that
    any text may contain (white space, single characters) are left out. `pieces` has
    the bytes each id adds to a text, None where the file's decoder is of a kind not known here.
    `strips_first_space` says that a text's first space belongs to the encoding, not to the text.
    """

    markers: dict[str, int]
    pieces: tuple[bytes, ...] | None
    strips_first_space: bool = False

    def of_size(self, tokens: int) -> Vocabulary:
        """Filled up to `tokens` ids with empty pieces: a model can have more than its tokenizer.

        Phi-3.5 has 32,064 where its tokenizer names 32,011, for the matrix's sake.
        """
        if self.pieces is None:
            return self
        unnamed = tokens - len(self.pieces)
        return replace(self, pieces=(*self.pieces, *(b"",) * unnamed))

    def decoder(self) -> Callable[[int], bytes] | None:
        """Start one answer: what to call with each of its tokens for the bytes it adds."""
        pieces = self.pieces
        if pieces is None:
            return None
        if not self.strips_first_space:
            return pieces.__getitem__
        return _without_first_space(pieces)


def read(path: Path) -> Vocabulary:
    """Read a tokenizer.json of the Hugging Face form; nothing is known where it is missing."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Vocabulary({}, None)
    return parse(json.loads(text))


def parse(tokenizer: dict[str, Any]) -> Vocabulary:
    """Take from a parsed tokenizer.json what is needed here."""
    added = tokenizer.get("added_tokens") or []
    markers = {
        token["content"]: token["id"] for token in added if len(token["content"].strip()) > 1
    }
    decoder = tokenizer.get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    kinds = {step.get("type") for step in steps}
    vocabulary = (tokenizer.get("model") or {}).get("vocab")
    if not isinstance(vocabulary, dict):
        return Vocabulary(markers, None)
    if kinds == {"ByteLevel"}:
        pieces = {number: _bytes_of(piece) for piece, number in vocabulary.items()}
    elif "ByteFallback" in kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        pieces = {number: _sentence_piece(piece) for piece, number in vocabulary.items()}
    else:
        return Vocabulary(markers, None)
    # A special token adds no text; any other added one adds its own.
    for token in added:
        pieces[token["id"]] = b"" if token["special"] else token["content"].encode()
    size = max(pieces, default=-1) + 1
    return Vocabulary(
        markers,
        tuple(pieces.get(number, b"") for number in range(size)),
        strips_first_space="Strip" in kinds,
    )


def byte_alphabet() -> dict[str, int]:
    """Map the characters byte-level BPE writes its bytes in: GPT-2's bytes_to_unicode, reversed."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in shown}
    hidden = (byte for byte in range(0x100) if byte not in alphabet.values())
    return alphabet | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}


# Each character to the Latin-1 character of its byte: str.translate and Latin-1 run in C.
_LATIN = {ord(character): byte for character, byte in byte_alphabet().items()}


def _bytes_of(piece: str) -> bytes:
    # A piece in other characters is an added token, whose text is set afterwards.
    return piece.translate(_LATIN).encode("latin-1", "ignore")


def _without_first_space(pieces: tuple[bytes, ...]) -> Callable[[int], bytes]:
    begun = False

    def piece(token: int) -> bytes:
        nonlocal begun
        text = pieces[token]
        if not begun and text:
            begun = True
            return text.removeprefix(b" ")
        return text

    return piece


def _sentence_piece(piece: str) -> bytes:
    if match := _BYTE_PIECE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    return piece.replace("▁", " ").encode()
