"""The standing prompts at work: a camera's newest frame to the engine when nobody else wants it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from phid import attachments, findings, log
from phid.attachments import PictureLimits
from phid.broker import Connected, Inbound, Link, Subscribed
from phid.crew import Crew
from phid.errors import Code, Failure, Refused
from phid.findings import Sighting
from phid.gallery import Gallery, Rules
from phid.health import Health
from phid.jobs import Event, Failed, Finished, Image, Unchanged
from phid.messages import WatchStatus
from phid.outbox import Outbox, Publication
from phid.requests import WatchCommand
from phid.roster import Roster
from phid.settings import Settings
from phid.slots import Cameras, Frame, Slots
from phid.watches import Watch, minute_of_day
from phid.worker import Worker

# A camera whose frames are all bad is told of at most once in this time, whatever its watch says.
_FAILURE_PAUSE_S = 1.0
# How soon a camera that showed nothing new is looked at again.
_GATE_PAUSE_S = 1.0
# A watch under whose frames the engine dies twice in a row is not run again until it is changed.
_MAX_LOST_ENGINES = 2
# How soon quiet hours are noticed.
_ALIGN_S = 1.0
_log = log.get("lookout")


@dataclass(slots=True, eq=False)
class _Post:
    """A watch at its post. `next_at` says from when on a camera's next frame is wanted."""

    watch: Watch
    slots: Slots
    next_at: dict[str, float] = field(default_factory=dict)
    lost_engines: int = 0
    suspended: str | None = None
    refused: bool = False
    told: tuple[Any, ...] = ()


@dataclass(slots=True, eq=False)
class _Look:
    """One question on its way: from the hand-over of its frames to the engine's answer."""

    post: _Post
    seen: Sighting
    job_id: str
    worker: Worker
    handed: float
    given_up: bool = False


class Lookout:
    """Runs the watches of the roster. Owner thread only; never waits.

    `cameras` and `gallery` are where the network's thread puts the frames: for watches, and for
    requests that name a camera. `minute` tells the minute of the day,
    for quiet hours.
    """

    def __init__(
        self,
        settings: Settings,
        roster: Roster,
        crew: Crew,
        outbox: Outbox,
        health: Health,
        minute: Callable[[], int] | None = None,
    ) -> None:
        self.cameras = Cameras(settings.limits.backlog_bytes)
        self.gallery = Gallery(Rules())
        self._roster = roster
        self._crew = crew
        self._outbox = outbox
        self._health = health
        self._minute = minute or minute_of_day
        self._topics = settings.topics
        self._device = settings.device
        self._limits = PictureLimits()
        self._max_tokens = 0
        self._posts: dict[str, _Post] = {}
        self._look: _Look | None = None
        self._jobs = 0
        self._link: Link | None = None
        self._asked: dict[int, list[str]] = {}
        self._subscribed: set[str] = set()
        self._align_at = 0.0
        # Of watches that are gone: their frames are counted still.
        self._past_frames = 0
        self._past_dropped = 0
        health.refresh.append(self.count)
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Take over the watches and the limits of these settings."""
        vision = settings.vision
        self._limits = PictureLimits(
            count=vision.max_images,
            image_bytes=vision.image_bytes,
            pixels=vision.max_pixels,
            side=vision.max_side,
        )
        self._max_tokens = settings.limits.max_tokens
        self.cameras.room_bytes = settings.limits.backlog_bytes
        self.gallery.rules = Rules(
            vision.camera_topics, vision.camera_age_s, settings.limits.backlog_bytes, self._limits
        )
        self._roster.configure(settings.watches, vision.max_images)
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

    # The broker.

    def see(self, inbound: Inbound) -> bool:
        """On the network's thread: put a frame into its slot. True if the owner is to look.

        What is retained shows what was there once, and an empty payload only clears that.
        """
        if inbound.retain or not inbound.payload:
            return False
        frame = inbound.topic, inbound.payload, time.monotonic(), time.time()
        self.gallery.offer(*frame)
        return self.cameras.offer(*frame)

    def connect(self, connected: Connected) -> None:
        """Ask for the cameras' topics, and tell of every watch, on this connection."""
        self._link, self._asked, self._subscribed = connected.link, {}, set()
        for post in self._posts.values():
            post.told, post.refused = (), False
        self._align()

    def disconnect(self) -> None:
        """Nothing comes in without a connection."""
        self._link = None

    def subscribed(self, event: Subscribed) -> None:
        """Take note of what the broker did not grant."""
        if self._link is None or event.session != self._link.session:
            return
        filters = self._asked.pop(event.mid, [])
        refused = {f for f, granted in zip(filters, event.granted, strict=False) if not granted}
        for post in self._posts.values():
            if post.watch.topic in refused:
                post.refused = True
                _log.error("watch_not_heard", watch=post.watch.name, topic=post.watch.topic)
        self._tell()

    # The engine.

    def tick(self, now: float, *, allowed: bool) -> None:
        """Do what is due; `allowed` says that no engine is wanted for anything else."""
        if allowed and self._look is None:
            self._dispatch(now)
        elif not allowed:
            self._give_up()
        if now < self._align_at:
            return
        self._align_at = now + _ALIGN_S
        self._align()

    def count(self) -> None:
        """Bring the counters of frames up to date."""
        counts = self._health.counts
        slots = self.cameras.slots
        counts["watch_frames"] = self._past_frames + sum(s.frames for s in slots)
        counts["watch_dropped"] = self._past_dropped + sum(s.dropped for s in slots)

    def due_at(self, *, allowed: bool) -> float | None:
        """When a frame that waits is wanted; None while there is none, or no engine for it."""
        if not allowed or self._look is not None:
            return None
        return min((at for at, post, _ in self._waiting() if self._engine(post)), default=None)

    def engine_said(self, event: Event, now: float) -> None:
        """Bring the running question along; what is said of any other job is not for us."""
        look = self._look
        if look is None or getattr(event, "job_id", None) != look.job_id:
            return
        match event:
            case Finished():
                self._look = None
                look.post.lost_engines = 0
                if look.given_up:
                    self._yield(look)
                else:
                    self._answer(look, event, now)
            case Failed():
                self._look = None
                look.post.lost_engines = 0
                if look.given_up:
                    self._yield(look)
                else:
                    failure = Failure(event.code, event.message, field=event.field)
                    self._fail(look.post, look.seen, failure, now)
            case Unchanged():
                self._look = None
                self._health.count("watch_skipped")
                # A change is to be noticed soon; the interval is one of answers.
                pause_s = min(look.post.watch.min_interval_s, _GATE_PAUSE_S)
                self._wait(look.post, look.seen.topic, now + pause_s)
            case _:
                pass

    def engine_lost(self, worker: Worker, now: float) -> None:
        """Its engine is gone: a newer frame will be there when it is back."""
        look = self._look
        if look is None or look.worker is not worker:
            return
        self._look = None
        post, why = look.post, f"the engine {worker.why}"
        post.lost_engines += 1
        if post.lost_engines >= _MAX_LOST_ENGINES:
            post.suspended = f"{post.lost_engines} engines were lost under its frames"
            _log.error("watch_suspended", watch=post.watch.name)
        self._fail(post, look.seen, Failure(Code.ENGINE_LOST, why), now)

    def _dispatch(self, now: float) -> None:
        """Hand over the frame whose camera has waited longest, if one is wanted now."""
        # Each turn notes a frame as looked at, and then looks again: see `slots`.
        while self._look is None:
            due = [entry for entry in self._waiting() if entry[0] <= now]
            for _, post, topic in sorted(due, key=lambda entry: entry[0]):
                if self._has_no_model(post, topic, now) or self._engine(post) is None:
                    continue
                self._start(post, topic, now)
                break
            else:
                return

    def _engine(self, post: _Post) -> Worker | None:
        """The worker that would answer this watch at once."""
        try:
            return self._crew.ready(self._crew.name_for(post.watch.model, pictures=True))
        except Refused:
            return None

    def _has_no_model(self, post: _Post, topic: str, now: float) -> bool:
        """True if no engine of ours can answer it, which has been told then; else one is wanted."""
        try:
            self._crew.check(post.watch.model, pictures=True)
            self._crew.want(
                self._crew.name_for(post.watch.model, pictures=True), now, courteous=True
            )
        except Refused as refused:
            frames = post.slots.take(topic)
            if frames:
                seen = Sighting(post.watch, topic, frames[-1], frames[-1].ts, len(frames))
                self._fail(post, seen, refused.failure, now)
            return True
        return False

    def _waiting(self) -> list[tuple[float, _Post, str]]:
        """From when on each new frame is wanted, its watch and its topic."""
        return [
            (post.next_at.get(topic, 0.0), post, topic)
            for post in self._posts.values()
            if self._state(post) == "on"
            for topic in post.slots.waiting()
        ]

    def _start(self, post: _Post, topic: str, now: float) -> None:
        frames = post.slots.take(topic)
        if not frames:
            return
        watch, newest = post.watch, frames[-1]
        seen = Sighting(watch, topic, newest, newest.ts, len(frames))
        if now - newest.at > watch.max_age_s:
            self._health.count("watch_stale")
            return
        try:
            pictures, ts = self._pictures(frames)
            # A camera's own clock counts too, but not when it runs ahead of ours.
            if newest.ts - ts + now - newest.at > watch.max_age_s:
                self._health.count("watch_stale")
                return
        except Refused as refused:
            self._fail(post, seen, refused.failure, now)
            return
        self._wait(post, topic, now + watch.min_interval_s)
        self._jobs += 1
        job_id = f"w{self._jobs}"
        worker = self._engine(post)
        assert worker is not None
        self._look = _Look(post, replace(seen, ts=ts), job_id, worker, now)
        worker.submit(findings.job(job_id, watch, topic, pictures, self._max_tokens))

    def _pictures(self, frames: tuple[Frame, ...]) -> tuple[tuple[Image, ...], float]:
        """The pictures, whose headers are sound, and when the newest was taken. Raises Refused."""
        ts = frames[-1].ts
        pictures = []
        for frame in frames:
            picture, said = attachments.of_camera(frame.payload, self._limits)
            pictures.append(picture)
            ts = frame.ts if said is None else said
        return tuple(pictures), ts

    def _give_up(self) -> None:
        """End the running question: a request waits for the engine, or its watch has changed."""
        look = self._look
        if look is not None and not look.given_up:
            look.given_up = True
            look.worker.cancel(look.job_id)

    def _yield(self, look: _Look) -> None:
        """Its camera has another turn at once."""
        self._health.count("watch_yielded")
        look.post.next_at.pop(look.seen.topic, None)

    def _answer(self, look: _Look, event: Finished, now: float) -> None:
        facts = look.worker.facts
        message = findings.result(
            look.seen,
            event,
            look.handed,
            now,
            device=self._device,
            model=look.worker.load.model,
            provider=facts.provider if facts else "unknown",
        )
        tokens = event.usage.output_tokens
        self._health.count("watch_answers")
        self._health.count("tokens_out", tokens)
        self._outbox.put(Publication(self._topics.watch_result(message.name), message))
        ms = message.timing.total_ms
        _log.info("watch_answered", watch=message.name, tokens=tokens, total_ms=ms)

    def _fail(self, post: _Post, seen: Sighting, failure: Failure, now: float) -> None:
        watch = post.watch
        self._health.count("watch_failures")
        self._wait(post, seen.topic, now + max(watch.min_interval_s, _FAILURE_PAUSE_S))
        message = findings.failure(seen, failure)
        self._outbox.put(Publication(self._topics.watch_result(watch.name), message))
        _log.warning("watch_failed", watch=watch.name, code=failure.code)

    def _wait(self, post: _Post, topic: str, until: float) -> None:
        post.next_at[topic] = until
        for known in [t for t in post.next_at if t not in post.slots]:
            del post.next_at[known]

    # What is in force, and what the broker knows of it.

    def _muster(self) -> None:
        """Bring posts and slots in line with the roster; one that is changed begins anew."""
        posts: dict[str, _Post] = {}
        for name, watch in self._roster.all.items():
            old = self._posts.get(name)
            posts[name] = old if old and old.watch == watch else _Post(watch, Slots(watch))
        for post in self._posts.values():
            if posts.get(post.watch.name) is not post:
                self._past_frames += post.slots.frames
                self._past_dropped += post.slots.frames - post.slots.looked
                if self._look is not None and self._look.post is post:
                    self._give_up()
        self._posts = posts
        self.cameras.slots = tuple(post.slots for post in posts.values())
        self._align()

    def _align(self) -> None:
        """Have the broker send what is wanted now, and know every watch as it is."""
        if self._link is None:
            return
        wanted = self._filters()
        if fresh := sorted(wanted - self._subscribed):
            self._asked[self._link.subscribe(fresh)] = fresh
        # A session that the broker kept for us has those of an earlier run, too.
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
        watched = {post.watch.topic for post in self._posts.values() if self._state(post) == "on"}
        return watched.union(self.gallery.rules.filters)

    def _state(self, post: _Post) -> Literal["on", "off", "quiet", "suspended"]:
        if not post.watch.enabled:
            return "off"
        if post.suspended is not None:
            return "suspended"
        return "quiet" if post.watch.is_quiet(self._minute()) else "on"

    def _status(self, post: _Post) -> WatchStatus:
        reason = "the broker refuses us its topic" if post.refused else None
        return WatchStatus(
            name=post.watch.name,
            state=self._state(post),
            reason=post.suspended or reason,
            source="settings" if self._roster.is_of_settings(post.watch.name) else "command",
            ts=int(time.time()),
            watch=post.watch.model_dump(exclude_none=True),
        )
