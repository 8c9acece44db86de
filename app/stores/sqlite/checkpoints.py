"""Checkpoints in SQLite. Naming a place writes one row, two if its state is not kept yet."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import apsw

from app.domain.checkpoint import AutoCheckpoint, Checkpoint, CheckpointPage
from app.domain.errors import CheckpointNotFound, SnapshotUnreadable
from app.domain.ids import to_id_bytes
from app.domain.session import Session
from app.domain.turn import Turn
from app.stores import rules
from app.stores.cursor import from_cursor, to_cursor
from app.stores.sealing import Sealer
from app.stores.side_rows import CHECKPOINT_COLUMNS, Row, from_checkpoint_row, to_checkpoint_row
from app.stores.sqlite import records
from app.stores.sqlite.connection import Connection
from app.stores.sqlite.records import marks
from app.stores.sqlite.rows import LATEST_MS, Record
from app.stores.sqlite.tree import find_tree, get_record, to_raw_id
from app.stores.sqlite.unit import Unit

ADD_CHECKPOINT = (
    f"INSERT INTO checkpoints ({CHECKPOINT_COLUMNS}, session) VALUES ({marks(CHECKPOINT_COLUMNS)}, ?)"
)
_FIND = f"SELECT {CHECKPOINT_COLUMNS} FROM checkpoints WHERE session = ? AND checkpoint_id = ?"
_LIST = (
    f"SELECT {CHECKPOINT_COLUMNS} FROM checkpoints WHERE session = ?"
    " AND (created_at, checkpoint_id) < (?, ?) ORDER BY created_at DESC, checkpoint_id DESC"
)
_COUNT = "SELECT count(*) FROM checkpoints WHERE session = ?"
_COUNT_NAMED = "SELECT count(*) FROM checkpoints WHERE session = ? AND automatic = 0"
_TRIM = (
    "DELETE FROM checkpoints WHERE id IN (SELECT id FROM checkpoints WHERE session = ? AND automatic = 1"
    " ORDER BY created_at DESC, checkpoint_id DESC LIMIT -1 OFFSET ?)"
)
_DELETE = "DELETE FROM checkpoints WHERE session = ? AND checkpoint_id = ?"
_DELETE_ALL = "DELETE FROM checkpoints WHERE session = ?"
_END = LATEST_MS, b"\xff" * 17

_log = logging.getLogger(__name__)


def add_checkpoint(unit: Unit, session: Session, checkpoint: Checkpoint) -> Checkpoint:
    record = get_record(unit.connection, session)
    known = _find_row(unit.connection, record.number, checkpoint.checkpoint_id)
    if known is not None:
        return from_checkpoint_row(unit.sealer, record.uid, known)
    rules.check_named(unit.connection.execute(_COUNT_NAMED, (record.number,)).get)
    named = replace(checkpoint, turn_id=record.session.head)
    state_number = records.keep_state(unit, record)
    _add(unit, record, named, state_number)
    if state_number != record.state_number:
        now = checkpoint.created_at
        records.save(unit, record, record.session, now, state_number=state_number)
    return named


def add_automatic(
    unit: Unit, record: Record, wanted: AutoCheckpoint, turn: Turn, state_number: int | None
) -> None:
    """Name the turn that is being committed, and forget the oldest of such names beyond ``wanted.keep``."""
    _add(unit, record, rules.automatic_checkpoint(wanted, turn), state_number)
    unit.connection.execute(_TRIM, (record.number, wanted.keep))


def list_checkpoints(
    connection: Connection, session: Session, limit: int, cursor: str | None
) -> CheckpointPage:
    start = _END if cursor is None else _position(cursor)
    tree = find_tree(connection, session)
    if tree is None:
        return CheckpointPage((), 0, None)
    rows = connection.execute(_LIST, (tree.number, *start))
    found = list(islice(_readable(rows, connection.sealer, session), limit + 1))
    rows.close(True)
    page = tuple(found[:limit])
    following = to_cursor("c", page[-1].created_at, page[-1].checkpoint_id) if len(found) > limit else None
    return CheckpointPage(page, connection.execute(_COUNT, (tree.number,)).get, following)


def get_checkpoint(connection: Connection, session: Session, checkpoint_id: str) -> Checkpoint:
    tree = find_tree(connection, session)
    row = tree and _find_row(connection, tree.number, checkpoint_id)
    if row is None:
        raise CheckpointNotFound(session_id=session.key.session_id)
    return _read(row, connection.sealer, session)


def get_target(connection: Connection, record: Record, checkpoint_id: str) -> tuple[Checkpoint, int | None]:
    """Return a checkpoint and the number under which its state is kept.

    Raises:
        CheckpointNotFound, SnapshotUnreadable
    """
    row = _find_row(connection, record.number, checkpoint_id)
    if row is None:
        raise CheckpointNotFound(session_id=record.session.key.session_id)
    return _read(row, connection.sealer, record.session), row[2]


def delete_checkpoints(unit: Unit, session: Session, checkpoint_id: str | None) -> int:
    tree = find_tree(unit.connection, session)
    if tree is None:
        return 0
    if checkpoint_id is None:
        unit.connection.execute(_DELETE_ALL, (tree.number,))
    else:
        unit.connection.execute(_DELETE, (tree.number, to_raw_id(checkpoint_id)))
    return unit.connection.changes()


def _add(unit: Unit, record: Record, checkpoint: Checkpoint, state_number: int | None) -> None:
    row = to_checkpoint_row(unit.sealer, record.uid, checkpoint, state_number)
    unit.connection.execute(ADD_CHECKPOINT, (*row, record.number))


def _find_row(connection: Connection, number: int, checkpoint_id: str) -> Row | None:
    row: Row | None = connection.execute(_FIND, (number, to_raw_id(checkpoint_id))).fetchone()
    return row


def _read(row: Row, sealer: Sealer, session: Session) -> Checkpoint:
    try:
        return from_checkpoint_row(sealer, to_id_bytes(session.uid), row)
    except SnapshotUnreadable as error:
        raise SnapshotUnreadable(session_id=session.key.session_id) from error


def _readable(rows: apsw.Cursor, sealer: Sealer, session: Session) -> Iterator[Checkpoint]:
    """Yield the checkpoints in ``rows``; a broken one is left out, so that its neighbours stay listed."""
    for row in rows:
        try:
            yield _read(row, sealer, session)
        except SnapshotUnreadable:
            _log.error("a checkpoint of session %r is unreadable and left out", session.key.session_id)


def _position(cursor: str) -> tuple[int, bytes]:
    time_ms, tie = from_cursor("c", cursor)
    return time_ms, to_raw_id(tie) or b""
