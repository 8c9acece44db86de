"""Checkpoints in PostgreSQL. Naming a place writes one row, two if its state is not kept yet."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from app.domain.checkpoint import AutoCheckpoint, Checkpoint, CheckpointPage
from app.domain.errors import CheckpointNotFound, SnapshotUnreadable
from app.domain.ids import from_id_bytes, to_id_bytes
from app.domain.session import Session
from app.domain.turn import Turn
from app.stores import rules
from app.stores.cursor import from_cursor, to_cursor
from app.stores.postgres import records
from app.stores.postgres.rows import LATEST_MS, Record, marks, to_raw_id
from app.stores.postgres.tree import find_tree, get_record
from app.stores.postgres.unit import Unit, View
from app.stores.sealing import Sealer
from app.stores.side_rows import CHECKPOINT_COLUMNS, Row, from_checkpoint_row, to_checkpoint_row

ADD = f"INSERT INTO checkpoints (session, {CHECKPOINT_COLUMNS}) VALUES ({marks('x,' + CHECKPOINT_COLUMNS)})"
_FIND = f"SELECT {CHECKPOINT_COLUMNS} FROM checkpoints WHERE session = $1 AND checkpoint_id = $2"
LIST = (
    f"SELECT {CHECKPOINT_COLUMNS} FROM checkpoints WHERE session = $1"
    " AND (created_at, checkpoint_id) < ($2, $3) ORDER BY created_at DESC, checkpoint_id DESC LIMIT $4"
)
_COUNT = "SELECT count(*) FROM checkpoints WHERE session = $1"
_COUNT_NAMED = "SELECT count(*) FROM checkpoints WHERE session = $1 AND NOT automatic"
_TRIM = (
    "DELETE FROM checkpoints WHERE session = $1 AND checkpoint_id IN (SELECT checkpoint_id FROM checkpoints"
    " WHERE session = $1 AND automatic ORDER BY created_at DESC, checkpoint_id DESC OFFSET $2)"
)
_DELETE = "DELETE FROM checkpoints WHERE session = $1 AND checkpoint_id = $2 RETURNING 1"
_DELETE_ALL = "DELETE FROM checkpoints WHERE session = $1 RETURNING 1"
_END = LATEST_MS, b"\xff" * 17

_log = logging.getLogger(__name__)


async def add_checkpoint(unit: Unit, session: Session, checkpoint: Checkpoint) -> Checkpoint:
    record = await get_record(unit, session, lock=True)
    known = await _find_row(unit, record.number, checkpoint.checkpoint_id)
    if known is not None:
        return _read(unit.sealer, known, session)
    rules.check_named(await unit.connection.fetchval(_COUNT_NAMED, record.number))
    named = replace(checkpoint, turn_id=record.session.head)
    state_number, last = await records.keep_state(unit, record)
    await add(unit, record, named, state_number)
    if state_number != record.state_number:
        await records.save(unit, record, record.session, state_number=state_number, last_state=last)
    return named


async def add_automatic(
    unit: Unit, record: Record, wanted: AutoCheckpoint, turn: Turn, state_number: int | None
) -> None:
    """Name the turn that is being committed, and forget the oldest of such names beyond ``wanted.keep``."""
    await add(unit, record, rules.automatic_checkpoint(wanted, turn), state_number)
    await unit.connection.execute(_TRIM, record.number, wanted.keep)


async def add(view: View, record: Record, checkpoint: Checkpoint, state_number: int | None) -> None:
    checkpoint_id, turn_id, state, automatic, created_at, body = to_checkpoint_row(
        view.sealer, record.uid, checkpoint, state_number
    )
    await view.connection.execute(
        ADD, record.number, checkpoint_id, turn_id, state, bool(automatic), created_at, body
    )


async def list_checkpoints(view: View, session: Session, limit: int, cursor: str | None) -> CheckpointPage:
    start = _END if cursor is None else _position(cursor)
    tree = await find_tree(view, session)
    if tree is None:
        return CheckpointPage((), 0, None)
    rows: list[Any] = await view.connection.fetch(LIST, tree.number, *start, limit + 1)
    page = rows[:limit]
    following = to_cursor("c", page[-1][4], from_id_bytes(page[-1][0])) if len(rows) > limit else None
    total: int = await view.connection.fetchval(_COUNT, tree.number)
    return CheckpointPage(tuple(_readable(view.sealer, page, session)), total, following)


async def get_checkpoint(view: View, session: Session, checkpoint_id: str) -> Checkpoint:
    tree = await find_tree(view, session)
    row = tree and await _find_row(view, tree.number, checkpoint_id)
    if not row:
        raise CheckpointNotFound(session_id=session.key.session_id)
    return _read(view.sealer, row, session)


async def get_target(view: View, record: Record, checkpoint_id: str) -> tuple[Checkpoint, int | None]:
    """Return a checkpoint and the number under which its state is kept.

    Raises:
        CheckpointNotFound, SnapshotUnreadable
    """
    row = await _find_row(view, record.number, checkpoint_id)
    if row is None:
        raise CheckpointNotFound(session_id=record.session.key.session_id)
    return _read(view.sealer, row, record.session), row[2]


async def delete_checkpoints(unit: Unit, session: Session, checkpoint_id: str | None) -> int:
    tree = await find_tree(unit, session)
    if tree is None:
        return 0
    if checkpoint_id is None:
        return len(await unit.connection.fetch(_DELETE_ALL, tree.number))
    return len(await unit.connection.fetch(_DELETE, tree.number, to_raw_id(checkpoint_id)))


async def _find_row(view: View, number: int, checkpoint_id: str) -> Row | None:
    row: Row | None = await view.connection.fetchrow(_FIND, number, to_raw_id(checkpoint_id))
    return row


def _read(sealer: Sealer, row: Row, session: Session) -> Checkpoint:
    try:
        return from_checkpoint_row(sealer, to_id_bytes(session.uid), row)
    except SnapshotUnreadable as error:
        raise SnapshotUnreadable(session_id=session.key.session_id) from error


def _readable(sealer: Sealer, rows: Iterable[Row], session: Session) -> Iterator[Checkpoint]:
    """Yield the checkpoints in ``rows``; a broken one is left out, so that its neighbours stay listed."""
    for row in rows:
        try:
            yield _read(sealer, row, session)
        except SnapshotUnreadable:
            _log.error("a checkpoint of session %r is unreadable and left out", session.key.session_id)


def _position(cursor: str) -> tuple[int, bytes]:
    time_ms, tie = from_cursor("c", cursor)
    return time_ms, to_raw_id(tie) or b""
