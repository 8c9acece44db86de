"""Lists in Redis: sessions by last activity, a session's turns, and its branch. A page is one round trip."""

import logging
from collections.abc import AsyncIterator
from typing import NamedTuple

from app.domain.errors import KeyTaken, SnapshotUnreadable, TurnNotFound
from app.domain.ids import SessionKey, from_id_bytes, to_id_bytes
from app.domain.session import Session, SessionPage, SessionQuery
from app.domain.turn import BoundTurn, Turn, TurnPage
from app.stores import rules
from app.stores.cursor import from_cursor, to_cursor
from app.stores.memory.listing import fits
from app.stores.redis import rows, side_rows, tree
from app.stores.redis.database import Database
from app.stores.redis.keys import bound_name, index_for, key_of, key_of_member, order_of, tag_of
from app.stores.redis.rows import to_raw_id
from app.stores.redis.turns import to_holder
from app.stores.redis.wire import Word
from app.stores.sealing import Sealer

STEP_SESSIONS = 500
"""How many records a search reads in one round trip."""
LOOK_LIMIT = 5000
"""How many records one page of a search by text looks at: some 25 µs each, in which this process does
nothing else. The page may then be short, or empty, and its cursor goes on behind the last one looked at."""
COUNT_SESSIONS = 20_000
"""Through how many records a total is looked for that no index has."""
_ALL: tuple[Word, Word] = ("", "")

_log = logging.getLogger(__name__)


class _Found(NamedTuple):
    """An entry of an index; ``session`` is ``None`` if there is none, or it is broken."""

    member: bytes
    score: Word
    session: Session | None


async def list_sessions(db: Database, query: SessionQuery) -> SessionPage:
    after = _ALL if query.cursor is None else _session_place(query.cursor)
    index = index_for(query.owner, query.user_id, query.agent_id)
    step = query.limit + 1 if _is_indexed(query) else STEP_SESSIONS
    page: list[_Found] = []
    looked, last, is_cut = 0, None, False
    async for found in _scan(db, index, after, step):
        looked += 1
        if found.session is not None and fits(found.session, query, db.life):
            page.append(found)
            if len(page) > query.limit:
                last = page[query.limit - 1]
                break
        if query.text is not None and looked == LOOK_LIMIT:
            last, is_cut = found, True
            break
    shown = tuple(one.session for one in page[: query.limit] if one.session is not None)
    if query.cursor is None and is_cut:
        total = None  # to count is to look at the same ones again
    elif query.cursor is None and last is None and not _is_indexed(query):
        total = len(shown)
    else:
        total = await _total(db, query, index)
    return SessionPage(shown, total, None if last is None else _cursor_behind(last))


async def list_oldest(db: Database, owner: str, user_id: str, limit: int) -> tuple[Session, ...]:
    _, found = await db.ask("sessions", index_for(owner, user_id, None), *_ALL, limit, 1)
    entries = (_entry(db.sealer, *one) for one in found)
    return tuple(entry.session for entry in entries if entry.session is not None)


async def list_keys(
    db: Database, owner: str | None, user_id: str | None, agent_id: str | None, limit: int
) -> tuple[SessionKey, ...]:
    index = db.name(f"z:{index_for(owner, user_id, agent_id)}")
    if user_id is None or agent_id is None:
        return tuple(map(key_of_member, await db.read("ZRANGE", index, 0, limit - 1)))
    of_user = await db.read("ZRANGE", index, 0, -1)
    of_agent = set(await db.read("ZRANGE", db.name(f"z:{index_for(owner, None, agent_id)}"), 0, -1))
    return tuple(key_of_member(member) for member in of_user if member in of_agent)[:limit]


async def list_after(db: Database, key: SessionKey | None, limit: int) -> tuple[SessionKey, ...]:
    start = b"-" if key is None else b"(" + order_of(key)
    found = await db.read("ZRANGEBYLEX", db.name("order"), start, "+", "LIMIT", 0, limit)
    pairs = (member.decode("utf-8", "surrogatepass").split("\0") for member in found)
    return tuple(SessionKey(owner, session_id) for owner, session_id in pairs)


async def _total(db: Database, query: SessionQuery, index: str) -> int | None:
    if _is_indexed(query):
        return int(await db.read("ZCARD", db.name(f"z:{index}")))
    is_exact, count, read = rules.has_exact_total(query), 0, 0
    most = COUNT_SESSIONS if query.text is None else LOOK_LIMIT
    async for found in _scan(db, index, _ALL, STEP_SESSIONS):
        read += 1
        count += found.session is not None and fits(found.session, query, db.life)
        if not is_exact and (count > rules.TOTAL_LIMIT or read >= most):
            return None
    return count


def _is_indexed(query: SessionQuery) -> bool:
    """Say whether an index has just the sessions that are asked for."""
    return rules.has_exact_total(query) and None in (query.user_id, query.agent_id)


async def _scan(db: Database, index: str, after: tuple[Word, Word], step: int) -> AsyncIterator[_Found]:
    while True:
        _, found = await db.ask("sessions", index, *after, step, 0)
        for one in found:
            yield _entry(db.sealer, *one)
        if len(found) < step:
            return
        after = found[-1][1], found[-1][0]


def _entry(sealer: Sealer, member: bytes, score: bytes, raw: bytes, json: bytes | None) -> _Found:
    if not raw:
        return _Found(member, score, None)  # it went by itself, and the sweep has not been here
    key = key_of_member(member)
    try:
        return _Found(member, score, rows.from_record(sealer, key, raw, json, b"").session)
    except SnapshotUnreadable:
        _log.error("session %r is unreadable and left out of a listing", key.session_id)
        return _Found(member, score, None)


def _cursor_behind(found: _Found) -> str:
    uid, tag = found.member[:16], found.member[16:].decode("utf-8", "surrogatepass")
    return to_cursor("s", int(found.score), f"{from_id_bytes(uid)}/{tag}")


def _session_place(cursor: str) -> tuple[Word, Word]:
    time_ms, tie = from_cursor("s", cursor)
    uid, _, tag = tie.partition("/")
    return time_ms, (to_raw_id(uid) or b"") + tag.encode("utf-8", "surrogatepass")


async def get_turn(db: Database, session: Session, turn_id: str) -> Turn:
    raw_id, raw, on_branch, _ = await _turns_of(db, session, turn_id)
    uid = to_id_bytes(session.uid)
    return rows.from_turn(db.sealer, uid, raw_id, raw, session.key.session_id, on_branch=bool(on_branch))


async def list_turns(db: Database, session: Session, limit: int, cursor: str | None) -> TurnPage:
    after = _ALL if cursor is None else _turn_place(cursor)
    tag, uid = tag_of(session.key), to_id_bytes(session.uid)
    reply = await db.ask("turns", tag, uid, "after", *after, limit + 1, 0)
    if reply is None:
        return TurnPage((), 0, None)
    total, found = reply
    shown = [_shown(db.sealer, one, session) for one in found[:limit]]
    turns = tuple(turn for turn in shown if turn is not None)
    following = None
    if len(found) > limit:
        turn_id, _, _, score = found[limit - 1]
        following = to_cursor("t", int(score), from_id_bytes(turn_id))
    return TurnPage(turns, total, following)


async def list_branch(db: Database, session: Session, limit: int, before: str | None) -> tuple[Turn, ...]:
    session_id, uid, start = session.key.session_id, to_id_bytes(session.uid), b""
    if before is not None:
        turn_id, raw, on_branch, _ = await _turns_of(db, session, before)
        if not on_branch:
            raise TurnNotFound(session_id=session_id, turn_id=before)
        parent = rows.checked(db.sealer, uid, turn_id, raw, session_id).parent
        if parent is None:
            return ()
        start = parent
    path = await tree.walk(db, session, start, limit)
    if path is None:
        return ()
    turns = [rows.from_turn(db.sealer, uid, *step, session_id, on_branch=True) for step in path]
    if len(turns) < limit and (turns[-1].parent if turns else await _has_head(db, session, start)):
        raise SnapshotUnreadable(session_id=session_id)
    return tuple(reversed(turns))


async def find_bound(db: Database, owner: str, key: str) -> BoundTurn | None:
    name = bound_name(owner, key)
    reply = await db.ask("bound", name)
    if reply is None:
        return None
    tag, uid, turn_id, sealed, raw, on_branch, holder = reply
    fingerprint = side_rows.from_bound(db.sealer, name, tag, turn_id, sealed)
    if not raw:
        return None
    session_id = key_of(tag.decode()).session_id
    if holder is not None:
        raise KeyTaken(to_holder(holder), session_id=session_id, turn_id=from_id_bytes(turn_id))
    turn = rows.from_turn(db.sealer, uid, turn_id, raw, session_id, on_branch=bool(on_branch))
    return BoundTurn(session_id, fingerprint, turn) if turn.is_committed else None


async def _turns_of(db: Database, session: Session, turn_id: str) -> tuple[bytes, bytes, int, bytes]:
    raw_id = to_raw_id(turn_id)
    tag, uid = tag_of(session.key), to_id_bytes(session.uid)
    reply = await db.ask("turns", tag, uid, "of", raw_id) if raw_id else None
    if reply is None or not reply[1]:
        raise TurnNotFound(session_id=session.key.session_id, turn_id=turn_id)
    turn: tuple[bytes, bytes, int, bytes] = reply[1][0]
    return turn


async def _has_head(db: Database, session: Session, start: bytes) -> bool:
    if start:
        return True
    record = await db.find_record(session.key, session.uid)
    return record is not None and record.session.head is not None


def _shown(sealer: Sealer, found: tuple[bytes, bytes, int, bytes], session: Session) -> Turn | None:
    turn_id, raw, on_branch, score = found
    uid, session_id = to_id_bytes(session.uid), session.key.session_id
    return rows.show_turn(sealer, uid, turn_id, raw, int(score), session_id, on_branch=bool(on_branch))


def _turn_place(cursor: str) -> tuple[Word, Word]:
    time_ms, tie = from_cursor("t", cursor)
    return time_ms, to_raw_id(tie) or b""
