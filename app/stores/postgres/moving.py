"""A store's whole content, session by session, out of PostgreSQL and into it."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import asyncpg

from app.domain.checkpoint import Checkpoint
from app.domain.dump import CheckpointDump, RestDump, SessionDump, SharedDump, TurnDump, UsageDump
from app.domain.errors import PreconditionFailed, SessionNotFound, SnapshotUnreadable
from app.domain.ids import SessionKey, to_id_bytes
from app.domain.journal import LoggedFact
from app.domain.session import Session
from app.domain.state import StateScope
from app.domain.stats import DayUsage
from app.domain.turn import JsonObject, Turn, TurnStatus
from app.ports.moving import Resealed
from app.stores import rules
from app.stores.buckets import PREFIX
from app.stores.codec import to_body, to_turn_body
from app.stores.postgres import branches, checkpoints, journal, listing, notes, records, states, turns
from app.stores.postgres.link import Link
from app.stores.postgres.refusal import unavailable
from app.stores.postgres.rows import (
    TURN_COLUMNS,
    Record,
    from_turn_row,
    is_committed,
    new_record,
    to_turn_row,
)
from app.stores.postgres.tree import get_by_key, get_state, raw_key
from app.stores.postgres.unit import Unit, View
from app.stores.side_rows import (
    CHECKPOINT_COLUMNS,
    FACT_COLUMNS,
    from_checkpoint_row,
    from_fact_row,
    from_shared_row,
    to_fact_row,
    to_shared_body,
    to_state_body,
)

_LIST_AFTER = (
    "SELECT owner, session_id FROM sessions WHERE (owner, session_id) > ($1, $2)"
    " ORDER BY owner, session_id LIMIT $3"
)
_LIST_FIRST = "SELECT owner, session_id FROM sessions ORDER BY owner, session_id LIMIT $1"
_TURNS = f"SELECT {TURN_COLUMNS} FROM turns WHERE session = $1 ORDER BY turn_id"
_KEYS = (
    "SELECT owner, key, session, turn_id, fingerprint, created_at, seal FROM idempotency_keys"
    " WHERE session = $1"
)
_FACTS = f"SELECT {FACT_COLUMNS} FROM session_events WHERE session = $1 ORDER BY number"
_CHECKPOINTS = f"SELECT {CHECKPOINT_COLUMNS} FROM checkpoints WHERE session = $1 ORDER BY checkpoint_id"
_SHARED = (
    "SELECT app_name, owner, user_id, rev, updated_at, body FROM shared_state"
    " ORDER BY app_name, owner, user_id"
)
_USAGE = (
    "SELECT owner, user_id, day, sum(turns)::bigint, sum(prompt_tokens)::bigint,"
    " sum(completion_tokens)::bigint FROM usage_days WHERE day >= 0"
    " GROUP BY owner, user_id, day ORDER BY owner, user_id, day"
)
_LIVED = "SELECT count(*), coalesce(sum(last_accessed - created_at), 0)::bigint FROM sessions"
_ADD_KEY = (
    "INSERT INTO idempotency_keys (owner, key, fingerprint, session, turn_id, created_at, seal)"
    " VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (owner, key) DO UPDATE SET"
    " fingerprint = excluded.fingerprint, session = excluded.session, turn_id = excluded.turn_id,"
    " created_at = excluded.created_at, seal = excluded.seal"
)
_ADD_TIME = "INSERT INTO response_times (shard, bucket, count) VALUES (0, $1, $2)"
_OF_ALL_TIME = (
    "created", "lifetime_ms", "turns", "turns_failed", "turns_finished", "prompt_tokens", "completion_tokens",
    "response_ms",
)  # fmt: skip
_UNCOUNT = (
    "UPDATE counters SET created = created - 1, lifetime_ms = lifetime_ms - s.last_accessed + s.created_at"
    " FROM sessions AS s WHERE shard = 0 AND s.owner = $1 AND s.session_id = $2"
)
_FIND_LEASE = (
    "SELECT nonce, turn_id, boot_id, url, until, is_awaited FROM leases WHERE owner = $1 AND session_id = $2"
)
# Of what is not there the removal has taken none.
_KEEP_LEASE = "INSERT INTO leases VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT DO NOTHING"
_CLEAR_TOTALS = f"UPDATE counters SET {', '.join(f'{name} = 0' for name in _OF_ALL_TIME)}"
_SEALED = "sessions, turns, states, notes, checkpoints, session_events, shared_state, idempotency_keys"
_SCRUB = f"VACUUM (FULL) {_SEALED}"
_SET_TOTALS = "UPDATE counters SET {names} WHERE shard = 0"


async def list_after(view: View, key: SessionKey | None, limit: int) -> tuple[SessionKey, ...]:
    if key is None:
        rows = await view.connection.fetch(_LIST_FIRST, limit)
    else:
        rows = await view.connection.fetch(_LIST_AFTER, *raw_key(key), limit)
    return tuple(SessionKey(row[0].decode(), row[1].decode()) for row in rows)


async def dump_session(view: View, key: SessionKey) -> SessionDump | None:
    try:
        record = await get_by_key(view, key)
    except SessionNotFound:
        return None
    known = _States(view, record)
    found: list[Any] = await view.connection.fetch(_CHECKPOINTS, record.number)
    facts = await view.connection.fetch(_FACTS, record.number)
    noted = await notes.list_notes(view, record)
    try:
        return SessionDump(
            session=record.session,
            root_state=await known.get(record.root_state),
            turns=tuple(await _turns_of(view, record, known)),
            notes=tuple(sorted((one.note for one in noted), key=lambda note: note.note_id)),
            facts=tuple(from_fact_row(view.sealer, record.uid, row) for row in facts),
            checkpoints=tuple(
                [
                    CheckpointDump(from_checkpoint_row(view.sealer, record.uid, row), await known.get(row[2]))
                    for row in found
                ]
            ),
        )
    except SnapshotUnreadable as error:
        raise SnapshotUnreadable(session_id=key.session_id) from error


async def load_session(unit: Unit, dump: SessionDump, over: Session | None) -> None:
    """Store what a dump holds in the place of what is there."""
    if over is not None:
        await _check_is(unit, over)
    raw = raw_key(dump.session.key)
    await unit.connection.execute(_UNCOUNT, *raw)
    lease: Any = await unit.connection.fetchrow(_FIND_LEASE, *raw)
    await records.delete_session(unit, dump.session.key)
    if lease is not None:
        await unit.connection.execute(_KEEP_LEASE, *raw, *lease)
    numbers = _Numbers()
    root = numbers.of(dump.root_state)
    states_of = {one.turn.turn_id: numbers.of(one.state) for one in dump.turns}
    named = [(one.checkpoint, numbers.of(one.state)) for one in dump.checkpoints]
    here = numbers.of(dump.session.state)
    record = await records.add(
        unit,
        new_record(unit.sealer, dump.session, state_number=here, root_state=root, last_state=numbers.last),
    )
    await unit.connection.executemany(
        branches.ADD_STATE,
        [
            (record.number, number, to_state_body(unit.sealer, record.uid, number, state))
            for number, state in numbers.states
        ],
    )
    for one in dump.turns:
        await _load_turn(unit, record, one.turn, states_of[one.turn.turn_id])
    await _load_beside(unit, record, dump, named)


async def _check_is(unit: Unit, session: Session) -> None:
    try:
        there = (await get_by_key(unit, session.key, lock=True)).session
    except SessionNotFound:
        there = None
    if there != session:
        raise PreconditionFailed(session_id=session.key.session_id)


async def dump_rest(view: View) -> RestDump:
    shared = []
    for app_name, owner, user_id, *row in await view.connection.fetch(_SHARED):
        scope = StateScope(app_name.decode(), owner.decode(), user_id.decode() or None)
        shared.append(SharedDump(scope, from_shared_row(view.sealer, scope, row)))
    usage = [
        UsageDump(row[0].decode(), row[1].decode(), DayUsage(*row[2:]))
        for row in await view.connection.fetch(_USAGE)
    ]
    counts = await listing.get_totals(view)
    there, lived = await view.connection.fetchrow(_LIVED)
    totals = {name: counts[name] for name in _OF_ALL_TIME}
    totals["created"] -= there
    totals["lifetime_ms"] -= lived
    totals |= {name: count for name, count in sorted(counts.items()) if name.startswith(PREFIX)}
    return RestDump(tuple(shared), tuple(usage), totals)


async def load_rest(unit: Unit, rest: RestDump) -> None:
    await unit.connection.execute("DELETE FROM shared_state")
    for one in rest.shared:
        body = to_shared_body(unit.sealer, one.scope, one.shared, 0)
        await unit.connection.execute(states.SET, *states.to_scope_row(one.scope), one.shared.rev, 0, body)
    await unit.connection.execute("DELETE FROM usage_days")
    for used in rest.usage:
        user, spent = (used.owner.encode(), used.user_id.encode()), used.usage
        await unit.connection.execute(
            "SELECT count_usage($1, $2, $3, $4, $5, $6)",
            *user, spent.day, spent.turns, spent.prompt_tokens, spent.completion_tokens,
        )  # fmt: skip
    there, lived = await unit.connection.fetchrow(_LIVED)
    totals = {name: rest.totals.get(name, 0) for name in _OF_ALL_TIME}
    totals["created"] += there
    totals["lifetime_ms"] += lived
    await unit.connection.execute(_CLEAR_TOTALS)
    names = ", ".join(f"{name} = ${place}" for place, name in enumerate(totals, 1))
    await unit.connection.execute(_SET_TOTALS.format(names=names), *totals.values())
    await unit.connection.execute("DELETE FROM response_times")
    times = {name: count for name, count in rest.totals.items() if name.startswith(PREFIX)}
    await unit.connection.executemany(
        _ADD_TIME, [(int(name.removeprefix(PREFIX)), count) for name, count in times.items()]
    )


async def reseal_rest(unit: Unit) -> Resealed:
    broken, rows = 0, await unit.connection.fetch(f"{_SHARED} FOR UPDATE")
    for *raw_scope, rev, updated_at, body in rows:
        app_name, owner, user_id = (raw.decode() for raw in raw_scope)
        scope = StateScope(app_name, owner, user_id or None)
        try:
            shared = from_shared_row(unit.sealer, scope, (rev, updated_at, body))
        except SnapshotUnreadable:
            broken += 1
            continue
        body = to_shared_body(unit.sealer, scope, shared, updated_at)
        await unit.connection.execute(states.SET, *raw_scope, rev, updated_at, body)
    return Resealed(len(rows) - broken, broken)


async def scrub(link: Link) -> None:
    """Write the tables with content anew; what the write-ahead log still holds goes with its files.

    Raises:
        StoreUnavailable
    """
    try:
        connection = await link.connect_alone()
        try:
            await connection.execute(_SCRUB)
        finally:
            connection.terminate()
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise unavailable(error) from error


class _States:
    """The states of a session that is dumped, each read once."""

    def __init__(self, view: View, record: Record) -> None:
        self._view = view
        self._record = record
        self._known: dict[int | None, JsonObject] = {}

    async def get(self, number: int | None) -> JsonObject:
        if number not in self._known:
            self._known[number] = await get_state(self._view, self._record, number)
        return self._known[number]


class _Numbers:
    """Numbers for the states of a session that is loaded: one that follows its equal shares its number."""

    def __init__(self) -> None:
        self.states: list[tuple[int, JsonObject]] = []

    @property
    def last(self) -> int:
        return len(self.states)

    def of(self, state: JsonObject | None) -> int | None:
        if not state:
            return None
        body = to_body(state)
        for number, known in reversed(self.states[-8:]):
            if to_body(known) == body:
                return number
        self.states.append((len(self.states) + 1, state))
        return len(self.states)


async def _turns_of(view: View, record: Record, known: _States) -> list[TurnDump]:
    session_id, dumped = record.session.key.session_id, []
    keys = {}
    found = await view.connection.fetch(_KEYS, record.number)
    for owner, key, *row in found:
        keys[row[1]] = turns.from_key_row(view.sealer, owner.decode(), key.decode(), row)
    for row in await view.connection.fetch(_TURNS, record.number):
        turn = replace(from_turn_row(view.sealer, record.uid, row, session_id), binding=keys.get(row[0]))
        state = await known.get(row[11]) if is_committed(row[3], row[4]) else None
        dumped.append(TurnDump(turn, state))
    return dumped


async def _load_turn(unit: Unit, record: Record, turn: Turn, state: int | None) -> None:
    ended = rules.interrupted(turn, turn.started_at) if turn.status is TurnStatus.RUNNING else turn
    row = to_turn_row(unit.sealer, record.uid, ended, to_turn_body(ended), state)
    await unit.connection.execute(branches.ADD_TURN, record.number, *row)
    bound = ended.binding
    if bound is not None and ended.is_committed:
        turn_id, at = to_id_bytes(ended.turn_id), ended.started_at
        *bound_row, sealed = turns.to_key_row(unit.sealer, bound, record.number, ended)
        await unit.connection.execute(_ADD_KEY, *bound_row, record.number, turn_id, at, sealed)


async def _load_beside(
    unit: Unit, record: Record, dump: SessionDump, named: Iterable[tuple[Checkpoint, int | None]]
) -> None:
    depths = {one.turn.turn_id: one.turn.depth for one in dump.turns}
    noted = [notes.Noted(note, depths.get(note.turn_id, 0), 0) for note in dump.notes]
    await notes.copy_notes(unit, record, noted)
    facts: list[LoggedFact] = list(dump.facts)
    await unit.connection.executemany(
        journal.ADD, [(record.number, *to_fact_row(unit.sealer, record.uid, fact)) for fact in facts]
    )
    for checkpoint, number in named:
        await checkpoints.add(unit, record, checkpoint, number)
