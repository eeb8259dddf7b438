"""What goes wrong under scripts/chaos, one thing after another."""

from __future__ import annotations

import os
import random
import resource
import signal
import threading
import time
from collections import Counter

from _chaos_clients import Asker
from cable import Cable
from rig import Daemon, Mosquitto, child_pids

KEEPALIVE_S = 5
"""The daemon's: how soon it sees that a link is dead."""

# Until it is connected (again): reconnecting backs off to a second, and a half.
_BACK_S = 6


class Faults:
    """What goes wrong, one thing after another; `down` are the times no ping can be held to."""

    def __init__(
        self,
        chance: random.Random,
        daemon: Daemon,
        broker: Mosquitto,
        cable: Cable,
        askers: list[Asker],
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.down: list[tuple[float, float]] = []
        self._chance = chance
        self._daemon = daemon
        self._broker = broker
        self._cable = cable
        self._askers = askers
        self._deck: list[str] = []
        self._kinds = {
            "engine_kills": (4, self._kill_engine),
            "engine_hangs": (1, self._stop_engine),
            "service_kills": (3, self._kill_service),
            "service_restarts": (1, self._restart_service),
            "broker_restarts": (1, lambda: self._restart_broker(signal.SIGTERM)),
            "broker_kills": (1, lambda: self._restart_broker(signal.SIGKILL)),
            "net_cuts": (2, lambda: self._cable.cut(self._chance.uniform(0, 2))),
            "net_stalls": (1, lambda: self._cable.stall(self._chance.uniform(0.2, 2))),
            "upload_cuts": (2, self._cut_upload),
            "half_opens": (1, self._leave_half_open),
            "mute_brokers": (1, lambda: self._cable.mute(self._chance.uniform(0.5, 3))),
            "disk_full": (1, self._fill_disk),
        }

    @property
    def kinds(self) -> list[str]:
        """Everything that can go wrong."""
        return sorted(self._kinds)

    def go_on(self, ended: threading.Event, every: tuple[float, float]) -> None:
        """One after another, so many seconds apart, until told otherwise."""
        while not ended.wait(self._chance.uniform(*every)):
            self.one()

    def one(self) -> None:
        """Do one at random."""
        if not self._deck:  # each comes up, the ones with more weight more often
            self._deck = [name for name, (weight, _) in self._kinds.items() for _ in range(weight)]
            self._chance.shuffle(self._deck)
        name = self._deck.pop()
        began = time.monotonic()
        if self._kinds[name][1]() is False:
            return
        self.counts[name] += 1
        if not name.startswith(("engine", "disk")):
            self.down.append((began - 0.5, time.monotonic() + _BACK_S))

    def _engine(self) -> int | None:
        process = self._daemon.process
        children = child_pids(process.pid) if process is not None else []
        return children[0] if children else None

    def _kill_engine(self) -> None:
        if (pid := self._engine()) is not None:
            os.kill(pid, signal.SIGKILL)

    def _stop_engine(self) -> None:
        if (pid := self._engine()) is not None:
            os.kill(pid, signal.SIGSTOP)

    def _kill_service(self) -> None:
        self._daemon.stop(signal.SIGKILL)
        time.sleep(self._chance.uniform(0, 1))
        self._daemon.start()

    def _restart_service(self) -> None:
        self._daemon.stop()
        self._daemon.start()

    def _restart_broker(self, number: int) -> None:
        self._broker.stop(number)
        if number == signal.SIGKILL:
            for asker in self._askers:
                asker.broker_dies()
        time.sleep(self._chance.uniform(0, 1))
        self._broker.start()

    def _cut_upload(self) -> bool:
        """The link breaks in the middle of a picture of megabytes; False if none came in time."""
        self._chance.choice(self._askers).large_wanted = True
        return self._cable.cut_within(self._chance.randint(1 << 16, 1 << 20), 5)

    def _leave_half_open(self) -> None:
        """The link is dead and looks alive: noticed within 1.5 times the keep-alive."""
        self._cable.abandon()
        time.sleep(1.5 * KEEPALIVE_S + 0.5)

    def _fill_disk(self) -> None:
        """The service's files may not grow: what a full disk comes to, without filling one."""
        assert self._daemon.process is not None
        pid, endless = self._daemon.process.pid, resource.RLIM_INFINITY
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, endless))
        time.sleep(self._chance.uniform(0.5, 2))
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (endless, endless))
