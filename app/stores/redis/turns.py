"""Turns in Redis: begun in one round trip with their lease, and ended in one.

The usual turn finds the record as this process has seen it last, so nothing is read. If it has
changed, the server says so, and the turn is made up anew from what is there.
"""

import logging
from dataclasses import replace
from typing import Any

from app.domain.checkpoint import AutoCheckpoint
from app.domain.errors import HeadMoved, KeyTaken, LeasedElsewhere, SessionNotFound, StoreUnavailable
from app.domain.ids import from_id_bytes, to_id_bytes
from app.domain.lease import Holder, Node
from app.domain.session import Session
from app.domain.turn import Turn, TurnStatus
from app.stores import rules
from app.stores.redis import rows, tree
from app.stores.redis.database import TRIES, Database, new_token
from app.stores.redis.draft import Draft, activity_words, bind_words, user_name
from app.stores.redis.keys import key_of, tag_of
from app.stores.redis.rows import Record, TurnRow
from app.stores.redis.wire import Word

_OLD = b"-"
"""A token that no record has."""

_log = logging.getLogger(__name__)


async def start_turn(db: Database, session: Session, turn: Turn) -> Session | None:
    record = db.seen.find(session.key)
    if record is None or _version(record.session) != _version(session):
        record = await db.get_record(session)
    reply = await _start(db, record, session, turn)
    if reply is None:
        return None
    try:
        return await _start_anew(db, session, turn, reply)
    except Exception as error:
        await _undo_start(db, session, turn, error)
        raise


async def _start_anew(db: Database, session: Session, turn: Turn, moved: list[Any]) -> Session | None:
    """Begin with the record as the server has just told it; the lease is taken already."""
    for _ in range(TRIES):
        record = rows.from_record(db.sealer, session.key, moved[2], moved[3], moved[1])
        db.seen.put(record)
        if _version(record.session) != _version(session):
            return record.session
        reply = await _start(db, record, session, turn)
        if reply is None:
            return None
        moved = reply
    raise StoreUnavailable("Too many write here at once.")


async def _start(db: Database, record: Record, session: Session, turn: Turn) -> list[Any] | None:
    """Begin if ``record`` is still the session's; else return what is, with the lease taken."""
    is_known = _version(record.session) == _version(session)
    touched, words = _start_words(db, record, turn, is_known=is_known)
    reply: list[Any] = await db.tell("start", *words)
    match reply[0]:
        case b"ok":
            if reply[1] == touched.token:
                db.seen.put(touched)
            return None
        case b"moved":
            return reply
    db.seen.drop(session.key)
    raise _refusal(reply, session, turn)


async def _undo_start(db: Database, session: Session, turn: Turn, error: Exception) -> None:
    """Give the lease back under which a turn did not begin.

    Raises:
        StoreUnavailable: that is in doubt, too, so the lease may be held, and the turn noted.
    """
    try:
        await give_back(db, session, turn)
    except StoreUnavailable:
        raise StoreUnavailable("Whether a turn began is not known.", outcome_unknown=True) from error


def to_holder(raw: list[bytes]) -> Holder:
    """Return who has a lease, as the scripts say it."""
    nonce, boot_id, url, is_turn = (word.decode() for word in raw)
    return Holder(Node(boot_id, url or None), nonce, is_turn == "1")


def _start_words(db: Database, record: Record, turn: Turn, *, is_known: bool) -> tuple[Record, list[Word]]:
    """Return the record as it is once the turn runs, and what ``start.lua`` wants."""
    draft = Draft(db.sealer, record)
    draft.save(record.session.touched(turn.started_at, db.life), turn.started_at)
    touched = draft.to_record(new_token())
    lost = rules.interrupted(turn, turn.started_at)
    bound: tuple[Word, ...] = to_id_bytes(turn.turn_id), "", b""
    if turn.binding is not None:
        bound = bind_words(db.sealer, record.tag, turn)
    turn_id, name, sealed = bound
    words: list[Word] = [
        record.tag, record.uid, record.token if is_known else _OLD, touched.token, turn_id, turn.turn_id,
        db.node.boot_id, db.node.url or "", db.lease_ms, rows.to_record(db.sealer, touched),
        *activity_words(touched.session, draft.now, db.life),
        touched.session.last_accessed - record.session.last_accessed,
        rows.to_turn(db.sealer, record.uid, turn, None), rows.to_turn(db.sealer, record.uid, lost, None),
        turn.started_at, user_name(record.session), rules.day_of(lost), name, sealed,
    ]  # fmt: skip
    return touched, words


def _refusal(reply: list[Any], session: Session, turn: Turn) -> Exception:
    session_id = session.key.session_id
    match reply[0]:
        case b"gone":
            return SessionNotFound(session_id=session_id)
        case b"taken":
            return LeasedElsewhere(to_holder(reply[1]), session_id=session_id)
        case b"key" if len(reply) == 3:
            return KeyTaken(None, turn_id=from_id_bytes(reply[2]))
        case b"key":
            other = key_of(reply[1].decode()).session_id
            return KeyTaken(to_holder(reply[3]), session_id=other, turn_id=from_id_bytes(reply[2]))
    return HeadMoved(session_id=session_id, turn_id=turn.turn_id)


async def commit_turn(
    db: Database, session: Session, turn: Turn, resets_state: bool, checkpoint: AutoCheckpoint | None
) -> Session:
    rules.check_committed(turn)
    seen = db.seen.find(session.key)
    is_usual = turn.parent == session.head and not resets_state
    if seen is not None and (seen.session.uid, seen.session.head) == (session.uid, session.head) and is_usual:
        committed = await _commit(db, seen, session, turn, resets_state, checkpoint)
        if committed is not None:
            return committed
    for _ in range(TRIES):
        record, known = await _read(db, session, turn)
        if record is None:
            raise SessionNotFound(session_id=session.key.session_id)
        if known is not None and known.is_committed:
            await give_back(db, session, turn)
            return record.session
        if known is not None and known.status is not TurnStatus.RUNNING:
            await give_back(db, session, turn)
            raise HeadMoved(session_id=session.key.session_id, turn_id=turn.turn_id)
        committed = await _commit(db, record, session, turn, resets_state, checkpoint)
        if committed is not None:
            return committed
    raise StoreUnavailable("Too many write here at once.")


async def record_turn(db: Database, session: Session, turn: Turn) -> None:
    rules.check_dropped(turn)
    record = db.seen.find(session.key)
    if record is None or record.session.uid != session.uid:
        record, _ = await _read(db, session, turn)
    for _ in range(TRIES):
        if record is None or await _record(db, record, turn):
            return
        record, known = await _read(db, session, turn)
        if known is not None and known.status is not TurnStatus.RUNNING:
            await give_back(db, session, turn)
            return
    raise StoreUnavailable("Too many write here at once.")


async def give_back(db: Database, session: Session, turn: Turn) -> None:
    await db.tell("giveback", tag_of(session.key), turn.turn_id)


async def _commit(
    db: Database,
    record: Record,
    session: Session,
    turn: Turn,
    resets_state: bool,
    checkpoint: AutoCheckpoint | None,
) -> Session | None:
    rules.check_unmoved(record.session, session, turn.turn_id)
    draft = Draft(db.sealer, record)
    spot = await _parent_of(db, draft, turn, resets_state)
    rules.check_depth(turn, spot.place)
    moved = rules.after_commit(record.session, turn, db.life)
    if turn.parent != session.head:
        moved = replace(moved, note=spot.place.note)
    if resets_state:
        moved = moved.with_state(spot.place.state, by_turn=True)
    draft.state_number = spot.state_number
    draft.end_turn(turn, spot.state_number)
    draft.save(moved, rules.end_of(turn))
    if checkpoint is not None:
        draft.put_automatic(checkpoint, turn, spot.state_number)
    written = await db.write(draft, turn=to_id_bytes(turn.turn_id), nonce=turn.turn_id)
    if written is None:
        return None
    if written[1]:
        _log.error("the idempotency key of turn %s belongs to another committed turn", turn.turn_id)
    return written[0].session


async def _parent_of(db: Database, draft: Draft, turn: Turn, resets_state: bool) -> tree.Spot:
    """Return where ``turn`` goes on from, with the state that it leaves there, and that one's number."""
    session = draft.session
    # The usual turn goes on from the head, of which all is known.
    if turn.parent == session.head and not resets_state:
        place = rules.Place(session.head, session.depth, session.note, session.state)
        return tree.Spot(place, draft.keep_state())
    spot = await tree.spot_at(db, draft.was, turn.parent)
    if resets_state:
        return spot
    return tree.Spot(spot.place._replace(state=session.state), draft.keep_state())


async def _record(db: Database, record: Record, turn: Turn) -> bool:
    draft = Draft(db.sealer, record)
    draft.end_turn(turn, None)
    now = rules.end_of(turn)
    draft.save(record.session.touched(now, db.life), now)
    try:
        written = await db.write(draft, turn=to_id_bytes(turn.turn_id), nonce=turn.turn_id)
    except SessionNotFound:
        return True
    return written is not None


async def _read(db: Database, session: Session, turn: Turn) -> tuple[Record | None, TurnRow | None]:
    turn_id = to_id_bytes(turn.turn_id)
    # The turn first: a record that is read with a committed turn has it.
    raw = await db.read("HGET", db.room(tag_of(session.key), "t"), turn_id)
    record = await db.find_record(session.key, session.uid)
    return record, rows.take_apart(record.uid, turn_id, raw) if raw and record is not None else None


def _version(session: Session) -> tuple[object, ...]:
    return session.uid, session.head, session.note, session.rev, session.state_rev
