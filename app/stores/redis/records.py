"""Session records in Redis: made, changed, removed."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from app.domain.branch import HeadTarget
from app.domain.erasure import Erased
from app.domain.errors import PreconditionFailed, SessionExists, SessionLimit
from app.domain.ids import SessionKey
from app.domain.journal import Fact, StateChanged
from app.domain.session import Session, SessionCap, SessionChange
from app.domain.state import SharedState, StateScope
from app.domain.turn import JsonObject
from app.stores import rules
from app.stores.redis import keys, rows, side_rows, tree
from app.stores.redis.database import Database, new_token
from app.stores.redis.draft import Draft, create_words, new_draft
from app.stores.redis.rows import Record
from app.stores.redis.wire import Word

_EXISTS, _LIMIT = 1, 2

Refusal = SessionExists | SessionLimit | None


async def create(
    db: Database, drafts: Sequence[Draft], cap: SessionCap | None = None, *, replaces: bytes | None = None
) -> tuple[Refusal, ...]:
    """Store new sessions in one step; return for each why it was refused.

    ``replaces``: in the place of what is there, if that has this token, or whatever it has if it is empty.
    """
    records = [draft.to_record(new_token()) for draft in drafts]
    victims = cap.victims if cap is not None else ()
    how = 0 if replaces is None else replaces or 1
    words: list[Word] = [how, len(drafts), cap.most if cap is not None else 0, len(victims)]
    for victim in victims:
        words += (keys.tag_of(victim.key), keys.member_of(victim), victim.last_accessed)
    for draft, record in zip(drafts, records, strict=True):
        words += create_words(draft, record, db.life, is_capped=cap is not None)
    db.session_count, outcomes = await db.tell("create", *words)
    for victim in victims:
        db.seen.drop(victim.key)
    refusals: list[Refusal] = []
    for record, outcome in zip(records, outcomes, strict=True):
        session_id = record.session.key.session_id
        if outcome == 0:
            db.seen.put(record)
        is_taken, is_over = outcome == _EXISTS, outcome == _LIMIT
        refusals.append(
            SessionExists(session_id=session_id) if is_taken
            else SessionLimit(session_id=session_id) if is_over else None
        )  # fmt: skip
    return tuple(refusals)


async def fork_session(
    db: Database, origin: Session, target: HeadTarget | None, new: Session, cap: SessionCap | None
) -> Session:
    """Copy the path with what hangs on it, all of it sealed anew with the fork's uid."""
    record = await db.get_record(origin)
    place, state_number = await tree.spot_of(db, record, target)
    at = replace(record.session, head=place.head, depth=place.depth)
    path = await tree.read_whole(db, at, None, 0)
    fork = new_draft(db.sealer, rules.after_fork(new, place), fork_of=record)
    fork.state_number = state_number
    uid = fork.was.uid
    numbers = {row.state for row in path} | {state_number, record.root_state}
    for number in sorted(number for number in numbers if number):
        fork.put_state(number, await tree.get_state(db, record, number))
    for row in path:
        fork.do("HSET", "t", row.turn_id, rows.to_turn_of(db.sealer, uid, row, origin.key.session_id))
        fork.do("ZADD", "i", row.started_at, row.turn_id)
    ids = {row.turn_id for row in path}
    for noted in await tree.list_noted(db, record.tag):
        if noted.turn_id in ids:
            note, _ = await tree.read_note(db, record.session, noted.note_id)
            fork.put_note(note, noted.depth, noted.number)
    (refusal,) = await create(db, [fork], cap)
    if refusal is not None:
        raise refusal
    return fork.session


async def update_session(
    db: Database, key: SessionKey, change: SessionChange, now: int, expected_etag: str | None
) -> Session:
    def decide(draft: Draft) -> None:
        if expected_etag is not None and draft.session.etag != expected_etag:
            raise PreconditionFailed(session_id=key.session_id)
        draft.save(change.apply(draft.session, now, db.life), now)

    return await edit(db, key, decide)


async def touch_session(db: Database, key: SessionKey, now: int) -> Session:
    return await edit(db, key, lambda draft: draft.save(draft.session.touched(now, db.life), now))


async def patch_state(
    db: Database, key: SessionKey, patch: JsonObject, now: int, expected_rev: int | None
) -> Session:
    def decide(draft: Draft) -> None:
        if expected_rev is not None and draft.session.state_rev != expected_rev:
            raise PreconditionFailed(session_id=key.session_id)
        at = rules.fact_time(draft.session, now)
        draft.save(rules.after_patch(draft.session, patch, at), at)
        draft.state_number = None
        draft.log(StateChanged(patch), at, db.life)

    return await edit(db, key, decide)


async def move_head(db: Database, session: Session, target: HeadTarget, now: int) -> Session:
    async def attempt(record: Record) -> Draft:
        rules.check_unmoved(record.session, session)
        at = rules.fact_time(record.session, now)
        place, state_number = await tree.spot_of(db, record, target)
        draft = Draft(db.sealer, record)
        fact: Fact = rules.head_changed(record.session, target, place)
        draft.save(rules.after_move(record.session, place, at, db.life), at)
        draft.state_number = state_number
        draft.log(fact, at, db.life)
        return draft

    return await rewrite(db, session.key, lambda: db.get_record(session), attempt)


async def edit(db: Database, key: SessionKey, decide: Callable[[Draft], None]) -> Session:
    """Read the record, let ``decide`` change it or raise, and write it; return the session then."""

    async def attempt(record: Record) -> Draft:
        draft = Draft(db.sealer, record)
        decide(draft)
        return draft

    return await rewrite(db, key, lambda: db.get_by_key(key), attempt)


async def rewrite(
    db: Database,
    key: SessionKey,
    read: Callable[[], Awaitable[Record]],
    attempt: Callable[[Record], Awaitable[Draft | None]],
) -> Session:
    """Write what ``attempt`` makes of the record that ``read`` reads; ``None``: there is nothing to do.

    Returns the session as it is then.
    """
    result: list[Session] = []

    async def once(record: Record) -> bool:
        draft = await attempt(record)
        if draft is None:
            result.append(record.session)
            return True
        repeated = db.wire.repeated
        written = await db.write(draft)
        if written is None:
            db.check_heard(repeated)
            return False
        result.append(written[0].session)
        return True

    async with db.alone(key):
        await db.change(read, once)
    return result[0]


async def remove(db: Database, sessions: Sequence[SessionKey]) -> Erased:
    """Remove sessions with all that belongs to them; return what was there."""
    if not sessions:
        return Erased()
    words = [keys.tag_of(key) for key in dict.fromkeys(sessions)]
    db.session_count, *gone = await db.tell("remove", *words, repeats=False)
    for key in sessions:
        db.seen.drop(key)
    return Erased(*gone)


async def get_shared(db: Database, scope: StateScope) -> SharedState:
    return (await _read_shared(db, scope))[0]


async def patch_shared(
    db: Database, scope: StateScope, patch: JsonObject, now: int, expected_rev: int | None
) -> SharedState:
    result: list[SharedState] = []

    async def once(found: tuple[SharedState, bytes]) -> bool:
        shared, token = found
        if expected_rev is not None and shared.rev != expected_rev:
            raise PreconditionFailed
        patched = shared.patched(patch)
        result.append(patched)
        repeated = db.wire.repeated
        if await put_shared(db, scope, patched, now, token):
            return True
        db.check_heard(repeated)
        return False

    async with db.alone(scope):
        await db.change(lambda: _read_shared(db, scope), once)
    return result[-1]


async def reseal_shared(db: Database, scope: StateScope) -> bool:
    """Write a state of a user or an application as it is; say whether there is one."""
    found: list[bool] = []

    async def once(read: tuple[SharedState, bytes]) -> bool:
        shared, token = read
        found.append(token != b"")
        return not token or await put_shared(db, scope, shared, 0, token)

    await db.change(lambda: _read_shared(db, scope), once)
    return found[-1]


async def put_shared(db: Database, scope: StateScope, shared: SharedState, now: int, token: bytes) -> bool:
    """Write a shared state unless somebody has since ``token`` was read; say whether."""
    name = keys.scope_name(scope)
    value = side_rows.to_shared(db.sealer, name, shared, now)
    return bool(await db.tell("shared", name, token, new_token(), value))


async def _read_shared(db: Database, scope: StateScope) -> tuple[SharedState, bytes]:
    name = keys.scope_name(scope)
    value, token = await db.read("HMGET", db.name(f"h:{name}"), "v", "w")
    if token is None:
        return SharedState(), b""
    return side_rows.from_shared(db.sealer, name, value), token
