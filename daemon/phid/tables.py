"""The journal's tables: how entries change them, and what they say."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Sequence
from types import UnionType
from typing import Any, assert_never

from phid import log
from phid.entries import (
    Accepted,
    AskedAgain,
    ConversationDropped,
    ConversationKept,
    Ended,
    Entry,
    Forgotten,
    Left,
    Marked,
    PartKept,
    PartsDropped,
    Row,
    Stepped,
    Told,
    Tried,
)
from phid.jobs import Turn
from phid.ledger import ReplyAddress
from phid.sections import PARTS_KEPT_S
from phid.traffic import Inbound

_Kind = type | UnionType
_Bytes = bytes | None

_log = log.get("tables")

SCHEMA = 1
"""The version of the tables; a file of a later one is refused, never guessed at."""

CREATE = """
CREATE TABLE IF NOT EXISTS requests (
    number INTEGER PRIMARY KEY, client TEXT NOT NULL, id TEXT NOT NULL, id_given INTEGER NOT NULL,
    digest TEXT NOT NULL, topic TEXT NOT NULL, reply_topic TEXT NOT NULL, correlation BLOB,
    accepted_ts REAL NOT NULL, deadline_ts REAL NOT NULL, marked INTEGER NOT NULL DEFAULT 0,
    outcome TEXT, ended_ts REAL, told INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS payloads (
    number INTEGER PRIMARY KEY, payload BLOB NOT NULL, properties TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS addresses (
    number INTEGER NOT NULL, reply_topic TEXT NOT NULL, correlation BLOB
);
CREATE TABLE IF NOT EXISTS pictures (
    client TEXT NOT NULL, id TEXT NOT NULL, n INTEGER NOT NULL, ts REAL NOT NULL,
    data BLOB NOT NULL, PRIMARY KEY (client, id, n)
);
CREATE TABLE IF NOT EXISTS conversations (
    client TEXT NOT NULL, session TEXT NOT NULL, system TEXT NOT NULL, turns TEXT NOT NULL,
    ts REAL NOT NULL, PRIMARY KEY (client, session)
)
"""
"""All tables, a statement each; an older file is given those that it lacks."""

_NO_REQUEST = """NOT EXISTS (
    SELECT 1 FROM requests
    WHERE requests.client = pictures.client AND requests.id = pictures.id AND outcome IS NULL
)
"""
_DROP_STRAY_PARTS = f"DELETE FROM pictures WHERE ts < ? AND {_NO_REQUEST}"  # noqa: S608 - no input
_DROP_PARTS = f"DELETE FROM pictures WHERE client = ? AND id = ? AND n >= 0 AND {_NO_REQUEST}"  # noqa: S608


# Rows without a request, whose number was damaged: a later request may get their number.
_DROP_STRAYS = tuple(
    f"DELETE FROM {table} WHERE number NOT IN (SELECT number FROM requests)"  # noqa: S608 - no input
    for table in ("payloads", "addresses")
)
_DROP_PICTURES = """DELETE FROM pictures
    WHERE (client, id) IN (SELECT client, id FROM requests WHERE number = :n AND outcome IS NULL)
    AND NOT EXISTS (
        SELECT 1 FROM requests WHERE requests.client = pictures.client
        AND requests.id = pictures.id AND outcome IS NULL AND number != :n
    )
"""

# OR IGNORE: a damaged time, which is no number any more, must not keep the others from moving.
_STEP = """
UPDATE OR IGNORE requests SET accepted_ts = accepted_ts + :by_s, deadline_ts = deadline_ts + :by_s,
    ended_ts = ended_ts + :by_s
"""


def apply(database: sqlite3.Connection, entry: Entry) -> None:  # noqa: C901, PLR0912 - a case each
    """Write an entry, within the transaction that is open."""
    match entry:
        case Accepted():
            _accept(database, entry)
        case AskedAgain(number, address):
            database.execute(
                "INSERT INTO addresses VALUES (?, ?, ?)",
                (number, address.topic, address.correlation),
            )
            # An outcome that was told before a journal opened late is owed to this address, too.
            database.execute("UPDATE requests SET told = 0 WHERE number = ?", (number,))
        case PartKept(client, request_id, n, data, ts):
            _keep(database, client, request_id, n, ts, data)
            database.execute(_DROP_STRAY_PARTS, (ts - PARTS_KEPT_S,))
        case PartsDropped(client, request_id):
            database.execute(_DROP_PARTS, (client, request_id))
        case ConversationKept():
            _keep_conversation(database, entry)
        case ConversationDropped(client, session):
            database.execute(
                "DELETE FROM conversations WHERE client = ? AND session = ?", (client, session)
            )
        case Marked(number):
            database.execute("UPDATE requests SET marked = 1 WHERE number = ?", (number,))
        case Ended(number, outcome, ts, said):
            if said is not None:
                _keep_conversation(database, said)
            _drop_payload(database, number)
            database.execute(
                "UPDATE requests SET outcome = ?, ended_ts = ? WHERE number = ?",
                (outcome, ts, number),
            )
        case Told(number):
            database.execute("UPDATE requests SET told = 1 WHERE number = ?", (number,))
            database.execute("DELETE FROM addresses WHERE number = ?", (number,))
        case Forgotten(number):
            _drop_payload(database, number)
            database.execute("DELETE FROM addresses WHERE number = ?", (number,))
            database.execute("DELETE FROM requests WHERE number = ?", (number,))
        case Stepped(by_s):
            database.execute(_STEP, {"by_s": by_s})
            database.execute("UPDATE OR IGNORE pictures SET ts = ts + ?", (by_s,))
            database.execute("UPDATE OR IGNORE conversations SET ts = ts + ?", (by_s,))
        case Tried():
            database.execute(f"PRAGMA user_version={SCHEMA}")
        case _:
            assert_never(entry)


def _accept(database: sqlite3.Connection, entry: Accepted) -> None:
    inbound = entry.inbound
    database.execute(
        "INSERT INTO requests (number, client, id, id_given, digest, topic, reply_topic,"
        " correlation, accepted_ts, deadline_ts) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(entry.number, entry.client, entry.id, entry.id_given, entry.digest, inbound.topic),
            *(entry.address.topic, entry.address.correlation),
            *(entry.accepted_ts, entry.deadline_ts),
        ),
    )
    properties = json.dumps({"user": inbound.user})
    database.execute(
        "INSERT INTO payloads VALUES (?, ?, ?)", (entry.number, inbound.payload, properties)
    )
    for n, data in entry.pictures:
        _keep(database, entry.client, entry.id, n, entry.accepted_ts, data)


def _keep_conversation(database: sqlite3.Connection, kept: ConversationKept) -> None:
    """Keep it, unless a newer one is there: this one may have had to wait for the disk."""
    turns = json.dumps([[turn.role, turn.content] for turn in kept.turns], ensure_ascii=False)
    database.execute(
        "INSERT INTO conversations VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE"
        " SET system = excluded.system, turns = excluded.turns, ts = excluded.ts"
        " WHERE excluded.ts >= ts OR typeof(ts) != 'real'",
        (kept.client, kept.session, kept.system, turns, kept.ts),
    )


def _user_properties(text: str | None) -> tuple[tuple[str, str], ...] | None:
    """The user properties; None where they cannot be read any more."""
    try:
        return tuple((str(n), str(v)) for n, v in json.loads(text)["user"]) if text else ()
    except (ValueError, LookupError, TypeError):
        return None


def _keep(
    database: sqlite3.Connection, client: str, request_id: str, n: int, ts: float, data: bytes
) -> None:
    database.execute(
        "INSERT OR REPLACE INTO pictures VALUES (?, ?, ?, ?, ?)", (client, request_id, n, ts, data)
    )


def _drop_payload(database: sqlite3.Connection, number: int) -> None:
    """Drop what a request asked: only what came of it is needed from now on.

    If it has ended already, pictures under its id are another's, and stay.
    """
    database.execute("DELETE FROM payloads WHERE number = ?", (number,))
    database.execute(_DROP_PICTURES, {"n": number})


def read(database: sqlite3.Connection) -> Left:
    """All that is there; what belongs to no request is dropped.

    Raises sqlite3.DatabaseError where a request cannot be made out.
    """
    database.text_factory = _text
    also: dict[int, list[ReplyAddress]] = {}
    for row in database.execute("SELECT * FROM addresses"):
        number, topic, correlation = _checked(row, int, str, _Bytes)
        also.setdefault(number, []).append(ReplyAddress(topic, correlation))
    parts: list[PartKept] = []
    shown: dict[tuple[str, str], list[tuple[int, bytes]]] = {}
    for row in database.execute("SELECT * FROM pictures ORDER BY ts"):
        client, request_id, n, ts, data = _checked(row, str, str, int, object, bytes)
        if n < 0:
            shown.setdefault((client, request_id), []).append((n, data))
        else:
            parts.append(PartKept(client, request_id, n, data, _ts(ts)))
    rows = [
        _row(row, shown, also)
        for row in database.execute(
            "SELECT requests.*, payload, properties FROM requests LEFT JOIN payloads USING (number)"
            " ORDER BY number"
        )
    ]
    conversations = _conversations(database)
    for statement in _DROP_STRAYS:
        database.execute(statement)
    return Left(tuple(rows), tuple(parts), tuple(conversations))


def _conversations(database: sqlite3.Connection) -> list[ConversationKept]:
    """The conversations that can be read; the others are owed to nobody, and dropped."""
    sound, damaged = [], []
    for row, *columns in database.execute("SELECT rowid, * FROM conversations").fetchall():
        kept = _conversation(*columns)
        if kept is None:
            damaged.append((row,))
        else:
            sound.append(kept)
    if damaged:
        _log.error("conversations_unreadable", count=len(damaged))
        database.executemany("DELETE FROM conversations WHERE rowid = ?", damaged)
    return sound


def _conversation(
    client: Any, session: Any, system: Any, turns: Any, ts: Any
) -> ConversationKept | None:
    try:
        said = tuple(Turn(role, content) for role, content in json.loads(turns))
    except (ValueError, TypeError):
        return None
    roles = {turn.role for turn in said}
    texts = (client, session, system, *(turn.content for turn in said))
    sound = said and roles <= {"user", "assistant"} and all(isinstance(t, str) for t in texts)
    if not sound or not math.isfinite(_ts(ts)):
        return None
    return ConversationKept(client, session, system, said, ts)


def _row(
    row: tuple[Any, ...],
    shown: dict[tuple[str, str], list[tuple[int, bytes]]],
    also: dict[int, list[ReplyAddress]],
) -> Row:
    *asked, marked, outcome, ended_ts, told, payload, properties = row
    number, client, request_id, id_given, digest, topic, reply_topic, correlation, *times = (
        _checked(asked, int, str, str, int, str, str, str, _Bytes, object, object)
    )
    marked, told = _checked((marked, told), int, int)
    user = _user_properties(properties)
    inbound = Inbound(
        topic,
        payload if isinstance(payload, bytes) else b"",
        qos=1,
        retain=False,
        dup=False,
        response_topic=reply_topic,
        user=user or (),
    )
    accepted = Accepted(
        number=number,
        client=client,
        id=request_id,
        id_given=bool(id_given),
        digest=digest,
        inbound=inbound,
        address=ReplyAddress(reply_topic, correlation),
        accepted_ts=_ts(times[0]),
        deadline_ts=_ts(times[1]),
        pictures=tuple(shown.get((client, request_id), ())),
    )
    sound = isinstance(payload, bytes) and user is not None
    if outcome is not None:
        sound = isinstance(outcome, str)
        outcome = outcome if sound else ""
    return Row(
        accepted,
        marked=bool(marked),
        addresses=tuple(also.get(number, ())),
        outcome=outcome,
        ended_ts=_ts(ended_ts or 0.0),
        told=bool(told),
        damaged=not sound,
    )


def _ts(value: object) -> float:
    """The time; NaN where it is none (any more). SQLite keeps NaN as NULL."""
    return value if isinstance(value, float) else math.nan


def _text(data: bytes) -> str | bytes:
    """The text; the bytes where they are none any more, which SQLite itself does not check."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _checked(values: Sequence[Any], *kinds: _Kind) -> Sequence[Any]:
    """The values, which are of these kinds. Raises sqlite3.DatabaseError."""
    for value, kind in zip(values, kinds, strict=True):
        if not isinstance(value, kind):
            raise sqlite3.DatabaseError(f"it is damaged: {type(value).__name__} for {kind}")
    return values
