"""The engine as the service sees it: spawned, fed, watched, and started again when it ends."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from phid import channel, log, memory
from phid.child import Child
from phid.errors import Code, Failure
from phid.exits import describe_exit
from phid.growth import Growth
from phid.jobs import (
    Cancel,
    EngineFacts,
    Event,
    Failed,
    Finished,
    Job,
    Load,
    LoadFailed,
    Ready,
    Stop,
    Unchanged,
    Usage,
)
from phid.patience import Patience
from phid.placing import Placing
from phid.proofs import Proved, Wanted

_FIRST_PAUSE_S = 0.5
_STOP_TIMEOUT_S = 2.0
# When our own loop has stood still for so long, an engine's silence proves nothing.
_DEAF_S = 2.0
_HOPELESS_AFTER = 4
# A client that asks one thing after another leaves shorter gaps than this.
_QUIET_S = 2.0
_MIB = 1 << 20
# Counted over all workers, so that a generation alone says whose engine it is.
_generations = itertools.count(1)
_log = log.get("worker")


@dataclass(frozen=True, slots=True)
class EngineSaid:
    """An event of the engine of this generation, or of the prover before it."""

    generation: int
    event: Event | Proved


@dataclass(frozen=True, slots=True)
class EngineEnded:
    """The engine of this generation is gone; `tail` is the end of what it printed."""

    generation: int
    returncode: int
    tail: tuple[str, ...]


WorkerEvent = EngineSaid | EngineEnded


class Worker:
    """One engine after another for the same model. Owner thread only; never waits.

    Where the choice of its provider needs a proof, a prover comes first, in the engine's place.
    `why` says how the last one ended, `used_at` when one last got a job or said something;
    `recycling` why one was replaced, until the next is ready or fails; `loaded_bytes` is what it
    took when it had loaded. `hang_s` is for `Patience`, `wanted` for `placing`. One that has leaked
    `recycle_bytes` is ended when nobody asks anything; 0: never.
    """

    def __init__(
        self,
        load: Load,
        post: Callable[[WorkerEvent], None],
        *,
        restart_max_s: float,
        hang_s: float = 10.0,
        recycle_bytes: int = 0,
        wanted: Wanted | None = None,
    ) -> None:
        self.load = load
        self.placing = Placing(load, wanted or Wanted())
        self.state: Literal["stopped", "loading", "ready", "pausing", "retiring"] = "stopped"
        self.facts: EngineFacts | None = None
        self.failure: Failure | None = None
        self.running: str | None = None
        self.retry_at: float | None = None
        self.why = ""
        self.used_at = 0.0
        self.recycling: str | None = None
        self.loaded_bytes: int | None = None
        self._post = post
        self._restart_max_s = restart_max_s
        self._generation = 0
        self._failures = 0
        self._unloadable = False
        self._child: Child | None = None
        self._patience = Patience(hang_s)
        self._ticked = time.monotonic()
        self._hung: str | None = None
        self._kill_at = 0.0
        self._recycle_bytes = recycle_bytes
        self._growth = Growth()
        self._cache_tokens = 0
        self._quiet_since: float | None = None
        self._proving = False
        self._asked_to_end = False

    @property
    def free(self) -> bool:
        """True when a job would be run at once."""
        return self.state == "ready" and self.running is None

    @property
    def hopeless(self) -> bool:
        """True while waiting for the engine makes no sense: it cannot load, or keeps dying."""
        return self.state != "ready" and (self._unloadable or self._failures >= _HOPELESS_AFTER)

    @property
    def prefill_slice(self) -> int:
        """How many tokens of a prompt its engine takes in one call; 0: there is no engine."""
        return self.facts.prefill_slice if self.facts else 0

    @property
    def pid(self) -> int | None:
        """The engine's process id while there is one."""
        return self._child.pid if self._child else None

    def start(self) -> None:
        """Spawn an engine and have it load the model; events follow."""
        self._generation = next(_generations)
        self.state, self.retry_at, self.running = "loading", None, None
        self._hung, self._asked_to_end = None, False
        self._growth = Growth()
        try:
            prove = self.placing.settle()
            if prove is None and (refusal := self.placing.refusal):
                self._refuse(refusal)
                return
            self._child = self._spawn(channel.PROVER if prove else channel.ENGINE)
        except (OSError, RuntimeError) as error:  # no process, descriptor, thread or memory left
            self._child = None
            self._pause(f"could not be started: {error}", time.monotonic())
            return
        self._proving = prove is not None
        self._child.send(prove or self.placing.place(self.load))
        if not self._proving:  # a prover has clocks of its own for what it tries
            self._patience.loading(time.monotonic())
        started = "prover_started" if prove else "engine_started"
        _log.info(started, pid=self._child.pid, model=self.load.model)

    def submit(self, job: Job) -> None:
        """Hand a job to the engine, which must be free."""
        assert self._child is not None
        assert self.free
        self.running = job.id
        self._cache_tokens = job.sampling.max_tokens
        self._child.send(job)
        self.used_at = time.monotonic()
        self._patience.handed(self.used_at, job.gather_s)

    def cancel(self, job_id: str) -> None:
        """Have the engine end this job at its next token."""
        if self._child is not None and self.running == job_id:
            self._child.send(Cancel(job_id))

    def stop(self) -> None:
        """End the engine, politely if it listens; waits up to two seconds."""
        if self._child is not None:
            self._child.send(Stop())
            self._child.wait(_STOP_TIMEOUT_S)
        self._child, self.state, self.retry_at = None, "stopped", None
        self._patience.ended()
        self.facts = None

    def retire(self, now: float) -> None:
        """End the engine, which must be idle, and start no other; without waiting.

        What failed is forgotten: whoever wants it again has it tried again.
        """
        assert self.running is None
        self.retry_at, self._failures = None, 0
        self._unloadable, self.failure = False, None
        if self._child is None:
            self.state = "stopped"
            return
        self.state, self._kill_at = "retiring", now + _STOP_TIMEOUT_S
        self._child.send(Stop())
        self._patience.ended()

    def restart(self) -> None:
        """End this engine, without waiting; another is started when it has gone."""
        if self._child is not None:
            self._failures = 0
            self._asked_to_end = True
            self._child.kill()

    def tick(self, now: float, *, quiet: bool = False) -> None:
        """Start an engine whose pause is over; end one that hangs, or one that leaks.

        One that leaks is ended while it is `quiet`: no request is open.
        """
        if now - self._ticked > _DEAF_S:
            self._patience.forgive(now)
        self._ticked = now
        if self.state == "retiring" and self._child is not None and now >= self._kill_at:
            self._child.kill()
        silent_s = self._patience.silence_s(now)
        if silent_s is not None and self._child is not None and self._hung is None:
            self._hung = f"hung ({self._patience.phase}): nothing came of it for {silent_s:.1f} s"
            self._child.kill()
        self._quiet_since = (self._quiet_since or now) if quiet else None
        if self._quiet_since is not None and now - self._quiet_since >= _QUIET_S and self.free:
            self._recycle_if_leaking()
        if self.retry_at is not None and now >= self.retry_at:
            self.start()

    def take(self, said: EngineSaid) -> Event | None:
        """The event, if it is of the engine that runs now; the worker's state follows it.

        None for what a dead engine still had to say.
        """
        if said.generation != self._generation or self._child is None:
            return None
        self.used_at = time.monotonic()
        if isinstance(said.event, Proved):
            return self._proved(said.event)
        if not self._proving:
            self._patience.heard(said.event, self.used_at)
        match said.event:
            case Ready(facts) if elsewhere := self.placing.disagrees(facts):
                self._hung = elsewhere
                self._child.kill()
                return None
            case Ready(facts):
                self.state, self.facts, self.failure = "ready", facts, None
                self._unloadable, self.recycling = False, None
                self.loaded_bytes = memory.resident_bytes(self._child.pid)
            case LoadFailed(code, message):
                self.failure, self._unloadable = Failure(code, message), True
                _log.error("engine_load_failed", code=code, reason=message)
            case Finished() | Failed() | Unchanged():
                if said.event.job_id == self.running:
                    self.running = None
                    self._failures = 0
                if isinstance(said.event, Finished):
                    self._weigh(said.event.usage)
            case _:
                pass
        return said.event

    def ended(self, ended: EngineEnded, now: float) -> bool:
        """True if the current engine was lost, with its job: another start is due."""
        if ended.generation != self._generation or self._child is None:
            return False
        self._child = None
        self._patience.ended()
        self.facts = None
        if self.state == "retiring":
            self.state = "stopped"
            return False
        if self.state == "pausing" and self.recycling is not None:  # this is the one that leaked
            self.why, self.retry_at = self.recycling, now
            return True
        self.recycling = None
        by_command = "was restarted by a command" if self._asked_to_end else None
        why = self._hung or by_command or describe_exit(ended.returncode)
        if self._proving:
            self.placing.unproved(why)
        elif not self._asked_to_end:
            self.placing.crashed(now, why)
        self._pause(why, now, ended.tail)
        return True

    def _pause(self, why: str, now: float, tail: Sequence[str] = ()) -> None:
        """There is no engine: start another, at once if the last has worked, else after a while."""
        self.state, self.running, self.why = "pausing", None, why
        if not self._unloadable:
            self.failure = Failure(Code.ENGINE_LOST, f"the engine {why}")
        pause = min(self._restart_max_s, _FIRST_PAUSE_S * 2 ** (min(self._failures, 16) - 1))
        pause = pause if self._failures else 0.0
        self._failures += 1
        self.retry_at = now + pause
        _log.error("engine_ended", why=why, retry_s=pause, output=list(tail[-5:]))

    def _spawn(self, command: Sequence[str]) -> Child:
        generation, post = self._generation, self._post
        return Child(
            command,
            lambda event: post(EngineSaid(generation, event)),
            lambda returncode, tail: post(EngineEnded(generation, returncode, tail)),
        )

    def _weigh(self, usage: Usage) -> None:
        """Remember what the engine holds after a job."""
        assert self._child is not None
        if (held := memory.own_bytes(self._child.pid)) is not None:
            self._growth.add(held, usage.prompt_tokens + self._cache_tokens)

    def _recycle_if_leaking(self) -> None:
        leaked = self._growth.leaked_bytes()
        if self._child is None or not self._recycle_bytes or leaked < self._recycle_bytes:
            return
        self.recycling = f"replaced, for it had leaked {leaked // _MIB} MiB"
        _log.warning("engine_recycled", pid=self._child.pid, leaked_mb=leaked // _MIB)
        # It is idle: killing it loses nothing and is quick. `pausing`: it gets no more jobs.
        self.state = "pausing"
        self._child.kill()

    def _proved(self, proved: Proved) -> LoadFailed | None:
        """Start the engine where the prover said; the prover ends by itself.

        LoadFailed if no provider may run the model, as if an engine had said so: those who wait are
        told.
        """
        self.placing.proved(proved.selection)
        for report in proved.selection.reports:
            tell = _log.info if report.passed else _log.warning
            tell("provider_tried", provider=report.provider, passed=report.passed, says=report.says)
        refusal = self.placing.refusal
        self.start()
        return LoadFailed(Code.LOADING, refusal) if refusal else None

    def _refuse(self, refusal: str) -> None:
        """There is nothing to start: look again after the longest pause."""
        self.failure, self._unloadable = Failure(Code.LOADING, refusal), True
        self.state, self._child = "pausing", None
        self.retry_at = time.monotonic() + self._restart_max_s
        self.placing.ask_again()
        _log.error("no_provider", reason=refusal, retry_s=self._restart_max_s)
