"""State in PostgreSQL: how a session's is patched, and that of users and applications."""

from app.domain.errors import PreconditionFailed
from app.domain.ids import SessionKey
from app.domain.journal import StateChanged
from app.domain.session import Session
from app.domain.state import SharedState, StateScope
from app.domain.turn import JsonObject
from app.stores import rules
from app.stores.postgres import journal, records
from app.stores.postgres.tree import get_by_key
from app.stores.postgres.unit import Unit, View
from app.stores.side_rows import from_shared_row, to_shared_body

_FIND = "SELECT rev, updated_at, body FROM shared_state WHERE app_name = $1 AND owner = $2 AND user_id = $3"
SET = (
    "INSERT INTO shared_state (app_name, owner, user_id, rev, updated_at, body)"
    " VALUES ($1, $2, $3, $4, $5, $6)"
    " ON CONFLICT (app_name, owner, user_id) DO UPDATE SET"
    " rev = excluded.rev, updated_at = excluded.updated_at, body = excluded.body"
)
_SET_NEXT = f"{SET} WHERE shared_state.rev = excluded.rev - 1 RETURNING rev"


async def patch_state(
    unit: Unit, key: SessionKey, patch: JsonObject, now: int, expected_rev: int | None
) -> Session:
    record = await get_by_key(unit, key, lock=True)
    if expected_rev is not None and record.session.state_rev != expected_rev:
        raise PreconditionFailed(session_id=key.session_id)
    now = rules.fact_time(record.session, now)
    patched = rules.after_patch(record.session, patch, now)
    await journal.log(unit, record, StateChanged(patch), now)
    await records.save(unit, record, patched, state_number=None)
    return patched


async def get_shared(view: View, scope: StateScope) -> SharedState:
    """Return the state.

    Raises:
        SnapshotUnreadable: its row is broken.
    """
    row = await view.connection.fetchrow(_FIND, *to_scope_row(scope))
    return SharedState() if row is None else from_shared_row(view.sealer, scope, row)


async def patch_shared(
    view: View, scope: StateScope, patch: JsonObject, now: int, expected_rev: int | None
) -> SharedState:
    """Read, patch, and write unless another has done so meanwhile: then again, as long as there is time."""
    while True:
        shared = await get_shared(view, scope)
        if expected_rev is not None and shared.rev != expected_rev:
            raise PreconditionFailed
        patched = shared.patched(patch)
        body = to_shared_body(view.sealer, scope, patched, now)
        if await view.connection.fetchval(_SET_NEXT, *to_scope_row(scope), patched.rev, now, body):
            return patched


def to_scope_row(scope: StateScope) -> tuple[bytes, bytes, bytes]:
    """Return how the scope is stored."""
    return scope.app_name.encode(), scope.owner.encode(), (scope.user_id or "").encode()
