"""Which watches there are: those of the settings and those of commands, which are remembered."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from phid import log, statefile, watches
from phid.errors import Code, Refused
from phid.watches import MAX_WATCHES, Watch

_SCHEMA = 1
_log = log.get("roster")


class Roster:
    """The watches by name. Owner thread only; never waits.

    `filters` and `names` are what an earlier run, or this one, has subscribed to and told of: a
    broker keeps both, so what is not wanted any more must be taken back by name.
    """

    def __init__(self, notebook: Notebook, base: str) -> None:
        self._notebook = notebook
        self._base = base
        self._max_images = 0
        self._of_settings: dict[str, Watch] = {}
        self._of_commands: dict[str, Watch] = {}
        self._switched_off: set[str] = set()
        self.filters: set[str] = set()
        self.names: set[str] = set()
        self._recall(notebook.read())

    def configure(self, of_settings: Iterable[Watch], max_images: int) -> None:
        """Take over the settings' watches; they win over a command's of the same name."""
        self._max_images = max_images
        self._of_settings = {watch.name: watch for watch in of_settings}

    @property
    def all(self) -> dict[str, Watch]:
        """Every watch that can run, as it is in force."""
        commanded = {
            name: watch
            for name, watch in self._of_commands.items()
            if watch.frames <= self._max_images
        }
        found = commanded | self._of_settings
        off = {"enabled": False}
        return {
            name: watch.model_copy(update=off) if self._is_switched_off(name) else watch
            for name, watch in found.items()
        }

    def is_of_settings(self, name: str) -> bool:
        """True if it stands in the settings: a command can only switch it off and on."""
        return name in self._of_settings

    def put(self, name: str, fresh: Mapping[str, Any]) -> None:
        """Define a watch, or change the fields given. Raises Refused."""
        if name in self._of_settings:
            self._switch(name, fresh)
        else:
            watch = watches.merged(self._of_commands.get(name), {"name": name, **fresh})
            watches.check(watch, self._base, self._max_images)
            if len(self._of_commands.keys() | self._of_settings.keys() | {name}) > MAX_WATCHES:
                raise Refused(Code.TOO_LARGE, f"at most {MAX_WATCHES} watches", field="name")
            self._of_commands[name] = watch
        self._keep()

    def remove(self, name: str) -> None:
        """Forget a watch. Raises Refused for one of the settings and for a stranger."""
        if name in self._of_settings:
            says = f"{name} stands in the settings: it can be disabled, with enabled false"
            raise Refused(Code.UNSUPPORTED, says, field="delete")
        if self._of_commands.pop(name, None) is None:
            raise Refused(Code.NOT_FOUND, f"no watch is named {name}", field="name")
        self._keep()

    def note(self, filters: set[str], names: set[str]) -> None:
        """Remember what the broker keeps for us from now on."""
        if (filters, names) != (self.filters, self.names):
            self.filters, self.names = filters, names
            self._keep()

    def _is_switched_off(self, name: str) -> bool:
        return name in self._switched_off and name in self._of_settings

    def _switch(self, name: str, fresh: Mapping[str, Any]) -> None:
        other = next((field for field in fresh if field != "enabled"), None)
        if other is not None:
            says = f"{name} stands in the settings: only enabled can be changed"
            raise Refused(Code.UNSUPPORTED, says, field=other)
        if fresh:
            watches.merged(self._of_settings[name], fresh)  # raises Refused for what is no flag
            change = self._switched_off.discard if fresh["enabled"] else self._switched_off.add
            change(name)

    def _recall(self, content: dict[str, Any]) -> None:
        for kept in _list(content, "watches"):
            try:
                watch = watches.merged(None, kept if isinstance(kept, dict) else {})
                watches.check(watch, self._base, watch.frames)
            except Refused as refused:
                _log.warning("watch_forgotten", reason=refused.failure.message)
                continue
            self._of_commands[watch.name] = watch
        texts = {
            key: {item for item in _list(content, key) if isinstance(item, str)}
            for key in ("off", "filters", "names")
        }
        self._switched_off, self.filters = texts["off"], texts["filters"]
        self.names = texts["names"]

    def _keep(self) -> None:
        kept = [w.model_dump(exclude_defaults=True) for w in self._of_commands.values()]
        self._notebook.write(
            {
                "watches": kept,
                "off": sorted(self._switched_off),
                "filters": sorted(self.filters),
                "names": sorted(self.names),
            }
        )


class Notebook:
    """A small JSON file, replaced as a whole by a thread of its own: the owner never waits."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def read(self) -> dict[str, Any]:
        """What it says; nothing if it is not there, or set aside."""
        return statefile.read(self._path, _SCHEMA)

    def write(self, content: dict[str, Any]) -> None:
        """Replace what it says, soon."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="notebook", daemon=True)
            self._thread.start()
        self._pages.put(content)

    def stop(self, timeout_s: float = 2.0) -> None:
        """Wait until what was written is on disk."""
        if self._thread is not None:
            self._pages.put(None)
            self._thread.join(timeout_s)
            self._thread = None

    def _run(self) -> None:
        while (page := self._pages.get()) is not None:
            try:
                statefile.write(self._path, _SCHEMA, page)
            except (OSError, MemoryError) as error:
                reason = str(error) or "out of memory"
                _log.error("notebook_not_written", path=str(self._path), reason=reason)


def _list(content: dict[str, Any], key: str) -> list[Any]:
    found = content.get(key)
    return found if isinstance(found, list) else []
