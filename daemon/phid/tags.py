"""Image tags: in a conversation's turns, and as slots in its tokens."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from phid.chat import MarkerGuard
from phid.errors import Code, Refused

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from phid.jobs import Turn

_TAG = re.compile(r"<\|image_([0-9]{1,9})\|>")


class TagGuard(MarkerGuard):
    """Breaks every marker in a text but image tags."""

    def neutralise(self, text: str) -> str:
        """Break the markers before, between and after the tags."""
        safe, at = [], 0
        for tag in _TAG.finditer(text):
            safe += [super().neutralise(text[at : tag.start()]), tag[0]]
            at = tag.end()
        return "".join((*safe, super().neutralise(text[at:])))


def tagged(turns: Sequence[Turn], images: int) -> tuple[Turn, ...]:
    """Give the turns with one tag for each image, 1 to `images`.

    Where the user wrote none they come in front of the last user turn's text. A tag in another
    role's turn is text, and broken. Raises Refused (bad_request) where the user's do not match.
    """
    others = (
        turn
        if turn.role == "user"
        else replace(turn, content=_TAG.sub(r"< |image_\1|>", turn.content))
        for turn in turns
    )
    turns = tuple(others)
    written = [int(n) for t in turns if t.role == "user" for n in _TAG.findall(t.content)]
    if written:
        if sorted(written) != list(range(1, images + 1)):
            counted = f"{images} images: show each once" if images else "no images: show none"
            raise Refused(
                Code.BAD_REQUEST,
                f"the text has {len(written)} image tags, <|image_n|>, and the request {counted}",
                field="images",
            )
        return turns
    if not images:
        return turns
    last = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=None)
    if last is None:
        raise Refused(Code.BAD_REQUEST, "images need a user's turn", field="images")
    tags = "".join(f"<|image_{n}|>\n" for n in range(1, images + 1))
    shown = replace(turns[last], content=tags + turns[last].content)
    return (*turns[:last], shown, *turns[last + 1 :])


def order(turns: Sequence[Turn]) -> list[int]:
    """Give the images' numbers, from 1, in the order in which the turns show them.

    A model's embedding graph takes the features one picture after another, whatever the tags say.
    """
    return [int(n) for turn in turns for n in _TAG.findall(turn.content)]


def with_slots(
    prompt: str, encode: Callable[[str], NDArray[np.int32]], tokens: dict[int, int]
) -> NDArray[np.int32]:
    """Encode a prompt: where it shows image n, `tokens[n]` slots -n stand.

    The text between two tags is encoded on its own, as the runtime's own processor does.
    """
    parts = _TAG.split(prompt)
    pieces = []
    for at, part in enumerate(parts):
        if at % 2:
            pieces.append(np.full(tokens[int(part)], -int(part), np.int32))
        elif part:
            pieces.append(np.asarray(encode(part), np.int32))
    return np.concatenate(pieces) if pieces else np.empty(0, np.int32)
