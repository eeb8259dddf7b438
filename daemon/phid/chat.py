"""Writes a conversation as the text a model was trained on; no content can forge a marker."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from phid.jobs import Turn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

_UNFIT = re.compile("[\0\ud800-\udfff]")


def render(turns: Sequence[Turn], guard: MarkerGuard, template: Callable[[str], str] | None) -> str:
    """Write the turns in the form of `template`, or of Phi where the model has none.

    `template` takes a JSON list of {role, content} and gives the prompt up to where the
    assistant's answer begins.
    """
    safe = [Turn(turn.role, guard.neutralise(turn.content)) for turn in turns]
    if template is None:
        return phi(safe)
    return template(json.dumps([{"role": turn.role, "content": turn.content} for turn in safe]))


def phi(turns: Sequence[Turn]) -> str:
    """Write the turns as Phi-3 and Phi-3.5 were trained on them."""
    return (
        "".join(f"<|{turn.role}|>\n{turn.content}<|end|>\n" for turn in turns) + "<|assistant|>\n"
    )


class MarkerGuard:
    """Breaks every literal in a text that the tokenizer would take for one of its markers."""

    def __init__(self, markers: Iterable[str]) -> None:
        # Stripped: another space in a marker's outer white space would not break it.
        literals = {"<|", *(marker.strip() for marker in markers)}
        longest_first = sorted((m for m in literals if len(m) > 1), key=len, reverse=True)
        self._marker = re.compile("|".join(map(re.escape, longest_first)))

    def neutralise(self, text: str) -> str:
        """Put a space after the first character of each marker, until none is left.

        A NUL, which would end the text inside the native tokenizer, and half a surrogate pair,
        which it refuses, become U+FFFD.
        """
        text = _UNFIT.sub("\ufffd", text)
        while True:
            broken = self._marker.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text)
            if broken == text:
                return text
            text = broken
