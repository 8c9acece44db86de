"""State in SQLite: how a session's is patched, and that of users and applications."""

from app.domain.errors import PreconditionFailed
from app.domain.ids import SessionKey
from app.domain.journal import StateChanged
from app.domain.session import Session
from app.domain.state import SharedState, StateScope
from app.domain.turn import JsonObject
from app.stores import rules
from app.stores.side_rows import from_shared_row, to_shared_body
from app.stores.sqlite import journal, records
from app.stores.sqlite.connection import Connection
from app.stores.sqlite.tree import get_by_key
from app.stores.sqlite.unit import Unit

_FIND_SHARED = (
    "SELECT rev, updated_at, body FROM shared_state WHERE app_name = ? AND owner = ? AND user_id = ?"
)
_SET_SHARED = (
    "INSERT INTO shared_state (app_name, owner, user_id, rev, updated_at, body) VALUES (?, ?, ?, ?, ?, ?)"
    " ON CONFLICT (app_name, owner, user_id) DO UPDATE SET"
    " rev = excluded.rev, updated_at = excluded.updated_at, body = excluded.body"
)


def patch_state(
    unit: Unit, key: SessionKey, patch: JsonObject, now: int, expected_rev: int | None
) -> Session:
    record = get_by_key(unit.connection, key)
    if expected_rev is not None and record.session.state_rev != expected_rev:
        raise PreconditionFailed(session_id=key.session_id)
    now = rules.fact_time(record.session, now)
    patched = rules.after_patch(record.session, patch, now)
    records.save(unit, record, patched, now, state_number=None)
    journal.log(unit, record, StateChanged(patch), now)
    return patched


def get_shared(connection: Connection, scope: StateScope) -> SharedState:
    """Return the state.

    Raises:
        SnapshotUnreadable: its row is broken.
    """
    row = connection.execute(_FIND_SHARED, _to_key(scope)).fetchone()
    return SharedState() if row is None else from_shared_row(connection.sealer, scope, row)


def patch_shared(
    unit: Unit, scope: StateScope, patch: JsonObject, now: int, expected_rev: int | None
) -> SharedState:
    shared = get_shared(unit.connection, scope)
    if expected_rev is not None and shared.rev != expected_rev:
        raise PreconditionFailed
    patched = shared.patched(patch)
    set_shared(unit, scope, patched, now)
    return patched


def set_shared(unit: Unit, scope: StateScope, shared: SharedState, now: int) -> None:
    body = to_shared_body(unit.sealer, scope, shared, now)
    unit.connection.execute(_SET_SHARED, (*_to_key(scope), shared.rev, now, body))


def _to_key(scope: StateScope) -> tuple[str, str, str]:
    return scope.app_name, scope.owner, scope.user_id or ""
