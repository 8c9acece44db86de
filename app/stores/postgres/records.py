"""Session records as works add, change and remove them; the database itself counts what is counted."""

from collections.abc import Sequence
from typing import Any

from app.domain.erasure import Erased
from app.domain.errors import PreconditionFailed, SessionExists, SessionLimit, SnapshotUnreadable
from app.domain.ids import SessionKey, to_id_bytes
from app.domain.session import Session, SessionCap, SessionChange
from app.domain.turn import Usage
from app.stores.postgres.rows import (
    SESSION_COLUMNS,
    Record,
    from_record_row,
    marks,
    new_record,
    to_session_row,
)
from app.stores.postgres.tree import LOCK_RECORD, get_by_key, raw_key
from app.stores.postgres.unit import Unit, View
from app.stores.side_rows import to_state_body

ROOT_STATE = 1

_COUNT = len(SESSION_COLUMNS.split(","))
_ADD = (
    f"INSERT INTO sessions ({SESSION_COLUMNS}, stamp) VALUES ({marks('stamp,' + SESSION_COLUMNS)})"
    " ON CONFLICT (owner, session_id) DO NOTHING RETURNING id"
)
_SET = (
    f"UPDATE sessions SET ({SESSION_COLUMNS}) = ROW ({marks(SESSION_COLUMNS)}), stamp = ${_COUNT + 2}"
    f" WHERE id = ${_COUNT + 1}"
)
_ADD_STATE = "INSERT INTO states (session, number, body) VALUES ($1, $2, $3)"
_ADD_USAGE = "SELECT count_usage($1, $2, $3, $4, $5, $6)"
_LOCK = "SELECT id FROM sessions WHERE owner = $1 AND session_id = $2 FOR UPDATE"
_LOCK_MANY = (
    "SELECT id, owner, session_id FROM sessions WHERE (owner, session_id) IN"
    " (SELECT * FROM unnest($1::bytea[], $2::bytea[])) ORDER BY id FOR UPDATE"
)
_COUNT_OWNED = (
    "SELECT (SELECT count(*) FROM turns WHERE session = ANY ($1)),"
    " (SELECT count(*) FROM checkpoints WHERE session = ANY ($1)),"
    " (SELECT count(*) FROM session_events WHERE session = ANY ($1))"
)
_REMOVE = "SELECT remove_sessions($1)"
_COUNT_OF_USER = (
    "SELECT coalesce(sum(count), 0)::bigint FROM session_counts WHERE owner = $1 AND kind = 'u' AND name = $2"
)
_EXISTS = "SELECT 1 FROM sessions WHERE owner = $1 AND session_id = $2"
_LOCK_USER = "SELECT pg_advisory_xact_lock(hashtextextended(encode($1 || '\\000'::bytea || $2, 'hex'), 0))"
_RUNS = (
    "SELECT 1 FROM leases WHERE owner = $1 AND session_id = $2 AND turn_id IS NOT NULL"
    " AND until > clock_timestamp()"
)


async def create_session(unit: Unit, session: Session) -> None:
    number = ROOT_STATE if session.state else None
    record = new_record(unit.sealer, session, state_number=number, root_state=number, last_state=number or 0)
    record = await add(unit, record)
    if number is not None:
        await add_state(unit, record, number)


async def create_sessions(
    unit: Unit, sessions: Sequence[Session], cap: SessionCap | None
) -> tuple[SessionExists | SessionLimit | None, ...]:
    if cap is not None:
        await lock_users(unit, sessions)
    outcomes: list[SessionExists | SessionLimit | None] = []
    for session in sessions:
        try:
            if cap is not None:
                await make_room(unit, session, cap)
            await create_session(unit, session)
            outcomes.append(None)
        except (SessionExists, SessionLimit) as refusal:
            outcomes.append(refusal)
    return tuple(outcomes)


async def update_session(
    unit: Unit, key: SessionKey, change: SessionChange, now: int, expected_etag: str | None
) -> Session:
    record = await get_by_key(unit, key, lock=True)
    if expected_etag is not None and record.session.etag != expected_etag:
        raise PreconditionFailed(session_id=key.session_id)
    changed = change.apply(record.session, now, unit.life)
    await save(unit, record, changed, state_number=record.state_number)
    return changed


async def touch_session(unit: Unit, key: SessionKey, now: int) -> Session:
    record = await get_by_key(unit, key, lock=True)
    touched = record.session.touched(now, unit.life)
    await save(unit, record, touched, state_number=record.state_number)
    return touched


async def delete_session(unit: Unit, key: SessionKey) -> bool:
    number = await unit.connection.fetchval(_LOCK, *raw_key(key))
    if number is None:
        return False
    await remove(unit, [(number, key)])
    return True


async def delete_sessions(unit: Unit, keys: Sequence[SessionKey]) -> Erased:
    raw = [raw_key(key) for key in keys]
    owners, session_ids = [owner for owner, _ in raw], [session_id for _, session_id in raw]
    rows = await unit.connection.fetch(_LOCK_MANY, owners, session_ids)
    counts = await unit.connection.fetchrow(_COUNT_OWNED, [row[0] for row in rows])
    await remove(unit, [(row[0], SessionKey(row[1].decode(), row[2].decode())) for row in rows])
    return Erased(len(rows), *counts)


async def add(unit: Unit, record: Record) -> Record:
    """Store a new session, and return its record with its number.

    Raises:
        SessionExists: its key is taken.
    """
    number = await unit.connection.fetchval(_ADD, *to_session_row(record), record.stamp)
    if number is None:
        raise SessionExists(session_id=record.session.key.session_id)
    added = record._replace(number=number)
    unit.added += 1
    unit.note(added)
    return added


async def save(
    unit: Unit, record: Record, session: Session, *, state_number: int | None, last_state: int | None = None
) -> None:
    """Store ``session`` in the place of what it was; ``state_number`` is where its state is kept."""
    last = record.last_state if last_state is None else last_state
    saved = record.after_write(unit.sealer, session, state_number, last)
    await unit.connection.execute(_SET, *to_session_row(saved), saved.number, saved.stamp)
    unit.note(saved)


async def remove(unit: Unit, found: Sequence[tuple[int, SessionKey]]) -> None:
    """Remove sessions that are locked, and everything that belongs to them."""
    await unit.connection.execute(_REMOVE, [number for number, _ in found])
    for _, key in found:
        unit.note_gone(key)


async def keep_state(unit: Unit, record: Record) -> tuple[int | None, int]:
    """Keep the session's state unless it is kept; return its number and the last one, for ``save``."""
    if not record.session.state or record.state_number is not None:
        return record.state_number, record.last_state
    number = record.last_state + 1
    await add_state(unit, record, number)
    return number, number


async def add_state(unit: Unit, record: Record, number: int) -> None:
    body = to_state_body(unit.sealer, record.uid, number, record.session.state)
    await unit.connection.execute(_ADD_STATE, record.number, number, body)


async def add_usage(unit: Unit, session: Session, day: int, turns: int, usage: Usage) -> None:
    """Count what was used for a session on its user's account."""
    if session.user_id is not None:
        user = session.key.owner.encode(), session.user_id.encode()
        await unit.connection.execute(
            _ADD_USAGE, *user, day, turns, usage.prompt_tokens, usage.completion_tokens
        )


async def lock_users(unit: Unit, sessions: Sequence[Session]) -> None:
    """Let nobody else make sessions under a cap for these users before this transaction ends."""
    users = {(s.key.owner.encode(), s.user_id.encode()) for s in sessions if s.user_id is not None}
    for user in sorted(users):
        await unit.connection.execute(_LOCK_USER, *user)


async def make_room(unit: Unit, session: Session, cap: SessionCap) -> None:
    """Remove as many victims as are in the way of ``session``; changes nothing if it raises."""
    if session.user_id is None:
        return
    if await unit.connection.fetchval(_EXISTS, *raw_key(session.key)):
        raise SessionExists(session_id=session.key.session_id)
    owner, user_id = session.key.owner, session.user_id
    count: int = await unit.connection.fetchval(_COUNT_OF_USER, owner.encode(), user_id.encode())
    excess = count + 1 - cap.most
    if excess <= 0:
        return
    own = [v for v in cap.victims if (v.user_id, v.key.owner) == (user_id, owner)]
    gone = [found for v in own if (found := await _find_victim(unit, v)) is not None]
    if len(gone) < excess:
        raise SessionLimit(session_id=session.key.session_id)
    await remove(unit, gone[:excess])


async def _find_victim(view: View, victim: Session) -> tuple[int, SessionKey] | None:
    """Return the victim if it is as it was read, and no turn of it runs; nobody changes it from now on."""
    row: Any = await view.connection.fetchrow(LOCK_RECORD, *raw_key(victim.key))
    if row is None or row[2] != to_id_bytes(victim.uid):
        return None
    try:
        record = from_record_row(view.sealer, row)
    except SnapshotUnreadable:
        return None
    is_busy = await view.connection.fetchval(_RUNS, *raw_key(victim.key))
    is_as_read = record.session.last_accessed == victim.last_accessed
    return (record.number, victim.key) if is_as_read and not is_busy else None
