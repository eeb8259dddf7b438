"""The newest frame of each camera topic that requests may name, for when one asks."""

from __future__ import annotations

from dataclasses import dataclass, field

from phid import attachments
from phid.attachments import PictureLimits, TopicRef
from phid.errors import Code, Refused
from phid.jobs import Image
from phid.slots import MAX_CAMERAS, Frame
from phid.topics import matches


@dataclass(frozen=True, slots=True)
class Rules:
    """Which topics are kept, how old a frame may be, and the memory they may take in all."""

    filters: tuple[str, ...] = ()
    max_age_s: float = 60.0
    room_bytes: int = 64 << 20
    limits: PictureLimits = field(default_factory=PictureLimits)


class Gallery:
    """Undecoded frames by topic; the newest replaces the one before it.

    The network's thread is the only one that writes; `rules` is replaced, as a whole, by the owner.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._frames: dict[str, Frame] = {}

    # The network's thread.

    def offer(self, topic: str, payload: bytes, at: float, ts: float) -> None:
        """Keep a frame if `rules` cover its topic; the topics longest unheard make room for it."""
        rules = self.rules
        if not any(matches(one, topic) for one in rules.filters):
            return
        if len(payload) > rules.room_bytes:
            self._frames.pop(topic, None)
            return
        others = {name: frame for name, frame in self._frames.items() if name != topic}
        held_bytes = sum(len(frame.payload) for frame in others.values())
        while len(others) >= MAX_CAMERAS or held_bytes + len(payload) > rules.room_bytes:
            unheard = min(others, key=lambda name: others[name].at)
            held_bytes -= len(others.pop(unheard).payload)
            del self._frames[unheard]
        # Replaced in one step, never removed first: the owner may look at any moment.
        self._frames[topic] = Frame(payload, at, ts, number=0)

    # The owner's thread.

    def picture(self, ref: TopicRef, now: float) -> Image:
        """What the camera showed last; its header is sound. Raises Refused."""
        rules, topic = self.rules, ref.topic
        if not any(matches(one, topic) for one in rules.filters):
            says = f"{topic} is none of the topics in vision.camera_topics"
            raise Refused(Code.UNAUTHORIZED, says, field=ref.field)
        frame = self._frames.get(topic)
        if frame is None:
            says = f"{topic} has sent no frame so far"
            raise Refused(Code.INCOMPLETE, says, field=ref.field)
        image, said = attachments.of_camera(frame.payload, rules.limits)
        # A camera's own clock counts too, but not when it runs ahead of ours.
        taken = frame.ts if said is None else min(said, frame.ts)
        age_s = now - frame.at + frame.ts - taken
        if age_s > rules.max_age_s:
            says = f"the newest frame of {topic} is {age_s:.0f} s old"
            raise Refused(Code.INCOMPLETE, says, field=ref.field)
        return Image(image.data, ref.label)
