"""The reads: each runs in one read transaction, so that it sees one moment."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from app.domain.errors import SnapshotUnreadable, TurnNotFound
from app.domain.ids import SessionKey, to_id_bytes
from app.domain.session import LifeSpan, Path, Session, SessionPage, SessionQuery, SessionStatus
from app.domain.stats import DayUsage, UserUsage
from app.domain.turn import BoundTurn, Turn, TurnPage
from app.stores import rules
from app.stores.cursor import from_cursor, to_cursor
from app.stores.sqlite import keys, notes, search
from app.stores.sqlite.connection import Connection
from app.stores.sqlite.rows import (
    SESSION_COLUMNS,
    TURN_COLUMNS,
    Names,
    Whose,
    from_session_row,
    from_turn_row,
    messages_of_row,
    open_turn_row,
    show_turn,
    whose,
)
from app.stores.sqlite.tree import (
    Tree,
    branch_ids,
    find_tree,
    find_turn_row,
    get_tree,
    to_raw_id,
    walk,
    walk_whole,
)

_FIND_SESSION = f"SELECT {SESSION_COLUMNS} FROM sessions WHERE owner = ? AND session_id = ?"
_GET_SESSION = f"SELECT {SESSION_COLUMNS}, id FROM sessions WHERE id = ?"
_LIST_OLDEST = (
    f"SELECT {SESSION_COLUMNS}, id FROM sessions WHERE user_id = ? AND +owner = ?"
    " ORDER BY last_accessed, id LIMIT ?"
)
_FIND_TREE_OF = "SELECT id, head, depth, uid, session_id FROM sessions WHERE id = ?"
_COUNT_TURNS = "SELECT count(*) FROM turns WHERE session = ?"
_LIST_TURNS = (
    f"SELECT {TURN_COLUMNS} FROM turns WHERE session = :session"
    " AND (started_at, turn_id) < (:time, :turn_id) ORDER BY started_at DESC, turn_id DESC LIMIT :limit"
)
_KEPT_TOTAL = "SELECT count FROM session_counts WHERE owner = ? AND kind = ? AND name = ?"
_LIST_USAGE = (
    "SELECT day, turns, prompt_tokens, completion_tokens FROM usage_days"
    " WHERE owner = ? AND user_id = ? AND day >= 0 ORDER BY day DESC LIMIT ?"
)
_TOTAL_USAGE = (
    "SELECT turns, prompt_tokens, completion_tokens FROM usage_days"
    " WHERE owner = ? AND user_id = ? AND day = -1"
)

_ALIVE = "NOT archived AND (expires_at IS NULL OR expires_at > :now)"
_IDLE = "(marked_idle OR last_accessed <= :idle_line)"
_STATUS_TERMS = {
    SessionStatus.ARCHIVED: "archived",
    SessionStatus.EXPIRED: "NOT archived AND expires_at <= :now",
    SessionStatus.IDLE: f"{_ALIVE} AND {_IDLE}",
    SessionStatus.ACTIVE: f"{_ALIVE} AND NOT {_IDLE}",
}
_EVER = 2**62
_NO_ID = bytes(16)

_log = logging.getLogger(__name__)


def find_session(connection: Connection, key: SessionKey) -> Session | None:
    row = connection.execute(_FIND_SESSION, key).fetchone()
    return None if row is None else from_session_row(connection.sealer, row)


def list_sessions(connection: Connection, query: SessionQuery, life: LifeSpan) -> SessionPage:
    time_ms, number = _session_position(query.cursor)
    idle_line = rules.idle_line(query.now, life)
    values = {
        "owner": query.owner,
        "user_id": query.user_id,
        "agent_id": query.agent_id,
        "window_id": query.window_id,
        "now": query.now,
        "idle_line": -_EVER if idle_line is None else idle_line,
        "text": query.text,
        "folded": query.text and query.text.casefold(),
        "time": time_ms,
        "number": number,
        "limit": query.limit + 1,
        "most": rules.TOTAL_LIMIT + 1,
    }
    if query.text is not None and connection.sealer.encrypts:
        return _search(connection, query, query.text, values)
    terms = _terms_of(query)
    rows: list[Any] = connection.execute(
        f"SELECT {SESSION_COLUMNS}, id FROM sessions"
        f" WHERE {' AND '.join([*terms, '(last_accessed, id) < (:time, :number)'])}"
        " ORDER BY last_accessed DESC, id DESC LIMIT :limit",
        values,
    ).fetchall()
    page = rows[: query.limit]
    cursor = to_cursor("s", page[-1][19], str(page[-1][-1])) if len(rows) > len(page) else None
    return SessionPage(tuple(_readable(connection, page)), _total(connection, query, terms, values), cursor)


def _search(connection: Connection, query: SessionQuery, text: str, values: dict[str, Any]) -> SessionPage:
    where = " AND ".join(_terms_of(replace(query, text=None)))
    hits = search.search(connection, where, values, text, query.limit)
    rows = [connection.execute(_GET_SESSION, (number,)).fetchone() for _, number in hits.positions]
    following = hits.following and to_cursor("s", hits.following[0], str(hits.following[1]))
    total = search.count(connection, where, values, text)
    return SessionPage(tuple(_readable(connection, rows)), total, following)


def list_oldest(connection: Connection, owner: str, user_id: str, limit: int) -> tuple[Session, ...]:
    rows: list[Any] = connection.execute(_LIST_OLDEST, (user_id, owner, limit)).fetchall()
    return tuple(_readable(connection, rows))


def list_keys(
    connection: Connection, owner: str | None, user_id: str | None, agent_id: str | None, limit: int
) -> tuple[SessionKey, ...]:
    query = SessionQuery(owner=owner, now=0, user_id=user_id, agent_id=agent_id)
    # No order is asked for, so the agent's own index may be chosen, as in counting.
    where = " AND ".join(_terms_of(query)).replace("+agent_id", "agent_id")
    rows = connection.execute(
        f"SELECT owner, session_id FROM sessions WHERE {where} LIMIT :limit",
        {"owner": owner, "user_id": user_id, "agent_id": agent_id, "limit": limit},
    )
    return tuple(SessionKey(*row) for row in rows)


def load_path(connection: Connection, session: Session) -> Path:
    number, of_session = get_tree(connection, session).number, whose(connection, session)
    noted = session.note and notes.read_note(connection, number, session, session.note)
    if not noted:
        rows = walk_whole(connection, number, session, None, 0)
    else:
        rows = walk_whole(connection, number, session, to_id_bytes(noted.note.turn_id), noted.depth)
    rows.reverse()
    messages = tuple([message for row in rows for message in messages_of_row(row, of_session)])
    stored_bytes = sum(len(row[12]) for row in rows)
    if not noted:
        return Path(session.head, None, messages, stored_bytes)
    return Path(session.head, session.note, messages, stored_bytes + noted.stored_bytes, noted.note.summary)


def find_bound(connection: Connection, names: Names, owner: str, key: str) -> BoundTurn | None:
    """Return the committed turn that the key is bound to.

    Raises:
        SnapshotUnreadable: the key's row or the turn's is broken.
    """
    bound = keys.find(connection, owner, key)
    found = bound and connection.execute(_FIND_TREE_OF, (bound.session,)).fetchone()
    row = bound and find_turn_row(connection, bound.session, bound.turn_id)
    if not bound or not found or not row:
        return None
    on_branch = row[0] in branch_ids(connection, Tree(*found[:3]), [row])
    turn = from_turn_row(row, connection, names, Whose(connection.sealer, *found[3:]), on_branch=on_branch)
    return BoundTurn(found[4], bound.fingerprint, turn) if turn.is_committed else None


def get_turn(connection: Connection, names: Names, session: Session, turn_id: str) -> Turn:
    tree = find_tree(connection, session)
    row = tree and find_turn_row(connection, tree.number, turn_id)
    if not row or not tree:
        raise TurnNotFound(session_id=session.key.session_id, turn_id=turn_id)
    on_branch = row[0] in branch_ids(connection, tree, [row])
    return from_turn_row(row, connection, names, whose(connection, session), on_branch=on_branch)


def list_turns(
    connection: Connection, names: Names, session: Session, limit: int, cursor: str | None
) -> TurnPage:
    time_ms, last_id = _turn_position(cursor)
    tree = find_tree(connection, session)
    if tree is None:
        return TurnPage((), 0, None)
    values = {"session": tree.number, "time": time_ms, "turn_id": last_id, "limit": limit + 1}
    rows = connection.execute(_LIST_TURNS, values).fetchall()
    page = rows[:limit]
    branch, of_session = branch_ids(connection, tree, page), whose(connection, session)
    turns = [show_turn(row, connection, names, of_session, on_branch=row[0] in branch) for row in page]
    shown = tuple(turn for turn in turns if turn is not None)
    # The last entry, unless its row is too broken to say where it stands.
    places = [(turn.started_at, turn.turn_id) for turn in shown if turn.started_at]
    following = to_cursor("t", *places[-1]) if places and len(rows) > len(page) else None
    return TurnPage(shown, connection.execute(_COUNT_TURNS, (tree.number,)).get, following)


def list_branch(
    connection: Connection, names: Names, session: Session, limit: int, before: str | None
) -> tuple[Turn, ...]:
    of_session = whose(connection, session)
    tree = find_tree(connection, session)
    start = tree.head if tree else None
    if before is not None:
        start = _parent_on_branch(connection, tree, session, before)
    if tree is None or start is None:
        return ()
    rows = walk(connection, tree.number, start, limit)
    if len(rows) < limit and (not rows or rows[-1][1] is not None):
        raise SnapshotUnreadable(session_id=of_session.session_id)
    return tuple(from_turn_row(row, connection, names, of_session, on_branch=True) for row in reversed(rows))


def get_usage(connection: Connection, owner: str, user_id: str, limit: int) -> UserUsage:
    turns, read, written = connection.execute(_TOTAL_USAGE, (owner, user_id)).fetchone() or (0, 0, 0)
    days: list[Any] = connection.execute(_LIST_USAGE, (owner, user_id, limit)).fetchall()
    return UserUsage(turns, read, written, tuple(DayUsage(*row) for row in days))


def _parent_on_branch(
    connection: Connection, tree: Tree | None, session: Session, turn_id: str
) -> bytes | None:
    row = tree and find_turn_row(connection, tree.number, turn_id)
    if not row or not tree or row[0] not in branch_ids(connection, tree, [row]):
        raise TurnNotFound(session_id=session.key.session_id, turn_id=turn_id)
    open_turn_row(row, whose(connection, session))
    parent: bytes | None = row[1]
    return parent


def _terms_of(query: SessionQuery) -> list[str]:
    terms = ["true"]
    if query.user_id is not None:
        terms.append("user_id = :user_id")
    if query.owner is not None:
        # "+": with a user given, the user's own index is the narrower one.
        terms.append("owner = :owner" if query.user_id is None else "+owner = :owner")
    if query.agent_id is not None:
        terms.append("+agent_id = :agent_id")
    if query.window_id is not None:
        terms.append("window_id = :window_id")
    if query.status is not None:
        terms.append(_STATUS_TERMS[query.status])
    if query.text is not None:
        terms.append(
            "(instr(coalesce(title_folded, title), :folded) > 0"
            " OR substr(session_id, 1, length(:text)) = :text)"
        )
    return terms


def _total(
    connection: Connection, query: SessionQuery, terms: list[str], values: dict[str, Any]
) -> int | None:
    if rules.has_exact_total(query) and query.owner is not None and None in (query.user_id, query.agent_id):
        return _kept_total(connection, query)
    # Paging sorts by time and must not choose this index; counting should.
    where = " AND ".join(terms).replace("+agent_id", "agent_id")
    if rules.has_exact_total(query):
        total: int = connection.execute(f"SELECT count(*) FROM sessions WHERE {where}", values).get
        return total
    counted: int = connection.execute(
        f"SELECT count(*) FROM (SELECT 1 FROM sessions WHERE {where} LIMIT :most)",
        values,
    ).get
    return counted if counted <= rules.TOTAL_LIMIT else None


def _kept_total(connection: Connection, query: SessionQuery) -> int:
    if query.user_id is not None:
        kind, name = "u", query.user_id
    else:
        kind, name = ("", "") if query.agent_id is None else ("a", query.agent_id)
    return connection.execute(_KEPT_TOTAL, (query.owner, kind, name)).get or 0


def _readable(connection: Connection, rows: list[Any]) -> Iterable[Session]:
    """Yield the sessions in ``rows``; a broken one is left out, so that its neighbours stay listed."""
    for row in rows:
        try:
            yield from_session_row(connection.sealer, row[:-1])
        except SnapshotUnreadable as error:
            _log.error("session %r is unreadable and left out of a listing", error.session_id)


def _session_position(cursor: str | None) -> tuple[int, int]:
    if cursor is None:
        return _EVER, _EVER
    time_ms, tie = from_cursor("s", cursor)
    return time_ms, int(tie) if tie.isascii() and tie.isdigit() and len(tie) < 19 else 0


def _turn_position(cursor: str | None) -> tuple[int, bytes]:
    if cursor is None:
        return _EVER, _NO_ID
    time_ms, tie = from_cursor("t", cursor)
    return time_ms, to_raw_id(tie) or _NO_ID
