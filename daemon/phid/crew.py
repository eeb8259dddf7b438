"""The engines of this device: which models are loaded, which come, and which make room for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from phid import log, memory
from phid.errors import Code, Failure, Refused
from phid.jobs import EngineFacts, Event, Load, LoadFailed, Ready
from phid.lineup import Lineup, Model
from phid.member import Member
from phid.room import Room
from phid.worker import EngineEnded, EngineSaid, Worker

ModelState = Literal["loading", "ready", "failed", "unloaded"]
Slot = Literal["text", "frame"]

# How often missing models are looked for: somebody may bring them.
_LOOK_S = 2.0
_log = log.get("crew")


@dataclass(frozen=True, slots=True)
class _Switch:
    """A default that is about to change; `old` is what each slot goes back to if it fails."""

    name: str
    old: dict[Slot, str | None]
    in_force: bool


class Crew:
    """One worker for each model; as many models are loaded as memory allows.

    They are loaded one at a time. Defaults stay loaded until another model needs their room, pinned
    ones always, the others until nobody has asked for them for `keep_alive_s`. `hire` makes the
    worker of a model. `budget_bytes` bounds what all together take, as reckoned; 0: what the
    machine has. A missing model gets no engine, and is noticed when it comes. `tell` gets every
    change, with its reason if there is one. Owner thread only; never waits but in `stop`.
    """

    def __init__(
        self,
        lineup: Lineup,
        hire: Callable[[Load], Worker],
        *,
        keep_alive_s: float = 300.0,
        budget_bytes: int = 0,
        available: Callable[[], int] = memory.available_bytes,
        tell: Callable[[str, ModelState, str | None], None] = lambda _name, _state, _reason: None,
    ) -> None:
        self.keep_alive_s = keep_alive_s
        self.tell = tell
        self._hire = hire
        self._room = Room(budget_bytes, available)
        self._find, self._again = lineup.find, lineup.again
        self._members: dict[str, Member] = {}
        self._defaults: dict[Slot, str | None] = {}
        self._switch: _Switch | None = None
        self._look_at = 0.0
        self._take_over(lineup)

    # What there is.

    @property
    def names(self) -> list[str]:
        """What requests may give as `model`, the default first."""
        default = self._defaults["text"]
        return sorted(self._members, key=lambda name: name != default)

    @property
    def workers(self) -> Iterator[Worker]:
        """The workers of all models, loaded or not."""
        return (member.worker for member in self._members.values())

    @property
    def lead(self) -> Worker | None:
        """The worker that represents the device: the default's, else the last used ready one."""
        default = self._members.get(self._defaults["text"] or "")
        ready = [m for m in self._members.values() if m.worker.state == "ready"]
        if default is None or default in ready or not ready:
            return default.worker if default else None
        return max((member.worker for member in ready), key=lambda worker: worker.used_at)

    @property
    def failure(self) -> Failure | None:
        """Why a default cannot answer at present."""
        failures = (m.failure for m in self._default_members())
        return next((f for f in failures if f is not None), None)

    @property
    def facts(self) -> tuple[EngineFacts, ...]:
        """The facts of every loaded model."""
        return tuple(w.facts for w in self.workers if w.facts is not None)

    @property
    def states(self) -> dict[str, str]:
        """What each model's worker does."""
        return {name: member.worker.state for name, member in self._members.items()}

    @property
    def pids(self) -> tuple[int, ...]:
        """The process ids of all engines."""
        return tuple(w.pid for w in self.workers if w.pid is not None)

    def name_for(self, asked: str | None, *, pictures: bool) -> str:
        """The model that answers. Raises Refused where a request names one that is not here."""
        return self._named(asked or self._defaults["frame" if pictures else "text"]).model.name

    def check(self, asked: str | None, *, pictures: bool) -> None:
        """Raises Refused where no engine of ours will ever answer such a request."""
        member = self._members[self.name_for(asked, pictures=pictures)]
        if member.absence is not None:
            self._look_for(member)
        if (failure := member.refusal) is not None:
            raise Refused.of(failure)
        if pictures and member.kind == "text" and member.model.load.runtime != "scripted":
            says = f"{member.model.name} does not look at pictures: it needs a vision model"
            raise Refused(Code.UNSUPPORTED, says, field="images")

    def refusal(self, name: str) -> Failure | None:
        """What those who wait for this model are told, if waiting for an engine makes no sense."""
        return self._members[name].refusal

    def ready(self, name: str) -> Worker | None:
        """Its worker, if a job would be run at once."""
        worker = self._members[name].worker
        return worker if worker.free else None

    def is_loaded(self, name: str) -> bool:
        """True while it answers without being loaded first."""
        return self._members[name].worker.state == "ready"

    # Who is to be loaded.

    def start(self) -> None:
        """Load the default for text; the others follow as there is room."""
        if (name := self._defaults["text"]) is not None:
            self._start(self._members[name])

    def stop(self) -> None:
        """End every engine; waits up to two seconds for each."""
        for worker in self.workers:
            worker.stop()

    def restart(self) -> None:
        """End every engine, without waiting; each that was loaded is loaded again."""
        for worker in self.workers:
            worker.restart()

    def want(self, name: str, now: float, *, courteous: bool = False) -> None:
        """Have this model loaded, if need be in the place of others that do nothing now.

        `courteous`: only in the place of those unused for `keep_alive_s`. Nothing happens while
        another is being loaded or unloaded, or one in the way is busy: call again. Raises
        Refused: no_memory where room cannot be made, not_found where there is no such model.
        """
        member = self._members[name]
        member.leaving = None
        if member.worker.state != "stopped":
            return
        self._find_files(member)
        if self._changing:
            return
        missing = self._room.missing(member, self._members.values())
        if missing <= 0:
            self._start(member)
            return
        victims = self._victims(missing)
        missing -= sum(m.model.needed_bytes for m in victims)
        if courteous and any(now - m.worker.used_at < self.keep_alive_s for m in victims):
            return
        if missing > 0 and (failure := self._room.refusal(member, self._members.values())):
            raise Refused.of(failure)
        if not victims:
            # Nothing of ours is in the way: the engine itself says what a job may take.
            self._start(member)
            return
        for victim in victims:
            if victim.idle:
                self._retire(victim, f"made room for {name}", now)

    def waits_for_room(self, name: str) -> bool:
        """True if it can only be loaded in the place of one that is loaded now."""
        member = self._members[name]
        return (
            member.worker.state == "stopped"
            and self._room.missing(member, self._members.values()) > 0
        )

    def tick(self, now: float, *, quiet: bool = False) -> None:
        """Bring each worker along; load what is missing and fits, end what nobody has asked for.

        `quiet`: no request is open.
        """
        for worker in self.workers:
            worker.tick(now, quiet=quiet)
        self._look_again(now)
        self._complete_switch()
        for member in [member for member in self._members.values() if member.ordered]:
            self._follow_order(member, now)
        for member in self._members.values():
            if not member.idle:
                continue
            kept = member.pinned or member in self._default_members()
            if member.leaving is not None:
                self._retire(member, member.leaving, now)
            elif not kept and now - member.worker.used_at >= self.keep_alive_s:
                self._retire(member, "nobody has asked for it", now)
        pinned = [member for member in self._members.values() if member.pinned]
        wanted = [m for m in (*self._default_members(), *pinned) if m.absence is None]
        for member in wanted:
            if member.worker.state == "stopped" and not (member.leaving or self._changing):
                if self._room.missing(member, self._members.values()) <= 0:
                    self._start(member)
                break

    # What operators say. Raises Refused.

    def load(self, name: str, now: float, *, pin: bool) -> None:
        """Load any model that is on this machine; with `pin` it stays loaded."""
        member = self._known(name)
        self.want(name, now)
        member.pinned, member.ordered = member.pinned or pin, True

    def unload(self, name: str, now: float) -> None:
        """End its engine when it has nothing to do, until somebody wants it again."""
        member = self._named(name)
        member.pinned, member.ordered, member.leaving = False, False, "unloaded by command"
        self.tick(now)

    def switch(self, name: str, now: float) -> None:
        """Make it the default of its kind, until the service is started anew.

        Where memory holds both, the old one answers until the new one is loaded; else the old one
        goes first, and requests wait. If the new one cannot be loaded, the old one stays or comes
        back.
        """
        if (pending := self._switch) is not None and pending.name == name:
            self.load(name, now, pin=False)  # it is on its way
            return
        member = self._known(name)
        slots: list[Slot] = ["frame"] if member.kind == "vision" else ["text"]
        # The defaults from before a pending switch, which may still fail.
        good = self._defaults | (pending.old if pending and pending.in_force else {})
        both = good["text"]
        if both is not None and both == good["frame"]:
            # A model that is both defaults is replaced in both, but frames stay with one that sees.
            sees = self._members[both].kind == "vision"
            slots = ["text"] if sees and member.kind != "vision" else ["text", "frame"]
        old = {slot: good[slot] for slot in slots}
        self.want(name, now)
        self._defaults, member.ordered = good, True
        self._switch = _Switch(name, old, in_force=self.waits_for_room(name))
        if self._switch.in_force:
            self._make_default(self._switch)
        self._complete_switch()

    # What the engines say.

    def take(self, said: EngineSaid) -> tuple[Worker, Event] | None:
        """The worker and the event; None for a message left over from an engine that is gone."""
        for member in self._members.values():
            event = member.worker.take(said)
            if event is None:
                continue
            if isinstance(event, Ready):
                member.reckon()  # its files may have come while it was loaded
                self.tell(member.model.name, "ready", None)
            elif isinstance(event, LoadFailed):
                self.tell(member.model.name, "failed", event.message)
                self._look_for(member, failed=True)
                if member.absence is not None:  # removed, or not all there: no engine would find it
                    member.worker.retire(time.monotonic())
                self._abandon_switch(member.model.name)
            return member.worker, event
        return None

    def ended(self, ended: EngineEnded, now: float) -> Worker | None:
        """The worker whose engine was lost, with its job; None if it was to end."""
        for member in self._members.values():
            if member.worker.ended(ended, now):
                return member.worker
        return None

    # Inside.

    @property
    def _changing(self) -> bool:
        """True while one is being loaded or unloaded: free memory is known only after that."""
        return any(w.state in ("loading", "retiring") for w in self.workers)

    def _victims(self, missing: int) -> list[Member]:
        """The models to unload for `missing` bytes, those used longest ago first."""
        victims = []
        others = [m for m in self._members.values() if m.takes_memory and not m.pinned]
        for other in sorted(others, key=lambda m: m.worker.used_at):
            victims.append(other)
            missing -= other.model.needed_bytes
            if missing <= 0:
                break
        return victims

    def _default_members(self) -> list[Member]:
        names = dict.fromkeys(name for name in self._defaults.values() if name is not None)
        return [self._members[name] for name in names]

    def _named(self, name: str | None) -> Member:
        member = self._members.get(name or "")
        if member is None:
            raise Refused(Code.NOT_FOUND, "no such model here: see out/info", field="model")
        return member

    def _join(self, model: Model) -> Member:
        member = self._members[model.name] = Member(model, self._hire(model.load))
        return member

    def _known(self, name: str) -> Member:
        if name in self._members:
            return self._members[name]
        if (model := self._find(name)) is None:
            says = f"there is no model {name} on this machine: see `phid models`"
            raise Refused(Code.NOT_FOUND, says, field="model")
        return self._join(model)

    def _start(self, member: Member) -> None:
        self._look_for(member)
        if member.absence is None:
            member.worker.start()
            self.tell(member.model.name, "loading", None)

    def _take_over(self, lineup: Lineup) -> None:
        for model in lineup.models:
            self._join(model).pinned = model.name in lineup.pinned
        self._defaults = {"text": lineup.text, "frame": lineup.frame}

    def _look_for(self, member: Member, *, failed: bool = False) -> None:
        if member.look(time.monotonic(), failed=failed) and member.absence is not None:
            self.tell(member.model.name, "failed", member.absence)

    def _find_files(self, member: Member) -> None:
        self._look_for(member)
        if member.absence is not None:
            raise Refused(Code.NOT_FOUND, member.absence, field="model")

    def _look_again(self, now: float) -> None:
        """Look now and then whether a missing model has come, or the first one of all."""
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_S
        for member in [m for m in self._members.values() if m.absence is not None]:
            self._look_for(member)
            if member.absence is None:  # reading it took time: the next one at the next look
                break
        if not self._members:
            self._take_over(self._again(now))

    def _retire(self, member: Member, reason: str, now: float) -> None:
        _log.info("model_unloaded", model=member.model.name, reason=reason)
        member.worker.retire(now)
        self.tell(member.model.name, "unloaded", reason)

    def _follow_order(self, member: Member, now: float) -> None:
        """Load what a command wants as soon as nothing is in the way."""
        try:
            self.want(member.model.name, now)
        except Refused as refused:
            self.tell(member.model.name, "failed", refused.failure.message)
            self._abandon_switch(member.model.name)
            member.ordered = False
        else:
            member.ordered = member.worker.state in ("stopped", "retiring")

    def _make_default(self, switch: _Switch) -> None:
        for slot in switch.old:
            self._defaults[slot] = switch.name
        _log.info("default_switched", model=switch.name, slots=list(switch.old))

    def _complete_switch(self) -> None:
        switch = self._switch
        if switch is None or not self.is_loaded(switch.name):
            return
        self._switch = None
        if not switch.in_force:
            self._make_default(switch)
        for name in {n for n in switch.old.values() if n not in (None, switch.name)}:
            old = self._members[name]
            if not old.pinned and old not in self._default_members():
                old.leaving = f"{switch.name} has taken its place"

    def _abandon_switch(self, name: str) -> None:
        switch = self._switch
        if switch is None or switch.name != name:
            return
        self._switch = None
        if switch.in_force:
            self._defaults.update(switch.old)
        _log.error("switch_abandoned", model=name)
