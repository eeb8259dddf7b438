"""Whether an answer has become the same words for ever, as small models' answers do."""

from __future__ import annotations

from collections.abc import Sequence

LOOK_EVERY = 32
"""How many tokens may pass between two looks; a look costs less than one token of a small model."""

# A paragraph; and how often it must stand there: what somebody asked for is told fewer times.
_LONGEST = 256
_TIMES = 16


def period(pieces: Sequence[bytes], least: int) -> int:
    """How many tokens the answer's end repeats; 0 if it does not.

    The last `least` tokens, and sixteen rounds, must be one cycle without a single exception: rows
    that differ in a number are none.
    """
    if len(pieces) < least:
        return 0
    for length in range(1, min(_LONGEST, len(pieces) // _TIMES) + 1):
        # The cheapest first: hardly a length comes further.
        if pieces[-1 - length] != pieces[-1]:
            continue
        if pieces[-length:] != pieces[-2 * length : -length]:
            continue
        tail = pieces[-max(least, _TIMES * length) :]
        if tail[length:] == tail[:-length]:
            return length
    return 0
