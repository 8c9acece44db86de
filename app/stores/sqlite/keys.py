"""Idempotency keys in SQLite: bound, released and found inside the transaction of the caller.

A key is bound by a turn's start record and again by its commit, so that a lost
start record loses no key. A turn that is not committed gives it up to whoever asks
next: its release may have failed, and only committed turns are ever found by key.
A release deletes the row: nothing asks which key a failed turn once had.
"""

import logging
from typing import Any, NamedTuple
from zlib import crc32

from app.domain.errors import SnapshotUnreadable
from app.domain.idempotency import Binding
from app.domain.ids import to_id_bytes
from app.domain.turn import Turn
from app.stores.side_rows import from_fingerprint, to_fingerprint
from app.stores.sqlite.connection import Connection
from app.stores.sqlite.rows import is_committed

_FIND = (
    "SELECT session, turn_id, fingerprint, created_at, seal FROM idempotency_keys WHERE owner = ? AND key = ?"
)
_LIST = (
    "SELECT owner, key, session, turn_id, fingerprint, created_at, seal FROM idempotency_keys"
    " WHERE session = ?"
)
_FIND_HOLDER = (
    "SELECT k.session, k.turn_id, t.status, t.kept FROM idempotency_keys AS k"
    " LEFT JOIN turns AS t ON t.session = k.session AND t.turn_id = k.turn_id"
    " WHERE k.owner = ? AND k.key = ?"
)
_BIND = (
    "REPLACE INTO idempotency_keys (owner, key, fingerprint, session, turn_id, created_at, seal)"
    " VALUES (?, ?, ?, ?, ?, ?, ?)"
)
_RELEASE = "DELETE FROM idempotency_keys WHERE session = ? AND turn_id = ?"

_log = logging.getLogger(__name__)


class Bound(NamedTuple):
    """What a key is bound to, by the session's number."""

    session: int
    turn_id: bytes
    fingerprint: bytes


def bind(connection: Connection, session: int, turn: Turn) -> None:
    """Bind the turn's key, unless a committed turn has it: the commit counts, not the key."""
    if turn.binding is None:
        return
    holder = connection.execute(_FIND_HOLDER, (turn.binding.owner, turn.binding.key)).fetchone()
    if holder is not None and holder[:2] == (session, to_id_bytes(turn.turn_id)):
        return
    if holder is not None and holder[2] in range(4) and is_committed(holder[2], holder[3]):
        _log.error("the idempotency key of turn %s belongs to another committed turn", turn.turn_id)
        return
    take(connection, session, turn)


def take(connection: Connection, session: int, turn: Turn) -> None:
    """Bind the turn's key, whoever has it."""
    if turn.binding is None:
        return
    owner, key, fingerprint = turn.binding.owner, turn.binding.key, turn.binding.fingerprint
    turn_id = to_id_bytes(turn.turn_id)
    stored = to_fingerprint(connection.sealer, owner, key, turn_id, fingerprint)
    sealed = _seal(owner, key, Bound(session, turn_id, stored), turn.started_at)
    connection.execute(_BIND, (owner, key, stored, session, turn_id, turn.started_at, sealed))


def release(connection: Connection, session: int, turn_id: bytes) -> None:
    connection.execute(_RELEASE, (session, turn_id))


def find(connection: Connection, owner: str, key: str) -> Bound | None:
    """Return what the key is bound to.

    Raises:
        SnapshotUnreadable: the row is broken.
    """
    row: Any = connection.execute(_FIND, (owner, key)).fetchone()
    return None if row is None else _read(connection, owner, key, row)


def list_bindings(connection: Connection, session: int) -> dict[bytes, Binding]:
    """Return what is bound to turns of a session, by their ids.

    Raises:
        SnapshotUnreadable: a row is broken.
    """
    found = {}
    rows: list[Any] = connection.execute(_LIST, (session,)).fetchall()
    for owner, key, *row in rows:
        bound = _read(connection, owner, key, row)
        found[bound.turn_id] = Binding(owner, key, bound.fingerprint)
    return found


def _read(connection: Connection, owner: str, key: str, row: Any) -> Bound:
    bound = Bound(*row[:3])
    try:
        is_whole = _seal(owner, key, bound, row[3]) == row[4]
    except TypeError as error:
        raise SnapshotUnreadable from error
    if not is_whole:
        raise SnapshotUnreadable
    fingerprint = from_fingerprint(connection.sealer, owner, key, bound.turn_id, bound.fingerprint)
    return bound._replace(fingerprint=fingerprint)


def _seal(owner: str, key: str, bound: Bound, created_at: int) -> int:
    text = f"{owner}\0{key}\0{bound.session}\0{created_at}\0"
    return crc32(text.encode() + bound.fingerprint + bound.turn_id)
