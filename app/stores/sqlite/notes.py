"""Compaction notes in SQLite: a summary hangs on a turn and is found by walking up to it."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from app.domain.compaction import Note
from app.domain.errors import SnapshotUnreadable
from app.domain.ids import to_id_bytes
from app.domain.journal import Compacted
from app.domain.session import Session
from app.domain.turn import Usage
from app.stores import rules
from app.stores.side_rows import NOTE_COLUMNS, from_id, from_note_row, to_id, to_note_row
from app.stores.sqlite import journal, records
from app.stores.sqlite.connection import Connection
from app.stores.sqlite.records import marks
from app.stores.sqlite.rows import Record
from app.stores.sqlite.tree import Tree, find_noted, find_tree, get_record, spot_at
from app.stores.sqlite.unit import Unit

_ADD = f"INSERT INTO notes ({NOTE_COLUMNS}, session) VALUES ({marks(NOTE_COLUMNS)}, ?)"
_FIND = f"SELECT {NOTE_COLUMNS} FROM notes WHERE session = ? AND note_id = ?"
_LIST = f"SELECT {NOTE_COLUMNS} FROM notes WHERE session = ? ORDER BY id"


class Noted(NamedTuple):
    """A note, the depth of its turn, and how many bytes it takes."""

    note: Note
    depth: int
    stored_bytes: int


def add_note(unit: Unit, session: Session, note: Note, usage: Usage) -> Session:
    connection = unit.connection
    record = get_record(connection, session)
    now = rules.fact_time(record.session, note.created_at)
    depth = spot_at(connection, record, note.turn_id).place.depth
    if connection.execute(_FIND, (record.number, to_id_bytes(note.note_id))).fetchone():
        return record.session
    connection.execute(_ADD, (*to_note_row(unit.sealer, record.uid, note, depth), record.number))
    records.add_usage(unit, record.number, now // rules.MS_PER_DAY, 0, usage)
    newest = from_id(find_noted(connection, _tree_of(record.session, record.number)))
    noted = replace(record.session, note=newest, updated_at=now)
    records.save(unit, record, noted, now, state_number=record.state_number)
    journal.log(unit, record, Compacted(note.note_id, note.turn_id), now)
    return noted


def get_note(connection: Connection, session: Session) -> Note | None:
    tree = find_tree(connection, session)
    note_id = from_id(tree and find_noted(connection, _tree_of(session, tree.number)))
    return read_note(connection, tree.number, session, note_id).note if tree and note_id else None


def read_note(connection: Connection, number: int, session: Session, note_id: str) -> Noted:
    """Return a note of the session with this number.

    Raises:
        SnapshotUnreadable: it is broken, or missing.
    """
    row: Any = connection.execute(_FIND, (number, to_id_bytes(note_id))).fetchone()
    try:
        note = from_note_row(connection.sealer, to_id_bytes(session.uid), row)
    except SnapshotUnreadable as error:
        raise SnapshotUnreadable(session_id=session.key.session_id) from error
    return Noted(note, row[2], len(row[6]))


def notes_on(connection: Connection, record: Record, turn_ids: Iterable[bytes]) -> Iterator[Noted]:
    """Yield the notes that hang on these turns, the oldest first.

    Raises:
        SnapshotUnreadable: one is broken.
    """
    wanted = set(turn_ids)
    rows: list[Any] = connection.execute(_LIST, (record.number,)).fetchall()
    for row in rows:
        if row[1] in wanted:
            yield read_note(connection, record.number, record.session, str(from_id(row[0])))


def list_notes(connection: Connection, session: Session) -> tuple[Note, ...]:
    tree = find_tree(connection, session)
    rows: list[Any] = connection.execute(_LIST, (tree.number,)).fetchall() if tree else []
    noted = (read_note(connection, tree.number, session, str(from_id(row[0]))) for row in rows if tree)
    return tuple(one.note for one in noted)


def copy_notes(unit: Unit, number: int, uid: bytes, notes: Iterable[Noted]) -> None:
    """Give these notes to another session, too."""
    rows = [(*to_note_row(unit.sealer, uid, noted.note, noted.depth), number) for noted in notes]
    unit.connection.executemany(_ADD, rows)


def _tree_of(session: Session, number: int) -> Tree:
    return Tree(number, to_id(session.head), session.depth)
