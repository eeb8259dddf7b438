"""Pictures sent apart: how much of them is kept, and whose go."""

from __future__ import annotations

from phid.errors import Code, Failure
from phid.parts import Parts

BROKEN = Failure(Code.UNSUPPORTED, "this is no image")


def test_who_floods_drops_his_own_and_nobody_elses() -> None:
    dropped: list[tuple[str, str]] = []
    parts = Parts(limit_bytes=1000, keep_s=60, on_drop=dropped.append)
    parts.add(("honest", "r"), 0, bytes(300), 0.0)
    for n in range(100):
        parts.add(("greedy", f"g{n}"), 0, bytes(200), 1.0)
    assert len(parts.take(("honest", "r"))) == 1
    assert dropped == [("greedy", f"g{n}") for n in range(97)]
    assert parts.dropped == 97


def test_neither_small_ones_nor_broken_ones_grow_without_bound() -> None:
    parts = Parts(limit_bytes=1 << 20, keep_s=60)
    for n in range(2000):
        parts.add(("greedy", f"g{n}"), 0, b"", 0.0)
    assert len(parts._kept) <= 256
    for n in range(5000):
        parts.add(("worse", f"w{n // 1000}"), n % 1000, BROKEN, 0.0)
    assert sum(len(kept.parts) for key, kept in parts._kept.items() if key[0] == "worse") <= 1024


def test_what_is_taken_or_comes_again_is_counted_off() -> None:
    parts = Parts(limit_bytes=1000, keep_s=60)
    for size in (900, 10, 500, 900):
        parts.add(("c", "r"), 0, bytes(size), 0.0)
    assert len(parts.take(("c", "r"))[0]) == 900
    parts.add(("c", "s"), 0, bytes(900), 0.0)
    assert parts.missing(("c", "s"), frozenset({0, 1})) == (1,)
    parts.prune(59.0)
    assert parts.dropped == 0
    parts.prune(60.0)
    assert (parts.dropped, parts._bytes) == (1, 0)
