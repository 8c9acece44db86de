"""The reads: each runs in one read transaction, so that it sees one moment."""

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

import apsw

from app.domain.errors import SessionNotFound, SnapshotUnreadable, TurnNotFound
from app.domain.ids import SessionKey, to_id_bytes
from app.domain.session import LifeSpan, Path, Session, SessionPage, SessionQuery, SessionStatus
from app.domain.stats import DayUsage, UserUsage
from app.domain.turn import BoundTurn, Turn, TurnPage
from app.stores import rules, sqlite_keys
from app.stores.cursor import from_cursor, to_cursor
from app.stores.sqlite_rows import (
    SESSION_COLUMNS,
    TURN_COLUMNS,
    Names,
    Row,
    from_session_row,
    from_turn_row,
    is_committed,
    messages_of_row,
    unreadable_turn,
)

_FIND_SESSION = f"SELECT {SESSION_COLUMNS} FROM sessions WHERE owner = ? AND session_id = ?"  # noqa: S608
_LIST_OLDEST = (
    f"SELECT {SESSION_COLUMNS}, id FROM sessions WHERE user_id = ? AND +owner = ?"  # noqa: S608
    " ORDER BY last_accessed, id LIMIT ?"
)
_FIND_PLACE = "SELECT id, head, depth FROM sessions WHERE owner = ? AND session_id = ? AND uid = ?"
_FIND_PLACE_OF = "SELECT id, head, depth, session_id FROM sessions WHERE id = ?"
_FIND_TURN = f"SELECT {TURN_COLUMNS} FROM turns WHERE session = ? AND turn_id = ?"  # noqa: S608
_COUNT_TURNS = "SELECT count(*) FROM turns WHERE session = ?"
_LIST_TURNS = (
    f"SELECT {TURN_COLUMNS} FROM turns WHERE session = :session"  # noqa: S608
    " AND (started_at, turn_id) < (:time, :turn_id) ORDER BY started_at DESC, turn_id DESC LIMIT :limit"
)
_T_COLUMNS = ", ".join(f"t.{column.strip()}" for column in TURN_COLUMNS.split(","))
_WALK = (
    f"WITH RECURSIVE path AS (SELECT {TURN_COLUMNS} FROM turns WHERE session = :session AND turn_id = :start"  # noqa: S608
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

_SUM_USAGE = (
    "SELECT coalesce(sum(turns), 0), coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0)"
    " FROM usage_days WHERE owner = ? AND user_id = ?"
)
_LIST_USAGE = (
    "SELECT day, turns, prompt_tokens, completion_tokens FROM usage_days"
    " WHERE owner = ? AND user_id = ? ORDER BY day DESC LIMIT ?"
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


class _Place(NamedTuple):
    """Where a session's turns are, and its head and depth as stored."""

    number: int
    head: bytes | None
    depth: int


def find_session(connection: apsw.Connection, key: SessionKey) -> Session | None:
    row = connection.execute(_FIND_SESSION, key).fetchone()
    return None if row is None else from_session_row(row)


def list_sessions(connection: apsw.Connection, query: SessionQuery, life: LifeSpan) -> SessionPage:
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
    terms = _terms_of(query)
    rows: list[Any] = connection.execute(
        f"SELECT {SESSION_COLUMNS}, id FROM sessions"  # noqa: S608
        f" WHERE {' AND '.join([*terms, '(last_accessed, id) < (:time, :number)'])}"
        " ORDER BY last_accessed DESC, id DESC LIMIT :limit",
        values,
    ).fetchall()
    page = rows[: query.limit]
    cursor = to_cursor("s", page[-1][19], str(page[-1][26])) if len(rows) > len(page) else None
    return SessionPage(tuple(_readable(page)), _total(connection, query, terms, values), cursor)


def list_oldest(connection: apsw.Connection, owner: str, user_id: str, limit: int) -> tuple[Session, ...]:
    rows: list[Any] = connection.execute(_LIST_OLDEST, (user_id, owner, limit)).fetchall()
    return tuple(_readable(rows))


def list_keys(
    connection: apsw.Connection, owner: str, user_id: str | None, agent_id: str | None, limit: int
) -> tuple[SessionKey, ...]:
    query = SessionQuery(owner=owner, now=0, user_id=user_id, agent_id=agent_id)
    # No order is asked for, so the agent's own index may be chosen, as in counting.
    where = " AND ".join(_terms_of(query)).replace("+agent_id", "agent_id")
    rows = connection.execute(
        f"SELECT owner, session_id FROM sessions WHERE {where} LIMIT :limit",  # noqa: S608
        {"owner": owner, "user_id": user_id, "agent_id": agent_id, "limit": limit},
    )
    return tuple(SessionKey(*row) for row in rows)


def load_path(connection: apsw.Connection, session: Session) -> Path:
    place = _get_place(connection, session)
    if session.head is None:
        return Path(None, session.note, (), 0)
    rows = _walk(connection, place, to_id_bytes(session.head), session.depth + 1)
    _check_whole(rows, session)
    rows.reverse()
    session_id = session.key.session_id
    messages = tuple([message for row in rows for message in messages_of_row(row, session_id)])
    return Path(session.head, session.note, messages, sum(len(row[11]) for row in rows))


def find_bound(connection: apsw.Connection, names: Names, owner: str, key: str) -> BoundTurn | None:
    """Return the committed turn that the key is bound to.

    Raises:
        SnapshotUnreadable: the key's row or the turn's is broken.
    """
    bound = sqlite_keys.find(connection, owner, key)
    found = bound and connection.execute(_FIND_PLACE_OF, (bound.session,)).fetchone()
    row = bound and connection.execute(_FIND_TURN, (bound.session, bound.turn_id)).fetchone()
    if not bound or not found or not row:
        return None
    on_branch = row[0] in _branch_ids(connection, _Place(*found[:3]), [row])
    turn = from_turn_row(row, connection, names, found[3], on_branch=on_branch)
    return BoundTurn(found[3], bound.fingerprint, turn) if turn.is_committed else None


def get_turn(connection: apsw.Connection, names: Names, session: Session, turn_id: str) -> Turn:
    place = _find_place(connection, session)
    raw_id = _to_turn_id(turn_id)
    row = place and raw_id and connection.execute(_FIND_TURN, (place.number, raw_id)).fetchone()
    if not row or not place:
        raise TurnNotFound(session_id=session.key.session_id, turn_id=turn_id)
    on_branch = raw_id in _branch_ids(connection, place, [row])
    return from_turn_row(row, connection, names, session.key.session_id, on_branch=on_branch)


def list_turns(
    connection: apsw.Connection, names: Names, session: Session, limit: int, cursor: str | None
) -> TurnPage:
    time_ms, last_id = _turn_position(cursor)
    place = _find_place(connection, session)
    if place is None:
        return TurnPage((), 0, None)
    values = {"session": place.number, "time": time_ms, "turn_id": last_id, "limit": limit + 1}
    rows = connection.execute(_LIST_TURNS, values).fetchall()
    page = rows[:limit]
    branch = _branch_ids(connection, place, page)
    turns = [_show(row, connection, names, session, on_branch=row[0] in branch) for row in page]
    shown = tuple(turn for turn in turns if turn is not None)
    # The last entry, unless its row is too broken to say where it stands.
    places = [(turn.started_at, turn.turn_id) for turn in shown if turn.started_at]
    following = to_cursor("t", *places[-1]) if places and len(rows) > len(page) else None
    return TurnPage(shown, connection.execute(_COUNT_TURNS, (place.number,)).get, following)


def list_branch(
    connection: apsw.Connection, names: Names, session: Session, limit: int, before: str | None
) -> tuple[Turn, ...]:
    session_id = session.key.session_id
    place = _find_place(connection, session)
    start = place.head if place else None
    if before is not None:
        start = _parent_on_branch(connection, place, session, before)
    if place is None or start is None:
        return ()
    rows = _walk(connection, place, start, limit)
    if len(rows) < limit and (not rows or rows[-1][1] is not None):
        raise SnapshotUnreadable(session_id=session_id)
    return tuple(from_turn_row(row, connection, names, session_id, on_branch=True) for row in reversed(rows))


def _show(
    row: Row, connection: apsw.Connection, names: Names, session: Session, *, on_branch: bool
) -> Turn | None:
    """Return the turn for a listing; a broken one as failed, so that its neighbours stay listed."""
    try:
        return from_turn_row(row, connection, names, session.key.session_id, on_branch=on_branch)
    except SnapshotUnreadable as error:
        _log.error("turn %s of session %r is unreadable", error.turn_id, error.session_id)
        return unreadable_turn(row, on_branch=on_branch)


def get_usage(connection: apsw.Connection, owner: str, user_id: str, limit: int) -> UserUsage:
    turns, read, written = connection.execute(_SUM_USAGE, (owner, user_id)).get
    days: list[Any] = connection.execute(_LIST_USAGE, (owner, user_id, limit)).fetchall()
    return UserUsage(turns, read, written, tuple(DayUsage(*row) for row in days))


def _find_place(connection: apsw.Connection, session: Session) -> _Place | None:
    row = connection.execute(_FIND_PLACE, (*session.key, to_id_bytes(session.uid))).fetchone()
    return None if row is None else _Place(*row)


def _get_place(connection: apsw.Connection, session: Session) -> _Place:
    place = _find_place(connection, session)
    if place is None:
        raise SessionNotFound(session_id=session.key.session_id)
    return place


def _walk(connection: apsw.Connection, place: _Place, start: bytes, limit: int) -> list[Any]:
    """Return up to ``limit`` rows from ``start`` towards the root. The limit also ends a broken circle."""
    values = {"session": place.number, "start": start, "limit": limit}
    return connection.execute(_WALK, values).fetchall()


def _check_whole(rows: list[Any], session: Session) -> None:
    """Refuse a path with a gap, a circle or a turn that was never committed."""
    is_whole = (
        len(rows) == session.depth
        and rows[-1][1] is None
        and all(row[2] == session.depth - position for position, row in enumerate(rows))
        and all(row[3] in range(4) and is_committed(row[3], row[4]) for row in rows)
    )
    if not is_whole:
        raise SnapshotUnreadable(session_id=session.key.session_id)


def _branch_ids(connection: apsw.Connection, place: _Place, rows: Iterable[Row]) -> set[bytes]:
    """Return the ids of the current branch, from the head as far up as ``rows`` reach."""
    depths = [row[2] for row in rows if isinstance(row[2], int)]
    if place.head is None or not depths:
        return set()
    # The limit ends a broken circle.
    values = {
        "session": place.number,
        "start": place.head,
        "least": min(depths),
        "limit": place.depth + 1,
    }
    return {turn_id for (turn_id,) in connection.execute(_WALK_IDS, values)}


def _parent_on_branch(
    connection: apsw.Connection, place: _Place | None, session: Session, turn_id: str
) -> bytes | None:
    raw_id = _to_turn_id(turn_id)
    row = place and raw_id and connection.execute(_FIND_TURN, (place.number, raw_id)).fetchone()
    if not row or not place or raw_id not in _branch_ids(connection, place, [row]):
        raise TurnNotFound(session_id=session.key.session_id, turn_id=turn_id)
    messages_of_row(row, session.key.session_id)  # says whether the row, and with it the parent, is whole
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
    connection: apsw.Connection, query: SessionQuery, terms: list[str], values: dict[str, Any]
) -> int | None:
    # Paging sorts by time and must not choose this index; counting should.
    where = " AND ".join(terms).replace("+agent_id", "agent_id")
    if rules.has_exact_total(query):
        total: int = connection.execute(f"SELECT count(*) FROM sessions WHERE {where}", values).get  # noqa: S608
        return total
    counted: int = connection.execute(
        f"SELECT count(*) FROM (SELECT 1 FROM sessions WHERE {where} LIMIT :most)",  # noqa: S608
        values,
    ).get
    return counted if counted <= rules.TOTAL_LIMIT else None


def _readable(rows: list[Any]) -> Iterable[Session]:
    """Yield the sessions in ``rows``; a broken one is left out, so that its neighbours stay listed."""
    for row in rows:
        try:
            yield from_session_row(row[:-1])
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
    return time_ms, _to_turn_id(tie) or _NO_ID


def _to_turn_id(text: str) -> bytes | None:
    try:
        return to_id_bytes(text)
    except ValueError:
        return None
