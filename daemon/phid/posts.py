"""The watches at their posts: their frames' slots, and what the broker is to send and to know."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from phid import log
from phid.commands import WatchCommand
from phid.messages import WatchStatus
from phid.outbox import Outbox, Publication
from phid.roster import Roster
from phid.slots import Slots
from phid.topics import Topics
from phid.traffic import Link, Subscribed
from phid.watches import Watch

_log = log.get("posts")


@dataclass(slots=True, eq=False)
class Post:
    """A watch at its post. `next_at` says from when on a camera's next frame is wanted."""

    watch: Watch
    slots: Slots
    next_at: dict[str, float] = field(default_factory=dict)
    lost_engines: int = 0
    suspended: str | None = None
    refused: bool = False
    told: tuple[Any, ...] = ()


class Posts:
    """A post for each watch of the roster. Owner thread only; never waits.

    `minute` tells the minute of the day, for quiet hours; `others` are topic filters that are
    wanted whatever the watches are. `on_gone` hears of each post that is no more.
    """

    def __init__(
        self,
        roster: Roster,
        topics: Topics,
        outbox: Outbox,
        *,
        minute: Callable[[], int],
        others: Callable[[], Iterable[str]],
        on_gone: Callable[[Post], None],
    ) -> None:
        self._roster = roster
        self._topics = topics
        self._outbox = outbox
        self._minute = minute
        self._others = others
        self._on_gone = on_gone
        self._posts: dict[str, Post] = {}
        self._link: Link | None = None
        self._asked: dict[int, list[str]] = {}
        self._subscribed: set[str] = set()
        # The counts of watches that are gone, which the totals include.
        self._past_frames = 0
        self._past_dropped = 0

    def __iter__(self) -> Iterator[Post]:
        """Every post, whatever its state."""
        return iter(self._posts.values())

    @property
    def on(self) -> list[Post]:
        """The posts whose frames are wanted now."""
        return [post for post in self if self._state(post) == "on"]

    @property
    def frames(self) -> int:
        """How many frames have come."""
        return self._past_frames + sum(post.slots.frames for post in self)

    @property
    def dropped(self) -> int:
        """How many of them were replaced, or had no room, before their turn."""
        return self._past_dropped + sum(post.slots.dropped for post in self)

    def configure(self, watches: tuple[Watch, ...], max_images: int) -> None:
        """Take over the watches of the settings."""
        self._roster.configure(watches, max_images)
        self._muster()

    def command(self, command: WatchCommand) -> dict[str, Any]:
        """Make, change or delete a watch: the watch as it runs. Raises Refused."""
        name = command.name
        if command.delete:
            self._roster.remove(name)
        elif command.definition or name not in self._posts:
            self._roster.put(name, command.definition)
            if name in self._posts:
                self._posts[name].suspended, self._posts[name].lost_engines = None, 0
        self._muster()
        if command.delete:
            return {"name": name, "deleted": True}
        return self._status(self._posts[name]).model_dump(exclude_none=True)

    def connect(self, link: Link) -> None:
        """Ask for the cameras' topics, and tell of every watch, on this connection."""
        self._link, self._asked, self._subscribed = link, {}, set()
        for post in self:
            post.told, post.refused = (), False
        self.align()

    def disconnect(self) -> None:
        """Nothing comes in without a connection."""
        self._link = None

    def subscribed(self, event: Subscribed) -> None:
        """Take note of what the broker did not grant."""
        if self._link is None or event.session != self._link.session:
            return
        filters = self._asked.pop(event.mid, [])
        refused = {f for f, granted in zip(filters, event.granted, strict=False) if not granted}
        for post in self:
            if post.watch.topic in refused:
                post.refused = True
                _log.error("watch_not_heard", watch=post.watch.name, topic=post.watch.topic)
        self._tell()

    def _muster(self) -> None:
        """Bring posts and slots in line with the roster; one that is changed begins anew."""
        posts: dict[str, Post] = {}
        for name, watch in self._roster.all.items():
            old = self._posts.get(name)
            posts[name] = old if old and old.watch == watch else Post(watch, Slots(watch))
        for post in self:
            if posts.get(post.watch.name) is not post:
                self._past_frames += post.slots.frames
                self._past_dropped += post.slots.frames - post.slots.looked
                self._on_gone(post)
        self._posts = posts
        self.align()

    def align(self) -> None:
        """Have the broker send what is wanted now, and know every watch as it is."""
        if self._link is None:
            return
        wanted = self._filters()
        if fresh := sorted(wanted - self._subscribed):
            self._asked[self._link.subscribe(fresh)] = fresh
        # A session that the broker kept for us has the subscriptions of an earlier run, too.
        if gone := sorted((self._subscribed | self._roster.filters) - wanted):
            self._link.unsubscribe(gone)
        self._subscribed = wanted
        for name in self._roster.names - self._posts.keys():
            self._outbox.put(Publication(self._topics.watch(name), b"", retain=True))
        self._roster.note(wanted, set(self._posts))
        self._tell()

    def _tell(self) -> None:
        """Publish every watch that is not as it was told last."""
        for name, post in self._posts.items():
            is_now = (self._state(post), post.watch, post.suspended, post.refused)
            if is_now != post.told and self._link is not None:
                post.told = is_now
                topic = self._topics.watch(name)
                self._outbox.put(Publication(topic, self._status(post), retain=True))

    def _filters(self) -> set[str]:
        return {post.watch.topic for post in self.on}.union(self._others())

    def _state(self, post: Post) -> Literal["on", "off", "quiet", "suspended"]:
        if not post.watch.enabled:
            return "off"
        if post.suspended is not None:
            return "suspended"
        return "quiet" if post.watch.is_quiet(self._minute()) else "on"

    def _status(self, post: Post) -> WatchStatus:
        reason = "the broker refuses us its topic" if post.refused else None
        return WatchStatus(
            name=post.watch.name,
            state=self._state(post),
            reason=post.suspended or reason,
            source="settings" if self._roster.is_of_settings(post.watch.name) else "command",
            ts=int(time.time()),
            watch=post.watch.model_dump(exclude_none=True),
        )
