"""What hangs on a session beside its turns, in Redis: checkpoints, notes, and its story."""

import heapq
import logging
from collections.abc import AsyncIterator
from dataclasses import replace

from app.domain.checkpoint import Checkpoint, CheckpointPage
from app.domain.compaction import Note
from app.domain.errors import CheckpointNotFound, SnapshotUnreadable
from app.domain.ids import to_id_bytes
from app.domain.journal import LAST, Compacted, Entry, LoggedFact, Position, position_of
from app.domain.session import Session
from app.domain.turn import Turn, Usage
from app.stores import rules
from app.stores.cursor import from_cursor, to_cursor
from app.stores.redis import records, rows, side_rows, tree
from app.stores.redis.database import Database
from app.stores.redis.draft import Draft
from app.stores.redis.keys import tag_of
from app.stores.redis.rows import LATEST_MS, Record, to_raw_id
from app.stores.redis.wire import Word
from app.stores.sealing import Sealer

_MOST = 10**16
"""No number of a fact is as high: ``tie_of`` writes sixteen digits."""

_log = logging.getLogger(__name__)


async def add_checkpoint(db: Database, session: Session, checkpoint: Checkpoint) -> Checkpoint:
    result: list[Checkpoint] = []

    async def attempt(record: Record) -> Draft | None:
        raw_id = to_id_bytes(checkpoint.checkpoint_id)
        known, named = await tree.both(
            db, ("HGET", db.room(record.tag, "c"), raw_id), ("ZCARD", db.room(record.tag, "d"))
        )
        if known is not None:
            result.append(side_rows.from_checkpoint(db.sealer, record.uid, raw_id, known)[0])
            return None
        if not checkpoint.automatic:
            rules.check_named(named - await db.read("ZCARD", db.room(record.tag, "a")))
        draft = Draft(db.sealer, record)
        result.append(replace(checkpoint, turn_id=record.session.head))
        draft.put_checkpoint(result[-1], draft.keep_state())
        draft.save(record.session, checkpoint.created_at)
        return draft

    await records.rewrite(db, session.key, lambda: db.get_record(session), attempt)
    return result[-1]


async def list_checkpoints(db: Database, session: Session, limit: int, cursor: str | None) -> CheckpointPage:
    after: tuple[Word, Word] = ("", "")
    if cursor is not None:
        time_ms, tie = from_cursor("c", cursor)
        after = time_ms, to_raw_id(tie) or b""
    uid, total = to_id_bytes(session.uid), 0
    found: list[Checkpoint] = []
    while len(found) <= limit:
        most = limit + 1 - len(found)
        reply = await db.ask("page", tag_of(session.key), uid, "d", *after, most, 0, "c")
        if reply is None:
            return CheckpointPage((), 0, None)
        total, listed, bodies = reply
        found += _readable(db.sealer, session, listed[::2], bodies)
        if len(bodies) < most:
            break
        # Behind what was listed, not what was readable: else a broken one at the end is listed for ever.
        after = listed[-1], listed[-2]
    page = tuple(found[:limit])
    following = to_cursor("c", page[-1].created_at, page[-1].checkpoint_id) if len(found) > limit else None
    return CheckpointPage(page, total, following)


async def get_checkpoint(db: Database, session: Session, checkpoint_id: str) -> Checkpoint:
    raw_id, tag = to_raw_id(checkpoint_id), tag_of(session.key)
    if raw_id is not None:
        raw, uid = await tree.both(db, ("HGET", db.room(tag, "c"), raw_id), ("HGET", db.room(tag, "s"), "u"))
        if raw is not None and uid == to_id_bytes(session.uid):
            try:
                return side_rows.from_checkpoint(db.sealer, uid, raw_id, raw)[0]
            except SnapshotUnreadable as error:
                raise SnapshotUnreadable(session_id=session.key.session_id) from error
    raise CheckpointNotFound(session_id=session.key.session_id)


async def delete_checkpoints(db: Database, session: Session, checkpoint_id: str | None) -> int:
    raw_id = b"" if checkpoint_id is None else to_raw_id(checkpoint_id)
    if raw_id is None:
        return 0
    words = tag_of(session.key), to_id_bytes(session.uid), raw_id
    return int(await db.tell("checkpoint", *words, repeats=False))


async def add_note(db: Database, session: Session, note: Note, usage: Usage) -> Session:
    async def attempt(record: Record) -> Draft | None:
        spot = await tree.spot_at(db, record, note.turn_id)
        noted = await tree.list_noted(db, record.tag)
        note_id, turn_id = to_id_bytes(note.note_id), to_id_bytes(note.turn_id)
        if any(one.note_id == note_id for one in noted):
            return None
        here = side_rows.Noted(note_id, turn_id, spot.place.depth, noted[-1].number + 1 if noted else 1)
        newest = await tree.find_noted(db, record.session, [*noted, here])
        draft = Draft(db.sealer, record)
        now = rules.fact_time(record.session, note.created_at)
        draft.put_note(note, here.depth, here.number)
        draft.use(note.created_at // rules.MS_PER_DAY, 0, usage)
        draft.save(replace(record.session, note=rows.from_id(newest), updated_at=now), now)
        draft.log(Compacted(note.note_id, note.turn_id), now, db.life)
        return draft

    return await records.rewrite(db, session.key, lambda: db.get_record(session), attempt)


async def list_entries(
    db: Database, session: Session, position: Position | None, limit: int, *, newest_first: bool
) -> tuple[Entry, ...]:
    if position is None:
        position = Position(LATEST_MS, LAST) if newest_first else Position(-1, LAST)
    facts = _facts(db, session, position, limit, newest_first)
    turns = _turns(db, session, position, limit, newest_first)
    # Each is read as far as it may be needed: no more than ``limit`` of either are.
    told: list[Entry] = [fact async for fact in facts]
    shown: list[Entry] = [turn async for turn in turns]
    return tuple(heapq.merge(told, shown, key=position_of, reverse=newest_first))[:limit]


async def _facts(
    db: Database, session: Session, position: Position, limit: int, newest_first: bool
) -> AsyncIterator[LoggedFact]:
    number = _number_at(position.tie)
    place: tuple[Word, Word] = position.time_ms, side_rows.fact_low(number if newest_first else number + 1)
    tag, uid, given = tag_of(session.key), to_id_bytes(session.uid), 0
    while given < limit:
        reply = await db.ask("page", tag, uid, "f", *place, limit, int(not newest_first), "")
        for member in reply[1][::2] if reply else ():
            try:
                yield side_rows.from_fact(db.sealer, uid, member)
                given += 1
            except SnapshotUnreadable:
                _log.error("an event of session %r is unreadable and left out", session.key.session_id)
        if reply is None or len(reply[1]) < 2 * limit:
            return
        place = reply[1][-1], reply[1][-2] if newest_first else reply[1][-2] + b"\0"


async def _turns(
    db: Database, session: Session, position: Position, limit: int, newest_first: bool
) -> AsyncIterator[Turn]:
    place: tuple[Word, Word] = position.time_ms, _turn_id_at(position.tie, newest_first)
    tag, uid, given = tag_of(session.key), to_id_bytes(session.uid), 0
    while given < limit:
        reply = await db.ask("turns", tag, uid, "after", *place, limit, int(not newest_first))
        for turn_id, raw, on_branch, score in reply[1] if reply else ():
            turn = rows.show_turn(
                db.sealer, uid, turn_id, raw, int(score), session.key.session_id, on_branch=bool(on_branch)
            )
            # One that begins at no time would have no place in the order.
            if turn is not None and turn.started_at == int(score):
                yield turn
                given += 1
        if reply is None or len(reply[1]) < limit:
            return
        last_id, _, _, score = reply[1][-1]
        place = score, last_id if newest_first else last_id + b"\0"


def _readable(sealer: Sealer, session: Session, ids: list[bytes], bodies: list[bytes]) -> list[Checkpoint]:
    """Return the checkpoints; a broken one is left out, so that its neighbours stay listed."""
    found = []
    for checkpoint_id, raw in zip(ids, bodies, strict=True):
        try:
            found.append(side_rows.from_checkpoint(sealer, to_id_bytes(session.uid), checkpoint_id, raw)[0])
        except SnapshotUnreadable:
            _log.error("a checkpoint of session %r is unreadable and left out", session.key.session_id)
    return found


def _number_at(tie: str) -> int:
    """Return the number of the last fact whose tie is not behind ``tie``."""
    if tie[:1] == "!" and tie[1:].isdecimal() and len(tie) == 17:
        return int(tie[1:])
    return 0 if tie <= "!" else _MOST


def _turn_id_at(tie: str, newest_first: bool) -> bytes:
    """Return what no turn behind ``tie`` is before, or downwards what each turn before it is before."""
    turn_id = to_raw_id(tie)
    if turn_id is None:
        return b"" if tie < "0" else b"\xff" * 17
    return turn_id if newest_first else turn_id + b"\0"
