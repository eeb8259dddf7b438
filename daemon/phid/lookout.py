"""Runs the watches: hands a camera's newest frame to the engine when nobody else wants it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from phid import attachments, findings, log
from phid.attachments import PictureLimits
from phid.commands import WatchCommand
from phid.crew import Crew
from phid.errors import Code, Failure, Refused
from phid.findings import Sighting
from phid.gallery import Gallery, Rules
from phid.health import Health
from phid.jobs import Event, Failed, Finish, Finished, Image, Unchanged
from phid.outbox import Outbox, Publication
from phid.posts import Post, Posts
from phid.roster import Roster
from phid.settings import Settings
from phid.slots import Cameras, Frame
from phid.traffic import Connected, Inbound, Subscribed
from phid.watches import minute_of_day
from phid.worker import Worker

# A camera whose frames are all bad is reported at most once in this time, whatever its watch says.
_FAILURE_PAUSE_S = 1.0
# How soon a camera that showed nothing new is looked at again.
_GATE_PAUSE_S = 1.0
# A watch under whose frames the engine dies twice in a row is not run again until it is changed.
_MAX_LOST_ENGINES = 2
# How soon quiet hours are noticed.
_ALIGN_S = 1.0
_log = log.get("lookout")


@dataclass(slots=True, eq=False)
class _Look:
    """One question on its way: from the hand-over of its frames to the engine's answer."""

    post: Post
    seen: Sighting
    job_id: str
    worker: Worker
    handed: float
    given_up: bool = False


class Lookout:
    """Runs the watches of the roster. Owner thread only; never waits.

    `cameras` and `gallery` are where the network's thread puts the frames: for watches, and for
    requests that name a camera. `minute` tells the minute of the day, for quiet hours.
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
        self._crew = crew
        self._outbox = outbox
        self._health = health
        self._topics = settings.topics
        self._device = settings.device
        self._limits = PictureLimits()
        self._max_tokens = 0
        self._posts = Posts(
            roster,
            settings.topics,
            outbox,
            minute=minute or minute_of_day,
            others=lambda: self.gallery.rules.filters,
            on_gone=self._left,
        )
        self._look: _Look | None = None
        self._jobs = 0
        self._align_at = 0.0
        health.refresh.append(self.count)
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Take over the watches and the limits of these settings."""
        vision = settings.vision
        self._limits = PictureLimits.of(vision)
        self._max_tokens = settings.limits.max_tokens
        self.cameras.room_bytes = settings.limits.backlog_bytes
        self.gallery.rules = Rules(
            vision.camera_topics, vision.camera_age_s, settings.limits.backlog_bytes, self._limits
        )
        self._posts.configure(settings.watches, vision.max_images)
        self._align_cameras()

    def command(self, command: WatchCommand) -> dict[str, Any]:
        """Make, change or delete a watch: the watch as it runs. Raises Refused."""
        try:
            return self._posts.command(command)
        finally:
            self._align_cameras()

    # The broker.

    def see(self, inbound: Inbound) -> bool:
        """On the network's thread: put a frame into its slot. True if the owner is to look.

        A retained frame shows the past, and an empty payload only clears that.
        """
        if inbound.retain or not inbound.payload:
            return False
        frame = inbound.topic, inbound.payload, time.monotonic(), time.time()
        self.gallery.offer(*frame)
        return self.cameras.offer(*frame)

    def connect(self, connected: Connected) -> None:
        """Ask for the cameras' topics, and tell of every watch, on this connection."""
        self._posts.connect(connected.link)

    def disconnect(self) -> None:
        """Nothing comes in without a connection."""
        self._posts.disconnect()

    def subscribed(self, event: Subscribed) -> None:
        """Take note of what the broker did not grant."""
        self._posts.subscribed(event)

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
        self._posts.align()

    def count(self) -> None:
        """Bring the counters of frames up to date."""
        counts = self._health.counts
        counts["watch_frames"], counts["watch_dropped"] = self._posts.frames, self._posts.dropped

    def due_at(self, *, allowed: bool) -> float | None:
        """When the next waiting frame is due; None while there is none, or no engine for it."""
        if not allowed or self._look is not None:
            return None
        return min((at for at, post, _ in self._waiting() if self._engine(post)), default=None)

    def engine_said(self, event: Event, now: float) -> None:
        """Bring the running question along; what is said of any other job is not for us."""
        look = self._look
        if look is None or getattr(event, "job_id", None) != look.job_id:
            return
        match event:
            case Finished() | Failed():
                self._look = None
                look.post.lost_engines = 0
                if look.given_up and (_was_cut(event) or look.post not in self._posts):
                    self._yield(look)
                elif isinstance(event, Finished):
                    self._answer(look, event, now)
                else:
                    failure = Failure(event.code, event.message, field=event.field)
                    self._fail(look.post, look.seen, failure, now)
            case Unchanged():
                self._look = None
                self._health.count("watch_skipped")
                # Look again soon, to notice a change: `min_interval_s` is the time between answers.
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
        # Look again after each frame taken: the owner is not told of one that came meanwhile,
        # see `slots`.
        while self._look is None:
            due = [entry for entry in self._waiting() if entry[0] <= now]
            for _, post, topic in sorted(due, key=lambda entry: entry[0]):
                if self._has_no_model(post, topic, now) or self._engine(post) is None:
                    continue
                self._start(post, topic, now)
                break
            else:
                return

    def _engine(self, post: Post) -> Worker | None:
        """The worker that would answer this watch at once."""
        try:
            return self._crew.ready(self._crew.name_for(post.watch.model, pictures=True))
        except Refused:
            return None

    def _has_no_model(self, post: Post, topic: str, now: float) -> bool:
        """True if no engine of ours can answer it, which is reported; else asks for its model."""
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

    def _waiting(self) -> list[tuple[float, Post, str]]:
        """When each new frame is due, its watch and its topic."""
        return [
            (post.next_at.get(topic, 0.0), post, topic)
            for post in self._posts.on
            for topic in post.slots.waiting()
        ]

    def _start(self, post: Post, topic: str, now: float) -> None:
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

    def _left(self, post: Post) -> None:
        """The post's watch was deleted or changed."""
        if self._look is not None and self._look.post is post:
            self._give_up()

    def _align_cameras(self) -> None:
        self.cameras.slots = tuple(post.slots for post in self._posts)

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
        self._health.count("watch_looped", event.looped)
        self._health.count("tokens_in", event.usage.prompt_tokens)
        self._health.count("tokens_out", tokens)
        self._outbox.put(Publication(self._topics.watch_result(message.name), message))
        ms = message.timing.total_ms
        _log.info("watch_answered", watch=message.name, tokens=tokens, total_ms=ms)

    def _fail(self, post: Post, seen: Sighting, failure: Failure, now: float) -> None:
        watch = post.watch
        self._health.count("watch_failures")
        self._wait(post, seen.topic, now + max(watch.min_interval_s, _FAILURE_PAUSE_S))
        message = findings.failure(seen, failure)
        self._outbox.put(Publication(self._topics.watch_result(watch.name), message))
        _log.warning("watch_failed", watch=watch.name, code=failure.code)

    def _wait(self, post: Post, topic: str, until: float) -> None:
        post.next_at[topic] = until
        for known in [t for t in post.next_at if t not in post.slots]:
            del post.next_at[known]


def _was_cut(event: Finished | Failed) -> bool:
    """False for an answer that was whole before the engine was told to give it up.

    The engine compares later frames with that one, so its answer must be published.
    """
    return isinstance(event, Failed) or event.finish in (Finish.CANCELLED, Finish.DEADLINE)
