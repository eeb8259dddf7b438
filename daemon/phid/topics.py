"""The topics of the wire: built in one place, parsed in one place."""

from __future__ import annotations

import re
from dataclasses import dataclass

ANON = "anon"
RESERVED_DEVICES = frozenset({"all", "pool", "client"})

# Levels go into ACLs, file names and metrics labels: only characters that none of them quotes.
_LEVEL = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
_NUMBER = re.compile(r"[0-9]{1,3}\Z")
# AWS IoT refuses topics of more than seven slashes.
_MAX_SLASHES = 7
_MAX_TOPIC_BYTES = 512


def is_level(text: str) -> bool:
    """True for what may stand as one topic level of ours: an id, a client, a device."""
    return _LEVEL.match(text) is not None


def level_from(text: str) -> str:
    """The nearest legal level to any text, such as a host name: dots become hyphens."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", text)[:64] or "device"


def is_publishable(topic: str) -> bool:
    """True if a topic can be published to: no wildcard, no NUL, not empty, no `$` in front."""
    return (
        0 < len(topic.encode("utf-8", "replace")) <= _MAX_TOPIC_BYTES
        and not any(c in topic for c in "+#\0")
        and not topic.startswith("$")
        and topic.isprintable()
    )


def matches(topic_filter: str, topic: str) -> bool:
    """True if an MQTT topic filter (with + and #) covers this topic."""
    wanted = topic_filter.split("/")
    levels = topic.split("/")
    for n, level in enumerate(wanted):
        if level == "#":
            return True
        if n >= len(levels) or level not in ("+", levels[n]):
            return False
    return len(wanted) == len(levels)


def is_filter(text: str) -> bool:
    """True for a topic filter that may be subscribed to: `#` last, wildcards whole levels."""
    levels = text.split("/")
    return (
        0 < len(text.encode("utf-8", "replace")) <= _MAX_TOPIC_BYTES
        and not text.startswith("$")
        and text.isprintable()
        and "#" not in levels[:-1]
        and all(level in ("+", "#") or not set(level) & {"+", "#"} for level in levels)
    )


def overlap(one: str, other: str) -> bool:
    """True if there is a topic that both filters cover."""
    first, second = one.split("/"), other.split("/")
    for mine, yours in zip(first, second, strict=False):
        if "#" in (mine, yours):
            return True
        if mine != yours and "+" not in (mine, yours):
            return False
    longer = max(first, second, key=len)
    # What ends in /# covers the level above, too.
    return len(first) == len(second) or longer[min(len(first), len(second)) :] == ["#"]


@dataclass(frozen=True, slots=True)
class Address:
    """What an inbound topic says: `kind` is its level after in/, `client` who asks.

    `verb` is the command of a ctl topic, and `broadcast` says that it was sent to all devices.
    `id` and `part` are the request and the number of a picture that is sent apart.
    """

    kind: str
    client: str = ANON
    verb: str = ""
    broadcast: bool = False
    id: str = ""
    part: int = 0


@dataclass(frozen=True, slots=True)
class Topics:
    """Every topic of one device under one base; also of a client that looks for devices."""

    base: str
    device: str

    def __post_init__(self) -> None:
        if not all(is_level(level) for level in self.base.split("/")):
            raise ValueError(f"base {self.base!r}: each level must be [A-Za-z0-9_-]{{1,64}}")
        if not is_level(self.device) or self.device in RESERVED_DEVICES:
            raise ValueError(
                f"device {self.device!r}: must be [A-Za-z0-9_-]{{1,64}} "
                f"and none of {', '.join(sorted(RESERVED_DEVICES))}"
            )
        if self.res("x", "x").count("/") > _MAX_SLASHES:
            raise ValueError(f"base {self.base!r} has too many levels: {_MAX_SLASHES} slashes fit")

    # What the device listens to.

    @property
    def filters(self) -> tuple[str, ...]:
        """The filters a device subscribes to; all of in/, so that a typo is answered."""
        return (f"{self._in}/#", f"{self.base}/all/in/ctl/discover")

    def parse(self, topic: str) -> Address | None:
        """The address an inbound topic stands for; None if it is none of ours."""
        if topic == f"{self.base}/all/in/ctl/discover":
            return Address("ctl", verb="discover", broadcast=True)
        prefix = f"{self._in}/"
        if not topic.startswith(prefix):
            return None
        kind, *rest = topic[len(prefix) :].split("/")
        if kind == "ctl":
            return Address(kind, verb=rest[0]) if len(rest) == 1 else None
        if kind == "part":
            if len(rest) != 3 or not all(map(is_level, rest)) or not _NUMBER.match(rest[2]):
                return None
            return Address(kind, client=rest[0], id=rest[1], part=int(rest[2]))
        if kind in ("text", "frame", "cancel") and len(rest) <= 1 and all(map(is_level, rest)):
            return Address(kind, client=rest[0] if rest else ANON)
        return None

    # What a requester publishes to.

    def text(self, client: str) -> str:
        """Where a client sends a text request."""
        return f"{self._in}/text/{client}"

    def frame(self, client: str) -> str:
        """Where a client sends a frame request."""
        return f"{self._in}/frame/{client}"

    def part(self, client: str, request_id: str, n: int) -> str:
        """Where a client sends picture n of a request, its bytes alone."""
        return f"{self._in}/part/{client}/{request_id}/{n}"

    def cancel(self, client: str) -> str:
        """Where a client cancels one of its requests."""
        return f"{self._in}/cancel/{client}"

    def ctl(self, verb: str) -> str:
        """Where an operator sends a command."""
        return f"{self._in}/ctl/{verb}"

    @property
    def discover(self) -> str:
        """Where every device is asked to send its status and info again."""
        return f"{self.base}/all/in/ctl/discover"

    def rx(self, client: str) -> str:
        """A client's own inbox: the recommended Response Topic."""
        return f"{self.base}/client/{client}/rx"

    # What the device publishes to.

    def res(self, client: str, request_id: str) -> str:
        """The default reply topic of one request."""
        return f"{self._out}/res/{client}/{request_id}"

    @property
    def status(self) -> str:
        """Retained, and the will's topic."""
        return f"{self._out}/status"

    @property
    def info(self) -> str:
        """Retained: versions, hardware, models, limits, capabilities."""
        return f"{self._out}/info"

    @property
    def health(self) -> str:
        """Flat numbers, every health.interval_s."""
        return f"{self._out}/health"

    @property
    def event(self) -> str:
        """A line per finished job and per change of state."""
        return f"{self._out}/event"

    def watch(self, name: str) -> str:
        """Retained: a standing prompt on camera topics, as it runs."""
        return f"{self._out}/watch/{name}"

    def watch_result(self, name: str) -> str:
        """What a standing prompt has found."""
        return f"{self._out}/watch/{name}/result"

    def is_ours(self, topic: str) -> bool:
        """True if a topic belongs to `filters`: what is not there comes from a camera."""
        return topic.startswith(f"{self._in}/") or topic == self.discover

    def may_reply(self, topic: str, client: str, allowed: tuple[str, ...] = ()) -> bool:
        """True if a requester may name this as its reply topic.

        Its own levels are free, anything else needs a filter of mqtt.reply_allow: a requester
        must not make us publish elsewhere with our rights.
        """
        if not is_publishable(topic) or topic.count("/") > _MAX_SLASHES:
            return False
        own = (f"{self._out}/res/{client}/", f"{self.base}/client/{client}/")
        return topic.startswith(own) or any(matches(f, topic) for f in allowed)

    @property
    def _in(self) -> str:
        return f"{self.base}/{self.device}/in"

    @property
    def _out(self) -> str:
        return f"{self.base}/{self.device}/out"
