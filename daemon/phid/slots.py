"""The newest frames of the cameras: put by the network's thread, looked at by the owner.

Two threads share this state (and `gallery`'s), for a mailbox would have to hold frames that nobody
will look at: four cameras bring 36 MB a second. It needs no lock, for all in it has one writer:

- the network's thread puts a camera's slot, an immutable tuple, with one assignment to a dict,
  and counts; what was in the slot is gone: the newest wins;
- the owner notes in another dict which frames it has looked at, and replaces `Cameras.slots`.

A frame is told to the owner only if the one before it had been looked at. So that none is
overlooked in between, the owner looks once more after it has made its note.
"""

from __future__ import annotations

from dataclasses import dataclass

from phid.topics import matches
from phid.watches import Watch

MAX_CAMERAS = 64
"""Of one watch; a new one takes the place of the one that has been silent longest."""

# Within this a broker may send a frame again, where the filters of two watches overlap.
_ECHO_S = 1.0


@dataclass(frozen=True, slots=True)
class Frame:
    """A payload as it came, not looked into. `at` is monotonic, `ts` Unix time, in seconds.

    `number` counts the frames of its camera.
    """

    payload: bytes
    at: float
    ts: float
    number: int


class Slots:
    """The newest frames of one watch, by topic: as many as it asks of at once, and one more."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.frames = 0
        self.held_bytes = 0
        self.looked = 0
        self._slots: dict[str, tuple[Frame, ...]] = {}
        # By topic: the numbers of the frames looked at, of those in its slot at the last `take`.
        self._looked_at: dict[str, frozenset[int]] = {}

    def __contains__(self, topic: str) -> bool:
        return topic in self._slots

    # The network's thread.

    def offer(self, topic: str, payload: bytes, at: float, ts: float, room_bytes: int) -> bool:
        """True if the owner does not know yet that there is something to look at.

        A frame for which there is no room, beside those of other cameras, is only counted.
        """
        old = self._slots.get(topic, ())
        if old and at - old[-1].at < _ECHO_S and old[-1].payload == payload:
            return False
        self.frames += 1
        number = old[-1].number if old else self._looked_until(topic)
        kept = _kept(old, at, self.watch)
        held = sum(len(frame.payload) for frame in old)
        fresh = (*kept, Frame(payload, at, ts, number + 1))
        grown = sum(len(frame.payload) for frame in fresh) - held
        if grown > max(room_bytes, 0):
            return False
        if not old and len(self._slots) >= MAX_CAMERAS:
            self._forget(min(self._slots, key=lambda t: self._slots[t][-1].at))
        self._slots[topic] = fresh
        self.held_bytes += grown
        # Asked only now, with the frame in place: the owner looks for a newer one after its note.
        was_waiting = number > self._looked_until(topic) and self._is_enough(old)
        return not was_waiting and self._is_enough(fresh)

    def sweep(self, at: float) -> None:
        """Forget the cameras whose last frame was looked at, or is too old to be."""
        for topic, slot in list(self._slots.items()):
            newest = slot[-1]
            if newest.number <= self._looked_until(topic) or (
                at - newest.at > self.watch.max_age_s
            ):
                self._forget(topic)

    def _forget(self, topic: str) -> None:
        self.held_bytes -= sum(len(frame.payload) for frame in self._slots.pop(topic))

    # The owner's thread.

    def waiting(self) -> list[str]:
        """The topics whose newest frame has not been looked at."""
        return [
            topic
            for topic, slot in self._slots.copy().items()
            if slot[-1].number > self._looked_until(topic) and self._is_enough(slot)
        ]

    def take(self, topic: str) -> tuple[Frame, ...]:
        """The frames that the watch asks of, the newest last; empty if the camera was forgotten."""
        slot = self._slots.get(topic)
        if slot is None:
            return ()
        picked = _picked(slot, self.watch)
        before = self._looked_at.get(topic, frozenset()).intersection(f.number for f in slot)
        after = before.union(f.number for f in picked)
        self.looked += len(after) - len(before)
        self._looked_at[topic] = after
        if len(self._looked_at) > 4 * MAX_CAMERAS:
            for gone in self._looked_at.keys() - self._slots.copy().keys():
                del self._looked_at[gone]
        return picked

    @property
    def dropped(self) -> int:
        """Frames that were replaced, or found no room, before they were looked at."""
        slots = self._slots.copy().items()
        looked_at = {topic: self._looked_at.get(topic, frozenset()) for topic, _ in slots}
        kept = sum(f.number not in looked_at[topic] for topic, slot in slots for f in slot)
        return self.frames - self.looked - kept

    def _looked_until(self, topic: str) -> int:
        """The number of the newest of its frames that was looked at."""
        return max(self._looked_at.get(topic, ()), default=0)

    def _is_enough(self, slot: tuple[Frame, ...]) -> bool:
        return bool(slot) and len(_picked(slot, self.watch)) == self.watch.frames


class Cameras:
    """Every watch's slots; `slots` is replaced, as a whole, by the owner."""

    def __init__(self, room_bytes: int) -> None:
        self.slots: tuple[Slots, ...] = ()
        self.room_bytes = room_bytes

    def offer(self, topic: str, payload: bytes, at: float, ts: float) -> bool:
        """Put a frame where it is wanted: True if the owner is to be told. The network's thread."""
        slots = self.slots
        news = False
        for one in slots:
            if matches(one.watch.topic, topic):
                room = self._room_bytes(slots)
                if room < len(payload):
                    for other in slots:
                        other.sweep(at)
                    room = self._room_bytes(slots)
                news = one.offer(topic, payload, at, ts, room) or news
        return news

    def _room_bytes(self, slots: tuple[Slots, ...]) -> int:
        return self.room_bytes - sum(one.held_bytes for one in slots)


def _kept(slot: tuple[Frame, ...], at: float, watch: Watch) -> tuple[Frame, ...]:
    """What stays in a slot when a frame comes: nothing if the watch asks of one at a time.

    Else the last few that lie far enough apart; the newest of them gives way to the frame that
    comes if it is too near to the one before it.
    """
    if watch.frames == 1:
        return ()
    if len(slot) > 1 and slot[-1].at - slot[-2].at < watch.every_s:
        slot = slot[:-1]
    return tuple(f for f in slot[-watch.frames :] if at - f.at <= _reach_s(watch))


def _picked(slot: tuple[Frame, ...], watch: Watch) -> tuple[Frame, ...]:
    """The newest frame and those before it that are far enough apart, oldest first."""
    picked = [slot[-1]]
    for frame in reversed(slot[:-1]):
        if len(picked) == watch.frames:
            break
        if picked[-1].at - frame.at >= watch.every_s:
            picked.append(frame)
    return tuple(reversed(picked))


def _reach_s(watch: Watch) -> float:
    """How long before the newest the oldest of several frames may lie."""
    return watch.max_age_s + 2 * watch.frames * watch.every_s
