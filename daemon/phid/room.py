"""The memory that a device's models may take together: what is missing for one more."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from phid.errors import Code, Failure
from phid.member import Member

_MIB = 1 << 20


class Room:
    """What the models may take: `budget_bytes` in all, reckoned; 0: what the machine has left."""

    def __init__(self, budget_bytes: int, available: Callable[[], int]) -> None:
        self._budget = budget_bytes
        self._available = available

    def missing(self, member: Member, members: Iterable[Member]) -> int:
        """How many bytes are missing to load it beside those that are loaded; 0 or less: none."""
        needed = member.model.needed_bytes
        missing = needed - self._available()
        if self._budget:
            taken = sum(m.model.needed_bytes for m in members if m.takes_memory)
            missing = max(missing, taken + needed - self._budget)
        return missing if needed else 0

    def refusal(self, member: Member, members: Iterable[Member]) -> Failure | None:
        """Why there can never be room for it, whatever is unloaded; None where there may be."""
        pinned = [m.model.needed_bytes for m in members if m.pinned and m.takes_memory]
        says = f"{member.model.name} needs {member.model.needed_bytes // _MIB} MiB of memory"
        if self._budget and member.model.needed_bytes > self._budget:
            says += f", and the models may take {self._budget // _MIB} (engine.budget_mb)"
        elif pinned:
            says += f", and the pinned models take {sum(pinned) // _MIB}"
        else:
            return None
        return Failure(Code.NO_MEMORY, says)
