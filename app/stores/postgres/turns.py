"""Turns begin and end: each in one statement where all is as this process saw it last.

The statement is a function of the schema. It is told which record the values were made of
(``Record.stamp``) and does nothing if that is not the record any more; then the record is
locked, read again, and the same statement sent once more within that transaction.
"""

import logging
from dataclasses import replace
from enum import IntEnum
from typing import Any, NamedTuple
from zlib import crc32

from app.domain.checkpoint import AutoCheckpoint
from app.domain.errors import HeadMoved, KeyTaken, LeasedElsewhere, SessionNotFound, SnapshotUnreadable
from app.domain.idempotency import Binding
from app.domain.ids import from_id_bytes, to_id_bytes
from app.domain.lease import Holder, Node
from app.domain.session import LifeSpan, Session
from app.domain.turn import Turn, TurnStatus
from app.stores import rules
from app.stores.buckets import bucket_of
from app.stores.postgres import checkpoints, records
from app.stores.postgres.rows import (
    RECORD_COLUMNS,
    TURN_COLUMNS,
    Record,
    from_record_row,
    marks,
    to_raw_text,
    to_turn_row,
)
from app.stores.postgres.tree import get_record, raw_key, spot_at
from app.stores.postgres.unit import Unit, View
from app.stores.sealing import Sealer
from app.stores.side_rows import Row, from_fingerprint, to_fingerprint, to_id, to_state_body

_NO_STAMP = -1
_START_VALUES = 17 + len(TURN_COLUMNS.split(","))
_END_VALUES = 31 + len(TURN_COLUMNS.split(","))
_S_COLUMNS = ", ".join(f"s.{column.strip()}" for column in RECORD_COLUMNS.split(","))
# The record comes with the answer if the caller needs it. It is that of the moment before the
# function waited for somebody, so it may be old: whoever uses it says which it was.
START = (
    f"SELECT f.*, {_S_COLUMNS} FROM start_turn({marks('x,' * (_START_VALUES - 1))}) AS f"
    " LEFT JOIN sessions AS s ON f.outcome = 1 AND s.owner = $1 AND s.session_id = $2"
)
END = f"SELECT end_turn({marks('x,' * (_END_VALUES - 1))})"
_FIND_STATUS = "SELECT status, kept FROM turns WHERE session = $1 AND turn_id = $2"

_log = logging.getLogger(__name__)


class Started(IntEnum):
    """What ``start_turn`` of the schema answers."""

    NOTED = 0
    OTHER_RECORD = 1
    NO_SESSION = 2
    RUNS_ALREADY = 3
    ENDED = 4
    LEASED = 5
    KEY_OF_COMMITTED = 6
    KEY_OF_RUNNING = 7


class Ended(IntEnum):
    """What ``end_turn`` of the schema answers."""

    DONE = 0
    OTHER_RECORD = 1
    NO_SESSION = 2
    COMMITTED_BEFORE = 3
    DROPPED_BEFORE = 4
    HEAD_MOVED = 5
    WITHOUT_KEY = 6


class Taker(NamedTuple):
    """Who takes leases, and for how long."""

    node: Node
    lease_s: float


class End(NamedTuple):
    """How a turn ends: the stamp of the record that it was made of, the record after it, and what else is
    written. ``kept_state``: a state to keep.
    """

    stamp: int
    record: Record
    state_number: int | None
    kept_state: bytes | None = None


async def start_turn(
    view: View, record: Record | None, session: Session, turn: Turn, body: bytes, taker: Taker,
    life: LifeSpan,
) -> tuple[Started, Record | None]:  # fmt: skip
    """Send the start of ``turn``, made of ``record``; return what became of it, and the record as it is then.

    Without a record only the lease is taken, and the record read.

    Raises:
        LeasedElsewhere, KeyTaken, SessionNotFound, HeadMoved
    """
    touched = None
    if record is not None:
        after = record.session.touched(turn.started_at, life)
        touched = record.after_write(view.sealer, after, record.state_number, record.last_state)
    values = _start_values(view.sealer, record, touched, session, turn, body, taker)
    row: Any = await view.connection.fetchrow(START, *values)
    outcome = Started(row[0])
    _check_started(outcome, row, session, turn)
    if outcome is Started.OTHER_RECORD:
        # Without one the session has gone between two glances.
        return outcome, from_record_row(view.sealer, row[7:]) if row[7] is not None else None
    return outcome, touched if outcome is Started.NOTED else None


async def end_turn(view: View, session: Session, turn: Turn, body: bytes, end: End) -> Ended:
    """Send the end of ``turn``; ``session`` is what the caller knew, its head the one that it must have."""
    after, outcome = end.record, None
    s = after.session
    values = (
        *raw_key(session.key), to_id_bytes(session.uid), end.stamp, after.stamp, turn.turn_id,
        turn.is_committed,
        to_id(session.head), to_id(s.head), to_id(s.note), s.depth, s.updated_at, s.last_accessed,
        s.expires_at, s.marked_idle, s.rev, s.state_rev, after.state_number, after.last_state, after.seal,
        to_raw_text(after.texts[4]), end.kept_state, *_key_values(view.sealer, turn, after.number),
        *_counts_of(turn),
        *to_turn_row(view.sealer, after.uid, turn, body, end.state_number),
    )  # fmt: skip
    outcome = Ended(await view.connection.fetchval(END, *values))
    if outcome is Ended.WITHOUT_KEY:
        _log.error("the idempotency key of turn %s belongs to another committed turn", turn.turn_id)
    return outcome


def plan_commit(sealer: Sealer, record: Record, session: Session, turn: Turn, life: LifeSpan) -> End | None:
    """Return how the usual turn ends, which goes on from the head; ``None`` if this is another one.

    Raises:
        ValueError: its depth does not follow: a mistake in our own code.
    """
    known = record.session
    if known.uid != session.uid or known.head != session.head or turn.parent != known.head:
        return None
    rules.check_depth(turn, rules.Place(known.head, known.depth, known.note, known.state))
    number, last, kept = record.state_number, record.last_state, None
    if known.state and number is None:
        number = last = record.last_state + 1
        kept = to_state_body(sealer, record.uid, number, known.state)
    after = record.after_write(sealer, rules.after_commit(known, turn, life), number, last)
    return End(record.stamp, after, number, kept)


def plan_record(sealer: Sealer, record: Record, turn: Turn, life: LifeSpan) -> End:
    """Return how a turn ends beside the tree."""
    touched = record.session.touched(rules.end_of(turn), life)
    return End(
        record.stamp, record.after_write(sealer, touched, record.state_number, record.last_state), None
    )


async def commit_turn(
    unit: Unit,
    session: Session,
    turn: Turn,
    body: bytes,
    resets_state: bool,
    checkpoint: AutoCheckpoint | None,
) -> Session:
    """Commit any turn, with the record locked."""
    record = await get_record(unit, session, lock=True)
    known: Any = await unit.connection.fetchrow(_FIND_STATUS, record.number, to_id_bytes(turn.turn_id))
    if known is None or known[0] == 0:
        rules.check_unmoved(record.session, session, turn.turn_id)
        end = await _plan_any(unit, record, session, turn, resets_state)
    else:
        end = plan_record(unit.sealer, record, turn, unit.life)  # which the database will not look at
    outcome = await end_turn(unit, session, turn, body, end)
    check_ended(outcome, session, turn)
    if outcome is Ended.COMMITTED_BEFORE:
        return record.session
    unit.note(end.record)
    if checkpoint is not None:
        await checkpoints.add_automatic(unit, end.record, checkpoint, turn, end.state_number)
    return end.record.session


async def record_turn(unit: Unit, session: Session, turn: Turn, body: bytes) -> None:
    """Record any turn beside the tree, with the record locked."""
    try:
        record = await get_record(unit, session, lock=True)
    except SessionNotFound:
        return
    end = plan_record(unit.sealer, record, turn, unit.life)
    if await end_turn(unit, session, turn, body, end) is Ended.DONE:
        unit.note(end.record)


def check_ended(outcome: Ended, session: Session, turn: Turn) -> None:
    """Raise what the answer to a commit means.

    Raises:
        SessionNotFound, HeadMoved
    """
    if outcome is Ended.NO_SESSION:
        raise SessionNotFound(session_id=session.key.session_id)
    if outcome in (Ended.HEAD_MOVED, Ended.DROPPED_BEFORE):
        raise HeadMoved(session_id=session.key.session_id, turn_id=turn.turn_id)


def to_key_row(sealer: Sealer, bound: Binding, number: int, turn: Turn) -> tuple[Any, ...]:
    """Return how a key's owner, the key, its fingerprint and what vouches for its row are stored."""
    turn_id = to_id_bytes(turn.turn_id)
    stored = to_fingerprint(sealer, bound.owner, bound.key, turn_id, bound.fingerprint)
    sealed = _key_seal(bound.owner, bound.key, stored, number, turn_id, turn.started_at)
    return bound.owner.encode(), bound.key.encode(), stored, sealed


def from_key_row(sealer: Sealer, owner: str, key: str, row: Row) -> Binding:
    """Return what is bound; ``row`` is the session's number, turn, fingerprint, time and seal.

    Raises:
        SnapshotUnreadable: the row is broken.
    """
    number, turn_id, stored, created_at, sealed = row
    if _key_seal(owner, key, stored, number, turn_id, created_at) != sealed:
        raise SnapshotUnreadable
    return Binding(owner, key, from_fingerprint(sealer, owner, key, turn_id, stored))


def _key_seal(owner: str, key: str, stored: bytes, session: int, turn_id: bytes, created_at: int) -> int:
    text = f"{owner}\0{key}\0{session}\0{created_at}\0"
    return crc32(text.encode() + stored + turn_id)


async def _plan_any(unit: Unit, record: Record, session: Session, turn: Turn, resets_state: bool) -> End:
    """Return how a turn ends that may go on from anywhere."""
    usual = None if resets_state else plan_commit(unit.sealer, record, session, turn, unit.life)
    if usual is not None:
        return usual
    spot = await spot_at(unit, record, turn.parent)
    rules.check_depth(turn, spot.place)
    moved = replace(rules.after_commit(record.session, turn, unit.life), note=spot.place.note)
    if resets_state:
        moved = moved.with_state(spot.place.state, by_turn=True)
        after = record.after_write(unit.sealer, moved, spot.state_number, record.last_state)
        return End(record.stamp, after, spot.state_number)
    number, last = await records.keep_state(unit, record)
    return End(record.stamp, record.after_write(unit.sealer, moved, number, last), number)


def _start_values(
    sealer: Sealer,
    record: Record | None,
    touched: Record | None,
    session: Session,
    turn: Turn,
    body: bytes,
    taker: Taker,
) -> tuple[Any, ...]:
    activity: tuple[Any, ...] = (_NO_STAMP, _NO_STAMP, 0, None, False, 0)
    if record is not None and touched is not None:
        s = touched.session
        activity = record.stamp, touched.stamp, s.last_accessed, s.expires_at, s.marked_idle, touched.seal
    return (
        *raw_key(session.key), to_id_bytes(session.uid), *activity, turn.turn_id, taker.node.boot_id,
        taker.node.url, taker.lease_s, *_key_values(sealer, turn, touched.number if touched else 0),
        *to_turn_row(sealer, to_id_bytes(session.uid), turn, body, None),
    )  # fmt: skip


def _key_values(sealer: Sealer, turn: Turn, number: int) -> tuple[Any, ...]:
    bound = turn.binding
    return (None, None, None, None) if bound is None else to_key_row(sealer, bound, number, turn)


def _counts_of(turn: Turn) -> tuple[Any, ...]:
    bucket = bucket_of(turn.duration_ms) if turn.status is TurnStatus.FINISHED else None
    usage = turn.usage
    spent = None if bucket is None else turn.duration_ms
    return rules.day_of(turn), usage.prompt_tokens, usage.completion_tokens, spent, bucket


def _check_started(outcome: Started, row: Row, session: Session, turn: Turn) -> None:
    _, by_turn, by_session, boot_id, url, nonce, for_turn = row[:7]
    holder = None if nonce is None else Holder(Node(boot_id, url), nonce, is_turn=for_turn)
    session_id = session.key.session_id
    match outcome:
        case Started.NO_SESSION:
            raise SessionNotFound(session_id=session_id)
        case Started.ENDED:
            raise HeadMoved(session_id=session_id, turn_id=turn.turn_id)
        case Started.LEASED if holder is not None:
            raise LeasedElsewhere(holder, session_id=session_id)
        case Started.KEY_OF_COMMITTED:
            raise KeyTaken(None, turn_id=from_id_bytes(by_turn))
        case Started.KEY_OF_RUNNING:
            raise KeyTaken(holder, session_id=by_session.decode(), turn_id=from_id_bytes(by_turn))
