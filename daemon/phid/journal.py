"""What was accepted and what became of it, on disk: a SQLite file, written by one thread.

One write for each request, one mark before its first delta, one for its outcome; none for a token.
What comes while a commit is under way goes into the next one. A commit is on the disk when it is
told of (WAL, synchronous=FULL), as far as the disk keeps its word.
"""

from __future__ import annotations

import contextlib
import queue
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from phid import log, statefile, tables
from phid.entries import Awaited, Entry, JournalEvent, Left, NotWritten, Written
from phid.settings import SettingsError

_APPLICATION_ID = 0x70686964  # "phid"
_GROUP = 256
_PAGE_BYTES = 4096
# Outcomes must find room when no request does any more.
_HEADROOM = 1.25
_SAMPLES = 256
_log = log.get("journal")


class JournalTooNewError(SettingsError):
    """A later version of phid has written this file."""


class Journal:
    """The file, and the thread that writes it. `post` is called on that thread.

    `failing` says why the last thing could not be written; `unread` is true until the owner has
    what an earlier run has left there. Owner thread only, but for `post`.
    """

    def __init__(self, path: Path, post: Callable[[JournalEvent], None], *, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.failing: str | None = None
        self.unread = False
        self.used_bytes = 0
        self.failures = 0
        self.commit_ms: deque[float] = deque(maxlen=_SAMPLES)
        self._path = path
        self._post = post
        self._database: sqlite3.Connection | None = None
        self._is_read = False
        self._later: list[Entry] = []
        self._batches: queue.SimpleQueue[tuple[Entry, ...] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)

    def open(self) -> Left | None:
        """Start the thread: what an earlier run has left. Raises JournalTooNewError.

        A file that is damaged or not ours is set aside, and a new one begun. One that cannot be
        opened is tried again at each write: None, and what was left is posted when it is read.
        """
        left = self._open()
        self.unread = left is None
        self._thread.start()
        return left

    def write(self, *entries: Entry) -> None:
        """Have these written at once, in one commit; Written or NotWritten follows."""
        self._batches.put((*self._later, *entries))
        self._later = []

    def write_later(self, entry: Entry) -> None:
        """Have this written with the next that is written at once: nothing depends on it."""
        self._later.append(entry)

    @property
    def waiting(self) -> bool:
        """True while there is something that was to be written later."""
        return bool(self._later)

    def flush(self) -> None:
        """Write now what was to be written later."""
        if self._later:
            self._batches.put(tuple(self._later))
            self._later = []

    def stop(self, timeout_s: float = 5.0) -> None:
        """Wait until everything is on the disk."""
        if self._thread.ident is None:
            return
        self.flush()
        self._batches.put(None)
        self._thread.join(timeout_s)

    # The thread.

    def _run(self) -> None:
        ended = False
        while not ended and (batch := self._batches.get()) is not None:
            entries = list(batch)
            while len(entries) < _GROUP:
                try:
                    more = self._batches.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    ended = True
                    break
                entries += more
            self._commit_all(entries)
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                self._database.close()

    def _commit_all(self, entries: list[Entry]) -> None:
        """All in one commit, or else one by one: an outcome may fit where a frame does not."""
        began = time.monotonic()
        if self._database is None and not self._open_late():
            # One try for all of them: a locked file takes its time to say so.
            for entry in entries:
                self._post(NotWritten(entry, self.failing or ""))
        elif self._commit(entries) is None:
            self._written(entries)
        else:
            for entry in entries:
                if (reason := self._commit([entry])) is None:
                    self._written([entry])
                else:
                    self._post(NotWritten(entry, reason))
        self.commit_ms.append((time.monotonic() - began) * 1e3)

    def _written(self, entries: list[Entry]) -> None:
        for entry in entries:
            # It is on the disk: its message can be acknowledged before the owner hears of it.
            if isinstance(entry, Awaited) and entry.decided is not None:
                entry.decided.set()
        self._post(Written(tuple(entries)))

    def _commit(self, entries: Iterable[Entry]) -> str | None:
        """Why it failed; None when it is done."""
        if self._database is None and not self._open_late():
            return self.failing
        assert self._database is not None
        try:
            with _transaction(self._database):
                for entry in entries:
                    tables.apply(self._database, entry)
            self._measure(self._database)
        except (sqlite3.Error, OSError, MemoryError) as error:
            if self._is_damage(error):
                self._put_aside(str(error))
            return self._failed(error)
        if self.failing is not None:
            _log.info("journal_writes_again")
        self.failing = None
        return None

    def _open(self) -> Left | None:
        """Open the file: what is there, the first time; later None. Raises JournalTooNewError.

        None too if it cannot be opened: `failing` says why.
        """
        for is_last in (False, True):
            try:
                self._database = self._connect()
                left = None if self._is_read else tables.read(self._database)
            except (sqlite3.Error, OSError, MemoryError) as error:
                self._close()
                if is_damage := self._is_damage(error):
                    self._put_aside(str(error))
                if is_last or not is_damage:
                    self._failed(error)
                    break
            else:
                self._is_read = True
                return left
        return None

    def _open_late(self) -> bool:
        """True if it is open now; what an earlier run has left there is posted once."""
        try:
            left = self._open()
        except JournalTooNewError as error:  # another process held it when we started
            self._failed(error)
            return False
        if left is not None:
            self._post(left)
        return self._database is not None

    def _failed(self, error: Exception) -> str:
        self.failures += 1
        says = str(error) or "out of memory"  # SQLite's MemoryError has no text
        reason = f"{self._path}: {says}"
        if self.failing is None:
            _log.error("journal_not_written", reason=reason)
        self.failing = reason
        # A connection that has run out of memory may still be within a transaction.
        if isinstance(error, OSError | MemoryError) or "disk I/O" in says or "readonly" in says:
            self._close()
        return reason

    def _close(self) -> None:
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                self._database.close()
        self._database = None

    def _is_damage(self, error: Exception) -> bool:
        """True for a file that SQLite cannot make sense of, or that is not ours."""
        return isinstance(error, sqlite3.DatabaseError) and not isinstance(
            error, sqlite3.OperationalError | sqlite3.IntegrityError | sqlite3.ProgrammingError
        )

    def _put_aside(self, reason: str) -> None:
        self._close()
        aside = statefile.set_aside(self._path, ("-wal", "-shm"))
        _log.error("journal_set_aside", reason=reason, kept=str(aside))

    def _connect(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(
            self._path, isolation_level=None, check_same_thread=False, timeout=2.0
        )
        try:
            self._prepare(database)
        except BaseException:
            database.close()
            raise
        return database

    def _prepare(self, database: sqlite3.Connection) -> None:
        # No other process may write it, and none needs its shared memory.
        database.execute("PRAGMA locking_mode=EXCLUSIVE")
        (application,) = database.execute("PRAGMA application_id").fetchone()
        (schema,) = database.execute("PRAGMA user_version").fetchone()
        (count,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if count and application != _APPLICATION_ID:
            raise sqlite3.DatabaseError("it is another program's")
        if schema > tables.SCHEMA:
            raise JournalTooNewError(
                f"{self._path} was written by a later version of phid (schema {schema}, this one "
                f"knows {tables.SCHEMA}): run that one, or move the file away"
            )
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        database.execute(f"PRAGMA journal_size_limit={16 << 20}")
        if not count:
            with _transaction(database):
                database.execute(f"PRAGMA application_id={_APPLICATION_ID}")
                database.execute(f"PRAGMA user_version={tables.SCHEMA}")
        with _transaction(database):
            for statement in tables.CREATE.split(";"):
                database.execute(statement)
        # Set after the tables are made: a table new in this version fits into a full file, too.
        database.execute(f"PRAGMA max_page_count={int(self.max_bytes * _HEADROOM) // _PAGE_BYTES}")
        (sound,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if sound != "ok":
            raise sqlite3.DatabaseError(f"it is damaged: {sound}")
        self._measure(database)

    def _measure(self, database: sqlite3.Connection) -> None:
        (pages,) = database.execute("PRAGMA page_count").fetchone()
        (free,) = database.execute("PRAGMA freelist_count").fetchone()
        self.used_bytes = (pages - free) * _PAGE_BYTES


@contextlib.contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        # Some errors have rolled it back already.
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise
