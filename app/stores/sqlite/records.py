"""Session records as the writer adds, changes and removes them, and what is counted of them.

A row's ``phase`` is the status that it is counted under: true at every write, and of a
session that nothing writes at the last sweep. So it is never from before that sweep.
"""

import apsw

from app.domain.erasure import Erased
from app.domain.errors import SessionExists
from app.domain.ids import SessionKey
from app.domain.session import Session, SessionStatus
from app.domain.turn import JsonObject, Usage
from app.stores.side_rows import to_state_body
from app.stores.sqlite.cache import weigh
from app.stores.sqlite.rows import (
    ACTIVITY_COLUMNS,
    SESSION_COLUMNS,
    Record,
    json_chars,
    to_activity_row,
    to_session_row,
)
from app.stores.sqlite.unit import Unit

PHASES = (SessionStatus.ACTIVE, SessionStatus.IDLE, SessionStatus.ARCHIVED, SessionStatus.EXPIRED)
SWEPT = "swept_ms"
"""The counter that holds up to when phases were swept."""
_CODES = {status: code for code, status in enumerate(PHASES)}
_OWNED_TABLES = ("turns", "states", "notes", "checkpoints", "session_events", "idempotency_keys")


def marks(columns: str) -> str:
    return ", ".join("?" * len(columns.split(",")))


def settings(columns: str) -> str:
    return ", ".join(f"{column.strip()} = ?" for column in columns.split(","))


_ADD = f"INSERT INTO sessions ({SESSION_COLUMNS}, phase) VALUES ({marks(SESSION_COLUMNS)}, ?)"
_SET = f"UPDATE sessions SET {settings(SESSION_COLUMNS)}, phase = ? WHERE id = ?"
_SET_ACTIVITY = f"UPDATE sessions SET {settings(ACTIVITY_COLUMNS)} WHERE id = ?"
_REMOVE = "DELETE FROM sessions WHERE id = ? RETURNING owner, session_id, phase"
_ADD_STATE = "INSERT INTO states (session, number, body) VALUES (?, ?, ?)"
_NEXT_STATE = "SELECT coalesce(max(number), 0) + 1 FROM states WHERE session = ?"

_ADD_USAGE = (
    "INSERT INTO usage_days (owner, user_id, day, turns, prompt_tokens, completion_tokens)"
    " SELECT owner, user_id, kept.column1, ?, ?, ? FROM (VALUES (-1), (?)) AS kept, sessions"
    " WHERE id = ? AND user_id IS NOT NULL"
    " ON CONFLICT (owner, user_id, day) DO UPDATE SET turns = turns + excluded.turns,"
    " prompt_tokens = prompt_tokens + excluded.prompt_tokens,"
    " completion_tokens = completion_tokens + excluded.completion_tokens"
)


def add(
    unit: Unit, session: Session, *, state_number: int | None = None, root_state: int | None = None
) -> int:
    """Store a new session, and return its number.

    Raises:
        SessionExists: its key is taken.
    """
    phase = _phase_of(unit, session, session.last_accessed)
    row = to_session_row(unit.sealer, session, state_number, root_state)
    try:
        unit.connection.execute(_ADD, (*row, phase))
    except apsw.ConstraintError as error:
        raise SessionExists(session_id=session.key.session_id) from error
    unit.count("sessions", 1)
    unit.count("created", 1)
    unit.count("lifetime_ms", session.last_accessed - session.created_at)
    count_phase(unit, phase, 1)
    unit.note(session.key, weigh(session, json_chars(row)))
    return unit.connection.last_insert_rowid()


def save(unit: Unit, record: Record, session: Session, now: int, *, state_number: int | None) -> None:
    """Store ``session`` in the place of what it was; ``state_number`` is where its state is kept."""
    phase = _phase_of(unit, session, now)
    connection, was = unit.connection, record.session
    # What is not activity raises a revision.
    if (session.rev, session.state_rev) == (was.rev, was.state_rev):
        activity = to_activity_row(session, record, state_number, phase)
        connection.execute(_SET_ACTIVITY, (*activity, record.number))
        row = record.row
    else:
        row = to_session_row(unit.sealer, session, state_number, record.root_state)
        connection.execute(_SET, (*row, phase, record.number))
    unit.note(session.key, weigh(session, json_chars(row)))
    unit.count("lifetime_ms", session.last_accessed - was.last_accessed)
    if phase != record.phase:
        count_phase(unit, record.phase, -1)
        count_phase(unit, phase, 1)


def remove(unit: Unit, number: int) -> Erased:
    """Remove a session and everything that belongs to it; what belongs to its user stays."""
    unit.owes_cut = True
    gone = {}
    for table in _OWNED_TABLES:
        unit.connection.execute(f"DELETE FROM {table} WHERE session = ?", (number,))
        gone[table] = unit.connection.changes()
    owner, session_id, phase = unit.connection.execute(_REMOVE, (number,)).get
    unit.note(SessionKey(owner, session_id), None)
    unit.count("sessions", -1)
    count_phase(unit, phase, -1)
    return Erased(1, gone["turns"], gone["checkpoints"], gone["session_events"])


def keep_state(unit: Unit, record: Record) -> int | None:
    """Keep the session's state unless it is kept; return its number, which the caller saves."""
    state = record.session.state
    if not state or record.state_number is not None:
        return record.state_number
    number: int = unit.connection.execute(_NEXT_STATE, (record.number,)).get
    add_state(unit, record.number, record.uid, number, state)
    return number


def add_state(unit: Unit, session: int, uid: bytes, number: int, state: JsonObject) -> None:
    unit.connection.execute(_ADD_STATE, (session, number, to_state_body(unit.sealer, uid, number, state)))


def add_usage(unit: Unit, number: int, day: int, turns: int, usage: Usage) -> None:
    """Count what was used for a session on its user's account."""
    values = turns, usage.prompt_tokens, usage.completion_tokens, day, number
    unit.connection.execute(_ADD_USAGE, values)


def count_phase(unit: Unit, phase: int, change: int) -> None:
    # Another number is a broken row's: nothing is counted under it.
    if phase in range(len(PHASES)):
        unit.count(PHASES[phase].value, change)


def _phase_of(unit: Unit, session: Session, now: int) -> int:
    return _CODES[session.status_at(max(now, unit.value(SWEPT)), unit.life)]
