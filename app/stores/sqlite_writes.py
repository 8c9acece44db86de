"""The works of the writer: each is one step, inside a savepoint that undoes it if it raises."""

import logging
import time
from collections.abc import Sequence
from typing import Any

import apsw

from app.domain.errors import (
    HeadMoved,
    PreconditionFailed,
    SessionExists,
    SessionLimit,
    SessionNotFound,
    SnapshotUnreadable,
)
from app.domain.ids import SessionKey, to_id_bytes
from app.domain.session import LifeSpan, Session, SessionCap, SessionChange
from app.domain.turn import Turn, TurnStatus
from app.stores import rules, sqlite_keys
from app.stores.codec import to_turn_body
from app.stores.sqlite_rows import (
    RUNNING,
    SESSION_COLUMNS,
    TURN_COLUMNS,
    Names,
    Row,
    TurnNames,
    activity_row,
    from_session_row,
    from_turn_row,
    is_committed,
    to_session_row,
    to_turn_row,
)
from app.stores.sqlite_writer import Unit

_FAILED = 2
_OWNED_TABLES = ("turns", "notes", "checkpoints", "session_events", "idempotency_keys")


def _marks(columns: str) -> str:
    return ", ".join("?" * len(columns.split(",")))


def _settings(columns: str) -> str:
    return ", ".join(f"{column.strip()} = ?" for column in columns.split(","))


_FIND_SESSION = f"SELECT {SESSION_COLUMNS}, id FROM sessions WHERE owner = ? AND session_id = ?"  # noqa: S608
_ADD_SESSION = f"INSERT INTO sessions ({SESSION_COLUMNS}) VALUES ({_marks(SESSION_COLUMNS)})"  # noqa: S608
_SET_SESSION = f"UPDATE sessions SET {_settings(SESSION_COLUMNS)} WHERE id = ?"  # noqa: S608
_SET_ACTIVITY = (
    "UPDATE sessions SET head = ?, depth = ?, updated_at = ?, last_accessed = ?, expires_at = ?,"
    " marked_idle = ?, seal = ? WHERE id = ?"
)
_FIND_TURN_STATUS = "SELECT status, kept FROM turns WHERE session = ? AND turn_id = ?"
_COUNT_OF_USER = "SELECT count(*) FROM sessions WHERE user_id = ? AND +owner = ?"
_FIND_RUNNING = "SELECT 1 FROM turns WHERE status = 0 AND session = ?"
_ADD_USAGE = (
    "INSERT INTO usage_days (owner, user_id, day, turns, prompt_tokens, completion_tokens)"
    " SELECT owner, user_id, ?, 1, ?, ? FROM sessions WHERE id = ? AND user_id IS NOT NULL"
    " ON CONFLICT (owner, user_id, day) DO UPDATE SET turns = turns + 1,"
    " prompt_tokens = prompt_tokens + excluded.prompt_tokens,"
    " completion_tokens = completion_tokens + excluded.completion_tokens"
)
_ADD_TURN = f"INSERT INTO turns ({TURN_COLUMNS}, session) VALUES ({_marks(TURN_COLUMNS)}, ?)"  # noqa: S608
_SET_TURN = f"UPDATE turns SET {_settings(TURN_COLUMNS)} WHERE session = ? AND turn_id = ?"  # noqa: S608
_ORPHANS = f"SELECT {TURN_COLUMNS}, session, id FROM turns WHERE status = 0 AND boot != ?"  # noqa: S608
_DUE = (
    "SELECT id FROM sessions AS s WHERE expires_at <= ? AND NOT EXISTS"
    " (SELECT 1 FROM turns WHERE status = 0 AND session = s.id AND boot = ?)"
    " ORDER BY expires_at LIMIT ?"
)

_log = logging.getLogger(__name__)


def ping(unit: Unit) -> None:
    unit.connection.execute("SELECT 1").fetchone()


def create_session(unit: Unit, session: Session) -> None:
    try:
        unit.connection.execute(_ADD_SESSION, to_session_row(session))
    except apsw.ConstraintError as error:
        raise SessionExists(session_id=session.key.session_id) from error
    unit.count("sessions", 1)


def create_sessions(
    unit: Unit, sessions: Sequence[Session], cap: SessionCap | None
) -> tuple[SessionExists | SessionLimit | None, ...]:
    outcomes: list[SessionExists | SessionLimit | None] = []
    for session in sessions:
        try:
            if cap is not None and session.user_id is not None:
                _make_room(unit, session, cap)
            create_session(unit, session)
            outcomes.append(None)
        except (SessionExists, SessionLimit) as refusal:
            outcomes.append(refusal)
    return tuple(outcomes)


def update_session(
    unit: Unit, key: SessionKey, change: SessionChange, now: int, life: LifeSpan, expected_etag: str | None
) -> Session:
    row = unit.connection.execute(_FIND_SESSION, key).fetchone()
    if row is None:
        raise SessionNotFound(session_id=key.session_id)
    session = from_session_row(row[:-1])
    if expected_etag is not None and session.etag != expected_etag:
        raise PreconditionFailed(session_id=key.session_id)
    changed = change.apply(session, now, life)
    unit.connection.execute(_SET_SESSION, (*to_session_row(changed), row[-1]))
    return changed


def touch_session(unit: Unit, key: SessionKey, now: int, life: LifeSpan) -> Session:
    row = unit.connection.execute(_FIND_SESSION, key).fetchone()
    if row is None:
        raise SessionNotFound(session_id=key.session_id)
    touched = from_session_row(row[:-1]).touched(now, life)
    _set_activity(unit, row, touched)
    return touched


def delete_session(unit: Unit, key: SessionKey) -> bool:
    number = unit.connection.execute("SELECT id FROM sessions WHERE owner = ? AND session_id = ?", key).get
    if number is None:
        return False
    _remove(unit, number)
    return True


def delete_sessions(unit: Unit, keys: Sequence[SessionKey]) -> int:
    return sum(delete_session(unit, key) for key in keys)


def start_turn(unit: Unit, session: Session, turn: Turn, body: bytes, life: LifeSpan) -> None:
    row = _find_row(unit, session)
    if row is None:
        return
    number = row[-1]
    if unit.connection.execute(_FIND_TURN_STATUS, (number, to_id_bytes(turn.turn_id))).fetchone():
        return
    _add_turn(unit, number, turn, body)
    sqlite_keys.bind(unit.connection, number, turn)
    _set_activity(unit, row, from_session_row(row[:-1]).touched(turn.started_at, life))


def commit_turn(unit: Unit, session: Session, turn: Turn, body: bytes, life: LifeSpan) -> Session:
    row = _find_row(unit, session)
    if row is None:
        raise SessionNotFound(session_id=session.key.session_id)
    current = from_session_row(row[:-1])
    known = _status_of(unit, row[-1], turn)
    if known is not None and is_committed(*known):
        return current
    if known is not None and known[0] != RUNNING:
        raise HeadMoved(session_id=session.key.session_id, turn_id=turn.turn_id)
    rules.check_head(current, turn)
    _end_turn(unit, row[-1], turn, body, is_known=known is not None)
    moved = rules.after_commit(current, turn, life)
    _set_activity(unit, row, moved)
    return moved


def record_turn(unit: Unit, session: Session, turn: Turn, body: bytes, life: LifeSpan) -> None:
    row = _find_row(unit, session)
    if row is None:
        return
    known = _status_of(unit, row[-1], turn)
    if known is not None and known[0] != RUNNING:
        return
    _end_turn(unit, row[-1], turn, body, is_known=known is not None)
    _set_activity(unit, row, from_session_row(row[:-1]).touched(rules.end_of(turn), life))


def expire_and_purge(
    unit: Unit, now: int, since: int, limit: int, life: LifeSpan, boot_id: str
) -> tuple[int, int]:
    expired = unit.connection.execute(
        "SELECT count(*) FROM sessions WHERE expires_at > ? AND expires_at <= ?", (since, now)
    ).get
    line = rules.purge_line(now, life)
    if line is None:
        return expired, 0
    due: list[Any] = unit.connection.execute(_DUE, (line, unit.intern(boot_id), limit)).fetchall()
    for (number,) in due:
        _remove(unit, number)
    return expired, len(due)


def begin_boot(unit: Unit, boot_id: str) -> None:
    """Note this boot, turn the start records of every other into failed turns, load the counters."""
    connection = unit.connection
    connection.execute("BEGIN IMMEDIATE")
    now = time.time_ns() // 1_000_000
    boot = unit.intern(boot_id)
    connection.execute("INSERT OR IGNORE INTO boots (boot, started_at) VALUES (?, ?)", (boot, now))
    names = Names()
    for row in connection.execute(_ORPHANS, (boot,)).fetchall():
        _interrupt(unit, row, names, now)
    unit.end_work()
    unit.write_counts()
    unit.end_group()
    connection.execute("COMMIT")
    unit.totals.clear()
    unit.totals.update(dict(connection.execute("SELECT name, value FROM counters")))
    # Counted, not believed: a wrong total would stay wrong for ever.
    unit.totals["sessions"] = connection.execute("SELECT count(*) FROM sessions").get


def _interrupt(unit: Unit, row: Row, names: Names, now: int) -> None:
    try:
        turn = from_turn_row(row[:12], unit.connection, names, "")
    except SnapshotUnreadable:
        # Its seal stays wrong, so whoever asks for it learns that it is broken; but it does not run.
        _log.error("the start record of a turn is unreadable (row %d)", row[-1])
        unit.connection.execute("UPDATE turns SET status = ? WHERE id = ?", (_FAILED, row[-1]))
        sqlite_keys.release(unit.connection, row[-2], row[0])
        return
    failed = rules.interrupted(turn, now)
    _end_turn(unit, row[-2], failed, to_turn_body(failed), is_known=True)


def _make_room(unit: Unit, session: Session, cap: SessionCap) -> None:
    """Remove as many victims as are in the way of ``session``; changes nothing if it raises."""
    if unit.connection.execute(_FIND_SESSION, session.key).fetchone():
        raise SessionExists(session_id=session.key.session_id)
    user = session.user_id, session.key.owner
    excess = unit.connection.execute(_COUNT_OF_USER, user).get + 1 - cap.most
    if excess <= 0:
        return
    rows = (_find_row(unit, v) for v in cap.victims if (v.user_id, v.key.owner) == user)
    times = {victim.uid: victim.last_accessed for victim in cap.victims}
    gone = [row[-1] for row in rows if row is not None and _may_go(unit, row, times)]
    if len(gone) < excess:
        raise SessionLimit(session_id=session.key.session_id)
    for number in gone[:excess]:
        _remove(unit, number)


def _may_go(unit: Unit, row: Row, times: dict[str, int]) -> bool:
    found = from_session_row(row[:-1])
    is_running = unit.connection.execute(_FIND_RUNNING, (row[-1],)).fetchone()
    return found.last_accessed == times[found.uid] and is_running is None


def _find_row(unit: Unit, session: Session) -> Row | None:
    """Return the row of this very incarnation, its number last."""
    row = unit.connection.execute(_FIND_SESSION, session.key).fetchone()
    return row if row is not None and row[2] == to_id_bytes(session.uid) else None


def _status_of(unit: Unit, number: int, turn: Turn) -> Any:
    return unit.connection.execute(_FIND_TURN_STATUS, (number, to_id_bytes(turn.turn_id))).fetchone()


def _turn_row(unit: Unit, turn: Turn, body: bytes) -> tuple[Any, ...]:
    strings = (turn.agent_id, turn.provider, turn.model, turn.boot_id)
    return to_turn_row(turn, body, TurnNames(*map(unit.intern, strings)))


def _add_turn(unit: Unit, number: int, turn: Turn, body: bytes) -> None:
    unit.connection.execute(_ADD_TURN, (*_turn_row(unit, turn, body), number))


def _end_turn(unit: Unit, number: int, turn: Turn, body: bytes, *, is_known: bool) -> None:
    assert turn.status is not TurnStatus.RUNNING
    if is_known:
        values = _turn_row(unit, turn, body)
        unit.connection.execute(_SET_TURN, (*values, number, values[0]))
    else:
        _add_turn(unit, number, turn, body)
    if turn.is_committed:
        sqlite_keys.bind(unit.connection, number, turn)
    else:
        sqlite_keys.release(unit.connection, number, to_id_bytes(turn.turn_id))
    for name, change in rules.counts_of(turn).items():
        unit.count(name, change)
    values = (rules.day_of(turn), turn.usage.prompt_tokens, turn.usage.completion_tokens, number)
    unit.connection.execute(_ADD_USAGE, values)


def _set_activity(unit: Unit, row: Row, session: Session) -> None:
    unit.connection.execute(_SET_ACTIVITY, (*activity_row(session, row), row[-1]))


def _remove(unit: Unit, number: int) -> None:
    for table in _OWNED_TABLES:
        unit.connection.execute(f"DELETE FROM {table} WHERE session = ?", (number,))  # noqa: S608
    unit.connection.execute("DELETE FROM sessions WHERE id = ?", (number,))
    unit.count("sessions", -1)
