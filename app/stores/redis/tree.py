"""A session's tree of turns in Redis: places in it, paths, and the notes that hang on it.

Committed turns never change, so what is read of them in several steps is as though in one.
"""

import asyncio
from typing import Any, NamedTuple

from app.domain.branch import Back, HeadTarget, ToCheckpoint, ToTurn
from app.domain.compaction import Note
from app.domain.errors import CheckpointNotFound, SessionNotFound, SnapshotUnreadable, TurnNotFound
from app.domain.ids import to_id_bytes
from app.domain.session import Path, Session
from app.domain.turn import JsonObject
from app.stores import rules
from app.stores.redis import rows, side_rows
from app.stores.redis.database import Database
from app.stores.redis.keys import tag_of
from app.stores.redis.rows import Record, TurnRow, from_id, to_raw_id
from app.stores.redis.side_rows import Noted

STEP_TURNS = 1000
STEP_BYTES = 4 * 1024 * 1024
"""How much of a path is read in one round trip: what takes a few milliseconds."""
_NOWHERE = b"-"

Step = tuple[bytes, bytes]
"""A turn's id and its row."""


class Spot(NamedTuple):
    """A place in the tree, and the number under which its state is kept."""

    place: rules.Place
    state_number: int | None


async def walk(
    db: Database, session: Session, start: bytes, limit: int, *, stop: bytes = b"", least: int = 0,
    ids_only: bool = False,
) -> list[Step] | None:  # fmt: skip
    """Return up to ``limit`` rows from ``start`` (empty: the head) towards the root, ``stop`` not included.

    Nor those above the depth ``least``. ``None``: this incarnation is gone.
    """
    found: list[Step] = []
    tag, uid = tag_of(session.key), to_id_bytes(session.uid)
    while len(found) < limit:
        # What a step returns last is where the next begins, so it is read, and counted, twice.
        again = bool(found)
        most = min(STEP_TURNS, limit - len(found)) + again
        reply = await db.ask("walk", tag, uid, start, stop, most, STEP_BYTES, least, int(ids_only))
        if reply is None:
            return None
        steps = list(zip(reply[::2], reply[1::2], strict=True))[again:]
        if not steps:
            break
        found += steps
        start = steps[-1][0]
    return found


async def read_whole(db: Database, session: Session, end: bytes | None, end_depth: int) -> list[TurnRow]:
    """Return the rows from the head of ``session`` to below ``end``, a turn or the root.

    Raises:
        SnapshotUnreadable: there is a gap, a circle or a turn that was never committed.
        SessionNotFound: this incarnation was deleted.
    """
    head, count = session.head and to_id_bytes(session.head), session.depth - end_depth
    found = await walk(db, session, head or _NOWHERE, max(count, 0), stop=end or b"")
    if found is None:
        raise SessionNotFound(session_id=session.key.session_id)
    path = [rows.take_apart(to_id_bytes(session.uid), *step) for step in found]
    is_whole = (
        len(path) == count
        and (path[-1].parent if path else head) == end
        and all(row.depth == session.depth - position for position, row in enumerate(path))
        and all(row.is_committed for row in path)
    )
    if not is_whole:
        raise SnapshotUnreadable(session_id=session.key.session_id)
    return path


async def load_path(db: Database, session: Session) -> Path:
    session_id = session.key.session_id
    noted = session.note and await read_note(db, session, to_id_bytes(session.note))
    try:
        end = (noted[1].turn_id, noted[1].depth) if noted else (None, 0)
        path = await read_whole(db, session, *end)
    except SnapshotUnreadable as error:
        raise SnapshotUnreadable(session_id=session_id, turn_id=error.turn_id) from error
    read = [rows.messages_and_size(db.sealer, row, session_id) for row in reversed(path)]
    messages = tuple([message for said, _ in read for message in said])
    stored_bytes = sum(size for _, size in read)
    if not noted:
        return Path(session.head, None, messages, stored_bytes)
    summary = noted[0].summary
    return Path(
        session.head,
        session.note,
        messages,
        stored_bytes + len(summary.encode(errors="surrogatepass")),
        summary,
    )


async def read_note(db: Database, session: Session, note_id: bytes) -> tuple[Note, Noted]:
    """Return a note, and where it hangs.

    Raises:
        SnapshotUnreadable: it is broken, or missing.
        SessionNotFound: this incarnation was deleted.
    """
    tag = tag_of(session.key)
    body, uid = await both(db, ("HGET", db.room(tag, "n"), note_id), ("HGET", db.room(tag, "s"), "u"))
    if uid != to_id_bytes(session.uid):
        raise SessionNotFound(session_id=session.key.session_id)
    try:
        return side_rows.from_note(db.sealer, uid, note_id, body)
    except SnapshotUnreadable as error:
        raise SnapshotUnreadable(session_id=session.key.session_id) from error


async def list_noted(db: Database, tag: str) -> list[Noted]:
    """Return where notes hang, the oldest first."""
    found = await db.read("HGETALL", db.room(tag, "o"))
    noted = [side_rows.from_noted(note_id, raw) for note_id, raw in zip(found[::2], found[1::2], strict=True)]
    return sorted((one for one in noted if one is not None), key=lambda one: one.number)


async def list_notes(db: Database, session: Session) -> tuple[Note, ...]:
    try:
        noted = await list_noted(db, tag_of(session.key))
        return tuple([(await read_note(db, session, one.note_id))[0] for one in noted])
    except SessionNotFound:
        return ()


async def find_noted(db: Database, session: Session, noted: list[Noted]) -> bytes | None:
    """Return the id of the newest of these notes on the path to the head of ``session``."""
    noted = [one for one in noted if one.depth <= session.depth]
    if not noted or session.head is None:
        return None
    newest = {one.turn_id: one.note_id for one in noted}  # of two on a turn the later one
    least = min(one.depth for one in noted)
    head, most = to_id_bytes(session.head), session.depth
    path = await walk(db, session, head, most, least=least, ids_only=True) or []
    return next((newest[turn_id] for turn_id, _ in path if turn_id in newest), None)


async def get_note(db: Database, session: Session) -> Note | None:
    note_id = await find_noted(db, session, await list_noted(db, tag_of(session.key)))
    if note_id is None:
        return None
    try:
        return (await read_note(db, session, note_id))[0]
    except SessionNotFound:
        return None


async def spot_at(db: Database, record: Record, turn_id: str | None) -> Spot:
    """Return the place right after a committed turn, or before the first.

    Raises:
        TurnNotFound: there is no such turn, or it was never committed.
        SnapshotUnreadable: it is broken.
    """
    if turn_id is None:
        root = record.root_state
        return Spot(rules.Place(None, 0, None, await get_state(db, record, root)), root)
    session_id = record.session.key.session_id
    raw_id = to_raw_id(turn_id)
    raw = raw_id and await db.read("HGET", db.room(record.tag, "t"), raw_id)
    if not raw_id or not raw:
        raise TurnNotFound(session_id=session_id, turn_id=turn_id)
    row = rows.checked(db.sealer, record.uid, raw_id, raw, session_id)
    if not row.is_committed:
        raise TurnNotFound(session_id=session_id, turn_id=turn_id)
    return await _spot(db, record, row)


async def spot_of(db: Database, record: Record, target: HeadTarget | None) -> Spot:
    """Return where ``target`` is as seen from the head; ``None`` is where the session is.

    Raises:
        TurnNotFound, CheckpointNotFound: it is not there, or was never committed.
        InvalidInput: back by more turns than there are.
        SnapshotUnreadable: it is broken.
    """
    match target:
        case None:
            here = record.session
            return Spot(rules.Place(here.head, here.depth, here.note, here.state), record.state_number)
        case ToTurn(turn_id):
            return await spot_at(db, record, turn_id)
        case Back(turns):
            rules.check_back(record.session, turns)
            return await spot_at(db, record, await _back(db, record, turns))
        case ToCheckpoint(checkpoint_id):
            raw_id = to_raw_id(checkpoint_id)
            raw = raw_id and await db.read("HGET", db.room(record.tag, "c"), raw_id)
            if not raw_id or not raw:
                raise CheckpointNotFound(session_id=record.session.key.session_id)
            try:
                checkpoint, number = side_rows.from_checkpoint(db.sealer, record.uid, raw_id, raw)
            except SnapshotUnreadable as error:
                raise SnapshotUnreadable(session_id=record.session.key.session_id) from error
            place = (await spot_at(db, record, checkpoint.turn_id)).place
            return Spot(place._replace(state=await get_state(db, record, number)), number)


async def get_state(db: Database, record: Record, number: int | None) -> JsonObject:
    """Return the state that is kept under ``number``.

    Raises:
        SnapshotUnreadable: it is broken, or missing.
    """
    if not number:
        return {}
    try:
        return side_rows.from_state(
            db.sealer, record.uid, number, await db.read("HGET", db.room(record.tag, "k"), number)
        )
    except SnapshotUnreadable as error:
        raise SnapshotUnreadable(session_id=record.session.key.session_id) from error


async def both(db: Database, first: tuple[Any, ...], second: tuple[Any, ...]) -> tuple[Any, Any]:
    """Return the replies to two commands, in one round trip and in this order."""
    one, two = await asyncio.gather(db.read(*first), db.read(*second))
    return one, two


async def _spot(db: Database, record: Record, row: TurnRow) -> Spot:
    here = _at(record.session, row)
    note = await find_noted(db, here, await list_noted(db, record.tag))
    state = await get_state(db, record, row.state)
    return Spot(rules.Place(from_id(row.turn_id), row.depth, from_id(note), state), row.state)


def _at(session: Session, row: TurnRow) -> Session:
    return rules.after_fork(session, rules.Place(from_id(row.turn_id), row.depth, None, {}))


async def _back(db: Database, record: Record, turns: int) -> str | None:
    """Return the turn so many before the head, ``None`` for the root."""
    session = record.session
    if turns == 0 or turns == session.depth:
        return session.head if turns == 0 else None
    path = await walk(db, session, to_id_bytes(str(session.head)), turns)
    if path is None or len(path) < turns:
        raise SnapshotUnreadable(session_id=session.key.session_id)
    return from_id(rows.checked(db.sealer, record.uid, *path[-1], session.key.session_id).parent)
