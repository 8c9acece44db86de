"""A whole Redis store, in pieces, out and in."""

from collections import Counter
from dataclasses import replace
from typing import Any

from app.domain.dump import CheckpointDump, RestDump, SessionDump, SharedDump, TurnDump, UsageDump
from app.domain.errors import PreconditionFailed, SnapshotUnreadable
from app.domain.idempotency import Binding
from app.domain.ids import SessionKey
from app.domain.session import Session, SessionStatus
from app.domain.stats import DayUsage
from app.domain.turn import JsonObject, TurnStatus
from app.ports.moving import Resealed
from app.stores import rules
from app.stores.codec import to_body
from app.stores.redis import keys, listing, records, rows, side_rows, sums
from app.stores.redis.database import Database
from app.stores.redis.draft import Draft, bind_words
from app.stores.redis.rows import Record

_SWEPT = "swept_ms"
_PAGE = 500


async def dump_session(db: Database, key: SessionKey) -> SessionDump | None:
    record = await db.find_record(key)
    if record is None:
        return None
    try:
        return await _dump(db, record)
    except SnapshotUnreadable as error:
        raise SnapshotUnreadable(session_id=key.session_id, turn_id=error.turn_id) from error


async def _dump(db: Database, record: Record) -> SessionDump:
    uid = record.uid
    states: dict[int, JsonObject] = {0: {}}
    for number, raw in (await _pairs(db, record, "k")).items():
        states[int(number)] = side_rows.from_state(db.sealer, uid, int(number), raw)
    bindings = await _bindings(db, record)
    turns = []
    for turn_id, raw in sorted((await _pairs(db, record, "t")).items()):
        turn = rows.from_turn(db.sealer, uid, turn_id, raw, record.session.key.session_id)
        state = _state(states, rows.take_apart(uid, turn_id, raw).state) if turn.is_committed else None
        turns.append(TurnDump(replace(turn, binding=bindings.get(turn_id)), state))
    notes = [
        side_rows.from_note(db.sealer, uid, *pair)[0]
        for pair in sorted((await _pairs(db, record, "n")).items())
    ]
    facts = await db.read("ZRANGE", db.room(record.tag, "f"), 0, -1)
    named = [
        side_rows.from_checkpoint(db.sealer, uid, *pair)
        for pair in sorted((await _pairs(db, record, "c")).items())
    ]
    return SessionDump(
        session=record.session,
        root_state=_state(states, record.root_state),
        turns=tuple(turns),
        notes=tuple(notes),
        facts=tuple(side_rows.from_fact(db.sealer, uid, member) for member in facts),
        checkpoints=tuple(CheckpointDump(one, _state(states, number)) for one, number in named),
    )


async def load_session(db: Database, dump: SessionDump, over: Session | None) -> None:
    token = b"" if over is None else await _token_of(db, over)
    record = Record(dump.session, b"")
    draft = Draft(db.sealer, record)
    numbers: dict[bytes, int] = {}

    def keep(state: JsonObject) -> int | None:
        if not state:
            return None
        number = numbers.setdefault(to_body(state), len(numbers) + 1)
        if number > draft.states:
            draft.states = number
            draft.put_state(number, state)
        return number

    draft.root_state = keep(dump.root_state)
    depths: dict[str, int] = {}
    for one in dump.turns:
        turn = one.turn
        if turn.status is TurnStatus.RUNNING:
            turn = rules.interrupted(replace(turn, binding=None), turn.started_at)
        depths[turn.turn_id] = turn.depth
        draft.put_turn(turn, None if one.state is None else keep(one.state))
        if turn.binding is not None:
            draft.do("seize", *bind_words(db.sealer, record.tag, turn))
    for number, note in enumerate(dump.notes, 1):
        draft.put_note(note, depths.get(note.turn_id, 0), number)
    for fact in dump.facts:
        draft.put_fact(fact)
        draft.facts, draft.fact_ms = fact.number, fact.created_at
    for named in dump.checkpoints:
        draft.put_checkpoint(named.checkpoint, keep(named.state))
    draft.state_number = numbers.get(to_body(dump.session.state)) if dump.session.state else None
    (refusal,) = await records.create(db, [draft], replaces=token)
    if refusal is not None:
        raise PreconditionFailed(session_id=dump.session.key.session_id) from refusal


async def _token_of(db: Database, session: Session) -> bytes:
    found = await db.find_record(session.key)
    if found is None or found.session != session:
        raise PreconditionFailed(session_id=session.key.session_id)
    return found.token


async def dump_rest(db: Database) -> RestDump:
    counts, sessions = await sums.read_counts(db), await _count_sessions(db)
    totals = Counter({name: counts[name] - sessions[name] for name in counts | sessions})
    for name in (_SWEPT, *(status.value for status in SessionStatus)):
        totals.pop(name, None)
    shared = []
    for name in await _names(db, "h"):
        scope = keys.of_scope(name)
        shared.append(SharedDump(scope, await records.get_shared(db, scope)))
    usage = []
    for name in await _names(db, "g"):
        owner, user_id = keys.of_user(name)
        days = (await sums.get_usage(db, owner, user_id, 10**6)).days
        usage += [UsageDump(owner, user_id, day) for day in days]
    return RestDump(
        shared=tuple(
            sorted(shared, key=lambda one: (one.scope.app_name, one.scope.owner, one.scope.user_id or ""))
        ),
        usage=tuple(sorted(usage, key=lambda one: (one.owner, one.user_id, one.usage.day))),
        totals=dict(sorted(totals.items())),
    )


async def load_rest(db: Database, rest: RestDump) -> None:
    for letter in "hg":
        for name in await _names(db, letter):
            await db.wire.call("DEL", db.name(f"{letter}:{name}"), writes=True)
    for shared in rest.shared:
        await records.put_shared(db, shared.scope, shared.shared, 0, b"")
    for used in rest.usage:
        await _load_usage(db, keys.user_of(used.owner, used.user_id), used.usage)
    kept = {_SWEPT, *(status.value for status in SessionStatus)}
    gone = (await sums.read_counts(db)).keys() - kept
    totals = Counter(rest.totals) + await _count_sessions(db)
    if gone:
        await db.wire.call("HDEL", db.name("n"), *gone, writes=True)
    for name, value in totals.items():
        await db.wire.call("HSET", db.name("n"), name, value, writes=True)


async def reseal_rest(db: Database) -> Resealed:
    done, broken = 0, 0
    for name in await _names(db, "h"):
        try:
            done += await records.reseal_shared(db, keys.of_scope(name))
        except SnapshotUnreadable:
            broken += 1
    return Resealed(done, broken)


async def _load_usage(db: Database, user: str, usage: DayUsage) -> None:
    took = usage.turns, usage.prompt_tokens, usage.completion_tokens
    for when in ("all", usage.day):
        for kind, value in zip("tpc", took, strict=True):
            await db.wire.call(
                "HINCRBY", db.name(f"g:{user}"), f"{when}:{kind}", value, repeats=False, writes=True
            )


async def _count_sessions(db: Database) -> Counter[str]:
    """Return what the sessions that there are have added to the totals."""
    counts: Counter[str] = Counter()
    last: SessionKey | None = None
    while page := await listing.list_after(db, last, _PAGE):
        last = page[-1]
        for key in page:
            record = await db.find_record(key)
            if record is not None:
                session = record.session
                counts.update(created=1, lifetime_ms=session.last_accessed - session.created_at)
    return counts


async def _bindings(db: Database, record: Record) -> dict[bytes, Binding]:
    found = {}
    prefix = db.name("k:")
    for turn_id, full_name in (await _pairs(db, record, "b")).items():
        name = full_name.decode().removeprefix(prefix)
        sealed = await db.read("HGET", full_name, "f")
        if sealed is not None:
            owner, key = keys.of_user(name)
            fingerprint = side_rows.from_bound(db.sealer, name, record.tag.encode(), turn_id, sealed)
            found[turn_id] = Binding(owner, key, fingerprint)
    return found


async def _pairs(db: Database, record: Record, room: str) -> dict[bytes, Any]:
    found = await db.read("HGETALL", db.room(record.tag, room))
    return dict(zip(found[::2], found[1::2], strict=True))


async def _names(db: Database, letter: str) -> list[str]:
    return sorted([name async for name in db.scan(f"{letter}:")])


def _state(states: dict[int, JsonObject], number: int | None) -> JsonObject:
    try:
        return states[number or 0]
    except KeyError as error:
        raise SnapshotUnreadable from error
