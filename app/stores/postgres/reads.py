"""The reads of one session's tree. Where one makes several statements they see one moment."""

from typing import Any

from app.domain.errors import KeyTaken, SnapshotUnreadable, TurnNotFound
from app.domain.ids import to_id_bytes
from app.domain.lease import Holder, Node
from app.domain.session import Path, Session
from app.domain.turn import BoundTurn, Turn, TurnPage
from app.stores.cursor import from_cursor, to_cursor
from app.stores.postgres import notes, turns
from app.stores.postgres.rows import (
    TURN_COLUMNS,
    from_turn_row,
    messages_of_row,
    open_turn_row,
    show_turn,
    to_raw_id,
)
from app.stores.postgres.tree import (
    Tree,
    branch_ids,
    find_tree,
    find_turn_row,
    get_tree,
    walk,
    walk_whole,
)
from app.stores.postgres.unit import View

_FIND_HOLDER = (
    "SELECT boot_id, url, nonce FROM leases"
    " WHERE session_id = $1 AND owner = $2 AND turn_id = $3 AND until > clock_timestamp()"
)
_FIND_TREE_OF = "SELECT id, head, depth, session_id, owner, uid FROM sessions WHERE id = $1"
_COUNT_TURNS = "SELECT count(*) FROM turns WHERE session = $1"
LIST_TURNS = (
    f"SELECT {TURN_COLUMNS} FROM turns WHERE session = $1 AND (started_at, turn_id) < ($2, $3)"
    " ORDER BY started_at DESC, turn_id DESC LIMIT $4"
)
_FIND_KEY = (
    "SELECT session, turn_id, fingerprint, created_at, seal FROM idempotency_keys"
    " WHERE owner = $1 AND key = $2"
)
EVER = 2**62
_NO_ID = bytes(16)


async def load_path(view: View, session: Session) -> Path:
    session_id, uid = session.key.session_id, to_id_bytes(session.uid)
    number = (await get_tree(view, session)).number
    noted = await notes.read_note(view, number, session, session.note) if session.note else None
    if noted is None:
        rows = await walk_whole(view, number, session, None, 0)
    else:
        rows = await walk_whole(view, number, session, to_id_bytes(noted.note.turn_id), noted.depth)
    rows.reverse()
    messages = tuple(
        [message for row in rows for message in messages_of_row(view.sealer, uid, row, session_id)]
    )
    stored_bytes = sum(len(row[12]) for row in rows)
    if noted is None:
        return Path(session.head, None, messages, stored_bytes)
    return Path(session.head, session.note, messages, stored_bytes + noted.stored_bytes, noted.note.summary)


async def find_bound(view: View, owner: str, key: str) -> BoundTurn | None:
    """Return the committed turn that the key is bound to.

    Raises:
        KeyTaken: a turn that runs has it.
        SnapshotUnreadable: the key's row or the turn's is broken.
    """
    bound: Any = await view.connection.fetchrow(_FIND_KEY, owner.encode(), key.encode())
    if bound is None:
        return None
    number, turn_id, *_ = bound
    fingerprint = turns.from_key_row(view.sealer, owner, key, bound).fingerprint
    found: Any = await view.connection.fetchrow(_FIND_TREE_OF, number)
    row = await find_turn_row(view, number, turn_id)
    if not found or not row:
        return None
    session_id = found[3].decode()
    on_branch = row[0] in await branch_ids(view, Tree(*found[:3]), [row])
    turn = from_turn_row(view.sealer, found[5], row, session_id, on_branch=on_branch)
    if turn.is_committed:
        return BoundTurn(session_id, fingerprint, turn)
    holder: Any = await view.connection.fetchrow(_FIND_HOLDER, *found[3:5], turn_id)
    if holder is not None:
        raise KeyTaken(Holder(Node(*holder[:2]), holder[2], is_turn=True), turn_id=turn.turn_id)
    return None


async def get_turn(view: View, session: Session, turn_id: str) -> Turn:
    tree = await find_tree(view, session)
    row = tree and await find_turn_row(view, tree.number, turn_id)
    if not row or not tree:
        raise TurnNotFound(session_id=session.key.session_id, turn_id=turn_id)
    on_branch = row[0] in await branch_ids(view, tree, [row])
    uid = to_id_bytes(session.uid)
    return from_turn_row(view.sealer, uid, row, session.key.session_id, on_branch=on_branch)


async def list_turns(view: View, session: Session, limit: int, cursor: str | None) -> TurnPage:
    time_ms, last_id = _turn_position(cursor)
    tree = await find_tree(view, session)
    if tree is None:
        return TurnPage((), 0, None)
    rows: list[Any] = await view.connection.fetch(LIST_TURNS, tree.number, time_ms, last_id, limit + 1)
    page = rows[:limit]
    branch, session_id = await branch_ids(view, tree, page), session.key.session_id
    uid = to_id_bytes(session.uid)
    listed = [show_turn(view.sealer, uid, row, session_id, on_branch=row[0] in branch) for row in page]
    shown = tuple(turn for turn in listed if turn is not None)
    # The last entry, unless its row is too broken to say where it stands.
    places = [(turn.started_at, turn.turn_id) for turn in shown if turn.started_at]
    following = to_cursor("t", *places[-1]) if places and len(rows) > len(page) else None
    return TurnPage(shown, await view.connection.fetchval(_COUNT_TURNS, tree.number), following)


async def list_branch(view: View, session: Session, limit: int, before: str | None) -> tuple[Turn, ...]:
    session_id = session.key.session_id
    tree = await find_tree(view, session)
    start = tree.head if tree else None
    if before is not None:
        start = await _parent_on_branch(view, tree, session, before)
    if tree is None or start is None:
        return ()
    rows = await walk(view, tree.number, start, limit)
    if len(rows) < limit and (not rows or rows[-1][1] is not None):
        raise SnapshotUnreadable(session_id=session_id)
    uid = to_id_bytes(session.uid)
    return tuple(from_turn_row(view.sealer, uid, row, session_id, on_branch=True) for row in reversed(rows))


async def _parent_on_branch(view: View, tree: Tree | None, session: Session, turn_id: str) -> bytes | None:
    row = tree and await find_turn_row(view, tree.number, turn_id)
    if not row or not tree or row[0] not in await branch_ids(view, tree, [row]):
        raise TurnNotFound(session_id=session.key.session_id, turn_id=turn_id)
    open_turn_row(view.sealer, to_id_bytes(session.uid), row, session.key.session_id)
    parent: bytes | None = row[1]
    return parent


def _turn_position(cursor: str | None) -> tuple[int, bytes]:
    if cursor is None:
        return EVER, _NO_ID
    time_ms, tie = from_cursor("t", cursor)
    return time_ms, to_raw_id(tie) or _NO_ID
