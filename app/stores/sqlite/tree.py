"""A session's record and its tree of turns, as reads and writes both find them."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from app.domain.errors import SessionNotFound, SnapshotUnreadable, TurnNotFound
from app.domain.ids import SessionKey, to_id_bytes
from app.domain.session import Session
from app.domain.turn import JsonObject
from app.stores import rules
from app.stores.side_rows import Row, from_id, from_state_body
from app.stores.sqlite.connection import Connection
from app.stores.sqlite.rows import (
    SESSION_COLUMNS,
    TURN_COLUMNS,
    Record,
    from_record_row,
    is_committed,
    open_turn_row,
    whose,
)

_FIND_RECORD = f"SELECT {SESSION_COLUMNS}, phase, id FROM sessions WHERE owner = ? AND session_id = ?"
_FIND_TREE = "SELECT id, head, depth FROM sessions WHERE owner = ? AND session_id = ? AND uid = ?"
_FIND_TURN = f"SELECT {TURN_COLUMNS} FROM turns WHERE session = ? AND turn_id = ?"
_T_COLUMNS = ", ".join(f"t.{column.strip()}" for column in TURN_COLUMNS.split(","))
_WALK = (
    f"WITH RECURSIVE path AS (SELECT {TURN_COLUMNS} FROM turns WHERE session = :session AND turn_id = :start"
    f" UNION ALL SELECT {_T_COLUMNS} FROM path"
    " JOIN turns AS t ON t.session = :session AND t.turn_id = path.parent)"
    " SELECT * FROM path LIMIT :limit"
)
_WALK_IDS = (
    "WITH RECURSIVE path AS (SELECT turn_id, parent, depth FROM turns"
    " WHERE session = :session AND turn_id = :start"
    " UNION ALL SELECT t.turn_id, t.parent, t.depth FROM path"
    " JOIN turns AS t ON t.session = :session AND t.turn_id = path.parent WHERE path.depth > :least)"
    " SELECT turn_id FROM path LIMIT :limit"
)
_LIST_NOTED = "SELECT turn_id, note_id, depth FROM notes WHERE session = ? AND depth <= ? ORDER BY id"
_FIND_STATE = "SELECT body FROM states WHERE session = ? AND number = ?"


class Tree(NamedTuple):
    """Where a session's turns are, and its head and depth as stored."""

    number: int
    head: bytes | None
    depth: int


class Spot(NamedTuple):
    """A place in the tree, and the number under which its state is kept."""

    place: rules.Place
    state_number: int | None


def get_by_key(connection: Connection, key: SessionKey) -> Record:
    """Return the record.

    Raises:
        SessionNotFound, SnapshotUnreadable
    """
    record = find_by_key(connection, key)
    if record is None:
        raise SessionNotFound(session_id=key.session_id)
    return record


def find_by_key(connection: Connection, key: SessionKey) -> Record | None:
    """Return the record, of whatever incarnation."""
    row = connection.execute(_FIND_RECORD, key).fetchone()
    return None if row is None else from_record_row(connection.sealer, row)


def find_record(connection: Connection, session: Session) -> Record | None:
    """Return the record of this very incarnation."""
    row = connection.execute(_FIND_RECORD, session.key).fetchone()
    # Before it is read: a broken one of another incarnation is no concern of this.
    if row is None or row[2] != to_id_bytes(session.uid):
        return None
    return from_record_row(connection.sealer, row)


def get_record(connection: Connection, session: Session) -> Record:
    """Return the record of this very incarnation.

    Raises:
        SessionNotFound, SnapshotUnreadable
    """
    record = find_record(connection, session)
    if record is None:
        raise SessionNotFound(session_id=session.key.session_id)
    return record


def find_tree(connection: Connection, session: Session) -> Tree | None:
    row = connection.execute(_FIND_TREE, (*session.key, to_id_bytes(session.uid))).fetchone()
    return None if row is None else Tree(*row)


def get_tree(connection: Connection, session: Session) -> Tree:
    tree = find_tree(connection, session)
    if tree is None:
        raise SessionNotFound(session_id=session.key.session_id)
    return tree


def find_turn_row(connection: Connection, number: int, turn_id: str | bytes) -> Row | None:
    """Return the values of ``TURN_COLUMNS``, ``None`` if there is no such turn."""
    raw_id = to_raw_id(turn_id) if isinstance(turn_id, str) else turn_id
    return raw_id and connection.execute(_FIND_TURN, (number, raw_id)).fetchone()


def walk(connection: Connection, number: int, start: bytes, limit: int) -> list[Any]:
    """Return up to ``limit`` rows from ``start`` towards the root. The limit also ends a broken circle."""
    values = {"session": number, "start": start, "limit": limit}
    return connection.execute(_WALK, values).fetchall()


def walk_whole(
    connection: Connection, number: int, session: Session, end: bytes | None, end_depth: int
) -> list[Any]:
    """Return the rows from the head of ``session`` to below ``end``, a turn or the root.

    Raises:
        SnapshotUnreadable: there is a gap, a circle or a turn that was never committed.
    """
    head, count = session.head and to_id_bytes(session.head), session.depth - end_depth
    rows = walk(connection, number, head, count) if head and count > 0 else []
    is_whole = (
        len(rows) == count
        and (rows[-1][1] if rows else head) == end
        and all(row[2] == session.depth - position for position, row in enumerate(rows))
        and all(row[3] in range(4) and is_committed(row[3], row[4]) for row in rows)
    )
    if not is_whole:
        raise SnapshotUnreadable(session_id=session.key.session_id)
    return rows


def branch_ids(connection: Connection, tree: Tree, rows: Iterable[Row]) -> set[bytes]:
    """Return the ids of the current branch, from the head as far up as ``rows`` reach."""
    depths = [row[2] for row in rows if isinstance(row[2], int)]
    return set(walk_ids(connection, tree, min(depths))) if depths else set()


def walk_ids(connection: Connection, tree: Tree, least: int) -> Iterator[bytes]:
    """Return the ids from the tree's head up to the depth ``least``, as far as they are taken."""
    # The limit ends a broken circle.
    values = {"session": tree.number, "start": tree.head, "least": least, "limit": tree.depth + 1}
    for (turn_id,) in connection.execute(_WALK_IDS, values):
        yield turn_id


def find_noted(connection: Connection, tree: Tree) -> bytes | None:
    """Return the id of the newest note on the path to the tree's head; without notes that costs nothing."""
    noted: list[Any] = connection.execute(_LIST_NOTED, (tree.number, tree.depth)).fetchall()
    if not noted:
        return None
    newest = {turn_id: note_id for turn_id, note_id, _ in noted}  # of two on a turn the later one
    ids = walk_ids(connection, tree, min(depth for _, _, depth in noted))
    return next((newest[turn_id] for turn_id in ids if turn_id in newest), None)


def get_state(connection: Connection, record: Record, number: int | None) -> JsonObject:
    """Return the state that is kept under ``number``.

    Raises:
        SnapshotUnreadable: it is broken, or missing.
    """
    if not number:
        return {}
    try:
        body = connection.execute(_FIND_STATE, (record.number, number)).get
        return from_state_body(connection.sealer, record.uid, number, body)
    except SnapshotUnreadable as error:
        raise SnapshotUnreadable(session_id=record.session.key.session_id) from error


def spot_at(connection: Connection, record: Record, turn_id: str | None) -> Spot:
    """Return the place right after a committed turn, or before the first.

    Raises:
        TurnNotFound: there is no such turn, or it was never committed.
        SnapshotUnreadable: it is broken.
    """
    if turn_id is None:
        root = record.root_state
        return Spot(rules.Place(None, 0, None, get_state(connection, record, root)), root)
    session_id = record.session.key.session_id
    row = find_turn_row(connection, record.number, turn_id)
    if row is None:
        raise TurnNotFound(session_id=session_id, turn_id=turn_id)
    open_turn_row(row, whose(connection, record.session))
    if not is_committed(row[3], row[4]):
        raise TurnNotFound(session_id=session_id, turn_id=turn_id)
    note = from_id(find_noted(connection, Tree(record.number, row[0], row[2])))
    place = rules.Place(turn_id, row[2], note, get_state(connection, record, row[11]))
    return Spot(place, row[11])


def to_raw_id(text: str) -> bytes | None:
    try:
        return to_id_bytes(text)
    except ValueError:
        return None
