"""A session's record and its tree of turns, as reads and writes both find them."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from app.domain.errors import SessionNotFound, SnapshotUnreadable, TurnNotFound
from app.domain.ids import SessionKey, to_id_bytes
from app.domain.session import Session
from app.domain.turn import JsonObject
from app.stores import rules
from app.stores.postgres.rows import (
    RECORD_COLUMNS,
    TURN_COLUMNS,
    Record,
    from_record_row,
    is_committed,
    open_turn_row,
    to_raw_id,
)
from app.stores.postgres.unit import View
from app.stores.side_rows import Row, from_id, from_state_body

FIND_RECORD = f"SELECT {RECORD_COLUMNS} FROM sessions WHERE owner = $1 AND session_id = $2"
LOCK_RECORD = f"{FIND_RECORD} FOR NO KEY UPDATE"
_FIND_TREE = "SELECT id, head, depth FROM sessions WHERE owner = $1 AND session_id = $2 AND uid = $3"
_FIND_TURN = f"SELECT {TURN_COLUMNS} FROM turns WHERE session = $1 AND turn_id = $2"
_T_COLUMNS = ", ".join(f"t.{column.strip()}" for column in TURN_COLUMNS.split(","))
# The number of steps, not the depth, orders the rows and ends a broken circle.
_WALK = (
    f"WITH RECURSIVE path AS (SELECT {TURN_COLUMNS}, 1 AS step FROM turns"
    f" WHERE session = $1 AND turn_id = $2 UNION ALL SELECT {_T_COLUMNS}, path.step + 1 FROM path"
    " JOIN turns AS t ON t.session = $1 AND t.turn_id = path.parent WHERE path.step < $3)"
    f" SELECT {TURN_COLUMNS} FROM path ORDER BY step"
)
_WALK_IDS = (
    "WITH RECURSIVE path AS (SELECT turn_id, parent, depth, 1 AS step FROM turns"
    " WHERE session = $1 AND turn_id = $2"
    " UNION ALL SELECT t.turn_id, t.parent, t.depth, path.step + 1 FROM path"
    " JOIN turns AS t ON t.session = $1 AND t.turn_id = path.parent"
    " WHERE path.depth > $3 AND path.step < $4)"
    " SELECT turn_id FROM path ORDER BY step"
)
_LIST_NOTED = "SELECT turn_id, note_id, depth FROM notes WHERE session = $1 AND depth <= $2 ORDER BY id"
_FIND_STATE = "SELECT body FROM states WHERE session = $1 AND number = $2"


class Tree(NamedTuple):
    """Where a session's turns are, and its head and depth as stored."""

    number: int
    head: bytes | None
    depth: int


class Spot(NamedTuple):
    """A place in the tree, and the number under which its state is kept."""

    place: rules.Place
    state_number: int | None


async def find_by_key(view: View, key: SessionKey, *, lock: bool = False) -> Record | None:
    """Return the record; with ``lock`` nobody else writes it before this transaction ends.

    Raises:
        SnapshotUnreadable
    """
    row = await _row_of(view, key, lock)
    return None if row is None else from_record_row(view.sealer, row)


async def get_by_key(view: View, key: SessionKey, *, lock: bool = False) -> Record:
    """Return the record.

    Raises:
        SessionNotFound, SnapshotUnreadable
    """
    record = await find_by_key(view, key, lock=lock)
    if record is None:
        raise SessionNotFound(session_id=key.session_id)
    return record


async def find_record(view: View, session: Session, *, lock: bool = False) -> Record | None:
    """Return the record of this very incarnation."""
    row = await _row_of(view, session.key, lock)
    # Before it is read: a broken one of another incarnation is no concern of this.
    return (
        from_record_row(view.sealer, row) if row is not None and row[2] == to_id_bytes(session.uid) else None
    )


async def get_record(view: View, session: Session, *, lock: bool = False) -> Record:
    """Return the record of this very incarnation.

    Raises:
        SessionNotFound, SnapshotUnreadable
    """
    record = await find_record(view, session, lock=lock)
    if record is None:
        raise SessionNotFound(session_id=session.key.session_id)
    return record


async def find_tree(view: View, session: Session) -> Tree | None:
    values = raw_key(session.key), to_id_bytes(session.uid)
    row = await view.connection.fetchrow(_FIND_TREE, *values[0], values[1])
    return None if row is None else Tree(*row)


async def get_tree(view: View, session: Session) -> Tree:
    tree = await find_tree(view, session)
    if tree is None:
        raise SessionNotFound(session_id=session.key.session_id)
    return tree


async def find_turn_row(view: View, number: int, turn_id: str | bytes) -> Row | None:
    """Return the values of ``TURN_COLUMNS``, ``None`` if there is no such turn."""
    raw_id = to_raw_id(turn_id) if isinstance(turn_id, str) else turn_id
    return raw_id and await view.connection.fetchrow(_FIND_TURN, number, raw_id)


async def walk(view: View, number: int, start: bytes, limit: int) -> list[Any]:
    """Return up to ``limit`` rows from ``start`` towards the root. The limit also ends a broken circle."""
    rows: list[Any] = await view.connection.fetch(_WALK, number, start, limit)
    return rows


async def walk_whole(
    view: View, number: int, session: Session, end: bytes | None, end_depth: int
) -> list[Any]:
    """Return the rows from the head of ``session`` to below ``end``, a turn or the root.

    Raises:
        SnapshotUnreadable: there is a gap, a circle or a turn that was never committed.
    """
    head, count = session.head and to_id_bytes(session.head), session.depth - end_depth
    rows = await walk(view, number, head, count) if head and count > 0 else []
    is_whole = (
        len(rows) == count
        and (rows[-1][1] if rows else head) == end
        and all(row[2] == session.depth - position for position, row in enumerate(rows))
        and all(is_committed(row[3], row[4]) for row in rows)
    )
    if not is_whole:
        raise SnapshotUnreadable(session_id=session.key.session_id)
    return rows


async def branch_ids(view: View, tree: Tree, rows: Iterable[Row]) -> set[bytes]:
    """Return the ids of the current branch, from the head as far up as ``rows`` reach."""
    depths = [row[2] for row in rows]
    return set(await walk_ids(view, tree, min(depths))) if depths else set()


async def walk_ids(view: View, tree: Tree, least: int) -> list[bytes]:
    """Return the ids from the tree's head up to the depth ``least``."""
    if tree.head is None:
        return []
    rows = await view.connection.fetch(_WALK_IDS, tree.number, tree.head, least, tree.depth + 1)
    return [row[0] for row in rows]


async def find_noted(view: View, tree: Tree) -> bytes | None:
    """Return the id of the newest note on the path to the tree's head; without notes that costs little."""
    noted: list[Any] = await view.connection.fetch(_LIST_NOTED, tree.number, tree.depth)
    if not noted:
        return None
    newest = {turn_id: note_id for turn_id, note_id, _ in noted}  # of two on a turn the later one
    ids = await walk_ids(view, tree, min(depth for _, _, depth in noted))
    return next((newest[turn_id] for turn_id in ids if turn_id in newest), None)


async def get_state(view: View, record: Record, number: int | None) -> JsonObject:
    """Return the state that is kept under ``number``.

    Raises:
        SnapshotUnreadable: it is broken, or missing.
    """
    if not number:
        return {}
    body = await view.connection.fetchval(_FIND_STATE, record.number, number)
    try:
        return from_state_body(view.sealer, record.uid, number, body)
    except SnapshotUnreadable as error:
        raise SnapshotUnreadable(session_id=record.session.key.session_id) from error


async def spot_at(view: View, record: Record, turn_id: str | None) -> Spot:
    """Return the place right after a committed turn, or before the first.

    Raises:
        TurnNotFound: there is no such turn, or it was never committed.
        SnapshotUnreadable: it is broken.
    """
    if turn_id is None:
        root = record.root_state
        return Spot(rules.Place(None, 0, None, await get_state(view, record, root)), root)
    session_id = record.session.key.session_id
    row = await find_turn_row(view, record.number, turn_id)
    if row is None:
        raise TurnNotFound(session_id=session_id, turn_id=turn_id)
    open_turn_row(view.sealer, record.uid, row, session_id)
    if not is_committed(row[3], row[4]):
        raise TurnNotFound(session_id=session_id, turn_id=turn_id)
    note = from_id(await find_noted(view, Tree(record.number, row[0], row[2])))
    place = rules.Place(turn_id, row[2], note, await get_state(view, record, row[11]))
    return Spot(place, row[11])


def raw_key(key: SessionKey) -> tuple[bytes, bytes]:
    """Return how the key is stored."""
    return key.owner.encode(), key.session_id.encode()


async def _row_of(view: View, key: SessionKey, lock: bool) -> Row | None:
    row: Row | None = await view.connection.fetchrow(LOCK_RECORD if lock else FIND_RECORD, *raw_key(key))
    return row
