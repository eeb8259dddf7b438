"""Numbers on the command line; the error for a wrong one says what is accepted, in one line."""

from __future__ import annotations

from argparse import ArgumentTypeError

_PORTS = 65_535
# As seconds, four months: longer than anybody waits, and a clock can still count it.
_MOST = 10_000_000


def port(text: str) -> int:
    """A TCP port. Raises ArgumentTypeError, as do the others."""
    return _whole(text, f"must be a port, 1 to {_PORTS}", _PORTS)


def count(text: str) -> int:
    """At least one."""
    return _whole(text, f"must be a whole number, 1 to {_MOST}", _MOST)


def number(text: str) -> float:
    """Zero or more."""
    return _number(text, f"must be a number, 0 to {_MOST}")


def time_s(text: str) -> float:
    """More than zero: there is something to wait for."""
    says = f"must be a number of seconds, more than 0 and at most {_MOST}"
    if not (seconds := _number(text, says)):
        raise ArgumentTypeError(says)
    return seconds


def _whole(text: str, says: str, most: int) -> int:
    try:
        whole = int(text)
    except ValueError:
        raise ArgumentTypeError(says) from None
    if not 1 <= whole <= most:
        raise ArgumentTypeError(says)
    return whole


def _number(text: str, says: str) -> float:
    try:
        found = float(text)
    except ValueError:
        raise ArgumentTypeError(says) from None
    if not 0 <= found <= _MOST:  # NaN fails this, too
        raise ArgumentTypeError(says)
    return found
