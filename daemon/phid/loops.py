"""Whether an answer repeats the same words for ever, as small models' answers do."""

from __future__ import annotations

from collections.abc import Sequence

LOOK_EVERY = 32
"""How many tokens may pass between two looks; a look costs less than one token of a small model."""

# The longest cycle, a paragraph; and how often it must come: what somebody asked for comes less.
_LONGEST = 256
_TIMES = 16


def period(pieces: Sequence[bytes], least: int) -> int:
    """How many tokens long the cycle is that the answer's end repeats; 0 if there is none.

    At least the last `least` tokens, and sixteen rounds, must repeat it without a single exception:
    rows that differ in a number do not.
    """
    if len(pieces) < least:
        return 0
    for length in range(1, min(_LONGEST, len(pieces) // _TIMES) + 1):
        # The cheapest test first: few lengths pass it.
        if pieces[-1 - length] != pieces[-1]:
            continue
        if pieces[-length:] != pieces[-2 * length : -length]:
            continue
        tail = pieces[-max(least, _TIMES * length) :]
        if tail[length:] == tail[:-length]:
            return length
    return 0
