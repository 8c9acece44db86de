"""Compaction notes in PostgreSQL: a summary hangs on a turn and is found by walking up to it."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from app.domain.compaction import Note
from app.domain.errors import SessionNotFound, SnapshotUnreadable
from app.domain.ids import to_id_bytes
from app.domain.journal import Compacted
from app.domain.session import Session
from app.domain.turn import Usage
from app.stores import rules
from app.stores.postgres import journal, records
from app.stores.postgres.rows import Record, marks
from app.stores.postgres.tree import Tree, find_noted, find_tree, get_record, spot_at
from app.stores.postgres.unit import Unit, View
from app.stores.sealing import Sealer
from app.stores.side_rows import NOTE_COLUMNS, from_id, from_note_row, to_id, to_note_row

ADD = f"INSERT INTO notes (session, {NOTE_COLUMNS}) VALUES ({marks('x,' + NOTE_COLUMNS)})"
_FIND = f"SELECT {NOTE_COLUMNS} FROM notes WHERE session = $1 AND note_id = $2"
_LIST = f"SELECT {NOTE_COLUMNS} FROM notes WHERE session = $1 ORDER BY id"


class Noted(NamedTuple):
    """A note, the depth of its turn, and how many bytes it takes."""

    note: Note
    depth: int
    stored_bytes: int


async def add_note(unit: Unit, session: Session, note: Note, usage: Usage) -> Session:
    record = await get_record(unit, session, lock=True)
    now = rules.fact_time(record.session, note.created_at)
    depth = (await spot_at(unit, record, note.turn_id)).place.depth
    if await unit.connection.fetchrow(_FIND, record.number, to_id_bytes(note.note_id)):
        return record.session
    await unit.connection.execute(ADD, record.number, *to_note_row(unit.sealer, record.uid, note, depth))
    newest = from_id(await find_noted(unit, _tree_of(record.session, record.number)))
    noted = replace(record.session, note=newest, updated_at=now)
    await journal.log(unit, record, Compacted(note.note_id, note.turn_id), now)
    await records.save(unit, record, noted, state_number=record.state_number)
    await records.add_usage(unit, record.session, now // rules.MS_PER_DAY, 0, usage)
    return noted


async def get_note(view: View, session: Session) -> Note | None:
    tree = await find_tree(view, session)
    note_id = tree and from_id(await find_noted(view, _tree_of(session, tree.number)))
    return (await read_note(view, tree.number, session, note_id)).note if tree and note_id else None


async def read_note(view: View, number: int, session: Session, note_id: str) -> Noted:
    """Return a note of the session with this number.

    Raises:
        SnapshotUnreadable: it is broken, or missing.
    """
    row = await view.connection.fetchrow(_FIND, number, to_id_bytes(note_id))
    return _read(view.sealer, row, session)


async def list_notes(view: View, record: Record, turn_ids: Iterable[bytes] | None = None) -> list[Noted]:
    """Return the session's notes, the oldest first; with ``turn_ids`` only those that hang on these turns.

    Raises:
        SnapshotUnreadable: one is broken.
    """
    wanted = None if turn_ids is None else set(turn_ids)
    rows: list[Any] = await view.connection.fetch(_LIST, record.number)
    found = [row for row in rows if wanted is None or row[1] in wanted]
    return [_read(view.sealer, row, record.session) for row in found]


async def list_all(view: View, session: Session) -> tuple[Note, ...]:
    try:
        record = await get_record(view, session)
    except SessionNotFound:
        return ()
    return tuple(one.note for one in await list_notes(view, record))


async def copy_notes(unit: Unit, record: Record, notes: Iterable[Noted]) -> None:
    """Give these notes to another session, too."""
    rows = [
        (record.number, *to_note_row(unit.sealer, record.uid, noted.note, noted.depth)) for noted in notes
    ]
    await unit.connection.executemany(ADD, rows)


def _read(sealer: Sealer, row: Any, session: Session) -> Noted:
    try:
        note = from_note_row(sealer, to_id_bytes(session.uid), row)
    except SnapshotUnreadable as error:
        raise SnapshotUnreadable(session_id=session.key.session_id) from error
    return Noted(note, row[2], len(row[6]))


def _tree_of(session: Session, number: int) -> Tree:
    return Tree(number, to_id(session.head), session.depth)
