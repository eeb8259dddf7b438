"""What lies between a daemon and its broker, to be cut, stopped up or left half open."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal, Self


class Cable:
    """A TCP proxy between the daemon and its broker that can be cut, or go silent."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._answers: Literal["yes", "no", "never"] = "yes"
        self._flows = threading.Event()
        self._flows.set()
        self._pairs: list[socket.socket] = []
        self._until_cut: int | None = None
        self._was_cut = threading.Event()
        self._muted: list[socket.socket] = []
        self._abandoned: list[threading.Event] = []
        self._threads: list[threading.Thread] = []
        self._begin(self._accept)

    @property
    def armed(self) -> bool:
        """True while `cut_within` waits for what it is to cut."""
        return self._until_cut is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take it away."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._hang_up()
        for flows in (*self._abandoned, self._flows):
            flows.set()
        for thread in self._threads:
            thread.join(5)
        self._listener.close()

    def cut(self, seconds: float) -> None:
        """Every connection is reset, and none is made for a while."""
        self._answers = "no"
        self._hang_up()
        time.sleep(seconds)
        self._answers = "yes"

    def cut_within(self, size_bytes: int, seconds: float) -> bool:
        """Cut when so many bytes more have come from the broker; False if they do not in time."""
        self._was_cut.clear()
        self._until_cut = size_bytes
        done = self._was_cut.wait(seconds)
        self._until_cut = None
        return done

    def stall(self, seconds: float) -> None:
        """Nothing passes for a while, and nobody is told."""
        self._flows.clear()
        time.sleep(seconds)
        self._flows.set()

    def abandon(self) -> None:
        """Nothing passes any more on the connections there are, and nobody is told; new ones work.

        What a router leaves that has been switched off and on: half-open links.
        """
        self._flows.clear()
        self._abandoned.append(self._flows)
        self._flows = threading.Event()
        self._flows.set()
        self._pairs.clear()

    def mute(self, seconds: float) -> None:
        """Whoever connects is accepted, and never gets an answer; for a while."""
        self._answers = "never"
        self._hang_up()
        time.sleep(seconds)
        self._answers = "yes"
        for one in self._muted:
            one.close()
        self._muted.clear()

    def _begin(self, target: Callable[..., None], *args: Any) -> None:
        self._threads.append(threading.Thread(target=target, args=args, daemon=True))
        self._threads[-1].start()

    def _hang_up(self) -> None:
        for one in self._pairs:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._pairs.clear()

    def _accept(self) -> None:
        while True:
            try:
                ours, _ = self._listener.accept()
            except OSError:  # it was closed
                return
            match self._answers:
                case "no":
                    ours.close()
                    continue
                case "never":
                    self._muted.append(ours)
                    continue
            try:
                theirs = socket.create_connection(("127.0.0.1", self._target), 2)
            except OSError:
                ours.close()
                continue
            theirs.settimeout(None)
            self._pairs += [ours, theirs]
            for source, sink in ((ours, theirs), (theirs, ours)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._begin(self._pass, source, sink, self._flows, source is theirs)

    def _pass(
        self, source: socket.socket, sink: socket.socket, flows: threading.Event, inbound: bool
    ) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                flows.wait()
                if inbound and self._until_cut is not None:
                    left = self._until_cut
                    self._until_cut = left - len(data)
                    if left <= len(data):
                        sink.sendall(data[:left])  # the rest of the packet never comes
                        self._until_cut = None
                        self._hang_up()
                        self._was_cut.set()
                        break
                sink.sendall(data)
        flows.wait()  # nor is anybody told of an end
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        source.close()  # the other one is the other thread's
