"""What a store in SQLite gives another: a session, or what belongs to none, in one read transaction."""

from collections import Counter
from dataclasses import replace
from typing import Any

from app.domain.dump import CheckpointDump, RestDump, SessionDump, SharedDump, TurnDump, UsageDump
from app.domain.errors import SnapshotUnreadable
from app.domain.ids import SessionKey
from app.domain.state import StateScope
from app.domain.stats import DayUsage
from app.domain.turn import JsonObject, TurnStatus
from app.stores.buckets import PREFIX
from app.stores.side_rows import (
    CHECKPOINT_COLUMNS,
    FACT_COLUMNS,
    NOTE_COLUMNS,
    Row,
    from_checkpoint_row,
    from_fact_row,
    from_note_row,
    from_shared_row,
    from_state_body,
)
from app.stores.sqlite import keys
from app.stores.sqlite.connection import Connection
from app.stores.sqlite.rows import TURN_COLUMNS, Names, Record, from_turn_row, whose
from app.stores.sqlite.tree import find_by_key

TOTALS = (
    "created", "lifetime_ms", "turns", "turns_failed", "turns_finished", "prompt_tokens",
    "completion_tokens", "response_ms",
)  # fmt: skip

_LIST_AFTER = (
    "SELECT owner, session_id FROM sessions WHERE (owner, session_id) > (?, ?)"
    " ORDER BY owner, session_id LIMIT ?"
)
_TURNS = f"SELECT {TURN_COLUMNS} FROM turns WHERE session = ? ORDER BY turn_id"
_STATES = "SELECT number, body FROM states WHERE session = ?"
_NOTES = f"SELECT {NOTE_COLUMNS} FROM notes WHERE session = ? ORDER BY note_id"
_FACTS = f"SELECT {FACT_COLUMNS} FROM session_events WHERE session = ? ORDER BY number"
_CHECKPOINTS = f"SELECT {CHECKPOINT_COLUMNS} FROM checkpoints WHERE session = ? ORDER BY checkpoint_id"
LIST_SHARED = (
    "SELECT app_name, owner, user_id, rev, updated_at, body FROM shared_state"
    " ORDER BY app_name, owner, user_id"
)
_USAGE = (
    "SELECT owner, user_id, day, turns, prompt_tokens, completion_tokens FROM usage_days WHERE day >= 0"
    " ORDER BY owner, user_id, day"
)
_COUNTERS = "SELECT name, value FROM counters"
_OF_SESSIONS = "SELECT count(*), coalesce(sum(last_accessed - created_at), 0) FROM sessions"


def list_after(connection: Connection, key: SessionKey | None, limit: int) -> tuple[SessionKey, ...]:
    # No session's id is empty, so this is before all.
    rows = connection.execute(_LIST_AFTER, (*(key or ("", "")), limit))
    return tuple(SessionKey(*row) for row in rows)


def dump_session(connection: Connection, names: Names, key: SessionKey) -> SessionDump | None:
    record = find_by_key(connection, key)
    if record is None:
        return None
    try:
        return _Reading(connection, names, record).dump()
    except SnapshotUnreadable as error:
        raise SnapshotUnreadable(session_id=key.session_id, turn_id=error.turn_id) from error


def dump_rest(connection: Connection) -> RestDump:
    rows: list[Any] = connection.execute(LIST_SHARED).fetchall()
    scopes = [StateScope(row[0], row[1], row[2] or None) for row in rows]
    shared = (
        SharedDump(scope, from_shared_row(connection.sealer, scope, row[3:]))
        for scope, row in zip(scopes, rows, strict=True)
    )
    usage = (UsageDump(row[0], row[1], DayUsage(*row[2:])) for row in connection.execute(_USAGE))
    counters = Counter(dict[str, int](connection.execute(_COUNTERS)))
    counters.subtract(totals_of_sessions(connection))
    totals = {name: counters[name] for name in TOTALS}
    buckets = {name: value for name, value in counters.items() if name.startswith(PREFIX)}
    return RestDump(tuple(shared), tuple(usage), totals | buckets)


def totals_of_sessions(connection: Connection) -> dict[str, int]:
    """Return what the sessions that there are have added to the totals of a ``RestDump``."""
    created, lifetime_ms = connection.execute(_OF_SESSIONS).get
    return {"created": created, "lifetime_ms": lifetime_ms}


class _Reading:
    """All that belongs to one session, read table by table."""

    def __init__(self, connection: Connection, names: Names, record: Record) -> None:
        self._connection = connection
        self._names = names
        self._record = record
        uid, sealer = record.uid, connection.sealer
        self._states = {
            number: from_state_body(sealer, uid, number, body) for number, body in self._rows(_STATES)
        }
        self._bindings = keys.list_bindings(connection, record.number)

    def dump(self) -> SessionDump:
        record, uid, sealer = self._record, self._record.uid, self._connection.sealer
        checkpoints = [(from_checkpoint_row(sealer, uid, row), row[2]) for row in self._rows(_CHECKPOINTS)]
        return SessionDump(
            record.session,
            self._state_of(record.root_state),
            tuple(self._turn(row) for row in self._rows(_TURNS)),
            tuple(from_note_row(sealer, uid, row) for row in self._rows(_NOTES)),
            tuple(from_fact_row(sealer, uid, row) for row in self._rows(_FACTS)),
            tuple(CheckpointDump(checkpoint, self._state_of(number)) for checkpoint, number in checkpoints),
        )

    def _turn(self, row: Row) -> TurnDump:
        turn = from_turn_row(
            row, self._connection, self._names, whose(self._connection, self._record.session)
        )
        is_bound = turn.is_committed or turn.status is TurnStatus.RUNNING
        if is_bound and row[0] in self._bindings:
            turn = replace(turn, binding=self._bindings[row[0]])
        return TurnDump(turn, self._state_of(row[11]) if turn.is_committed else None)

    def _state_of(self, number: int | None) -> JsonObject:
        if not number:
            return {}
        if number not in self._states:
            raise SnapshotUnreadable
        return self._states[number]

    def _rows(self, sql: str) -> list[Any]:
        return self._connection.execute(sql, (self._record.number,)).fetchall()
