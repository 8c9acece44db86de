"""The works of the writer: each is one step, and undone if it raises. The best raise before they write."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from app.domain.checkpoint import AutoCheckpoint
from app.domain.erasure import Erased
from app.domain.errors import HeadMoved, PreconditionFailed, SessionExists, SessionLimit
from app.domain.ids import SessionKey, to_id_bytes
from app.domain.session import Session, SessionCap, SessionChange
from app.domain.turn import Turn, TurnStatus
from app.stores import rules
from app.stores.sqlite import checkpoints, keys, records, stats
from app.stores.sqlite.records import marks, settings
from app.stores.sqlite.rows import RUNNING, TURN_COLUMNS, Home, Record, TurnNames, is_committed, to_turn_row
from app.stores.sqlite.tree import find_by_key, find_record, get_by_key, get_record, spot_at
from app.stores.sqlite.unit import Unit

ADD_TURN = f"INSERT INTO turns ({TURN_COLUMNS}, session) VALUES ({marks(TURN_COLUMNS)}, ?)"
_SET_TURN = f"UPDATE turns SET {settings(TURN_COLUMNS)} WHERE session = ? AND turn_id = ?"
_FIND_TURN_STATUS = "SELECT status, kept FROM turns WHERE session = ? AND turn_id = ?"
FIND_NUMBER = "SELECT id FROM sessions WHERE owner = ? AND session_id = ?"
_COUNT_OF_USER = "SELECT count FROM session_counts WHERE name = ? AND owner = ? AND kind = 'u'"
_FIND_RUNNING = "SELECT 1 FROM turns WHERE status = 0 AND session = ?"
_ROOT_STATE = 1


def ping(unit: Unit) -> None:
    unit.connection.execute("SELECT 1").fetchone()


def create_session(unit: Unit, session: Session) -> None:
    number = _ROOT_STATE if session.state else None
    added = records.add(unit, session, state_number=number, root_state=number)
    if number is not None:
        records.add_state(unit, added, to_id_bytes(session.uid), number, session.state)


def ensure_session(unit: Unit, session: Session) -> Session:
    known = find_by_key(unit.connection, session.key)
    if known is not None:
        return known.session
    create_session(unit, session)
    return session


def create_sessions(
    unit: Unit, sessions: Sequence[Session], cap: SessionCap | None
) -> tuple[SessionExists | SessionLimit | None, ...]:
    outcomes: list[SessionExists | SessionLimit | None] = []
    for session in sessions:
        try:
            if cap is not None:
                make_room(unit, session, cap)
            create_session(unit, session)
            outcomes.append(None)
        except (SessionExists, SessionLimit) as refusal:
            outcomes.append(refusal)
    return tuple(outcomes)


def update_session(
    unit: Unit, key: SessionKey, change: SessionChange, now: int, expected_etag: str | None
) -> Session:
    record = get_by_key(unit.connection, key)
    if expected_etag is not None and record.session.etag != expected_etag:
        raise PreconditionFailed(session_id=key.session_id)
    changed = change.apply(record.session, now, unit.life)
    records.save(unit, record, changed, now, state_number=record.state_number)
    return changed


def touch_session(unit: Unit, key: SessionKey, now: int) -> Session:
    return _touch(unit, get_by_key(unit.connection, key), now)


def delete_session(unit: Unit, key: SessionKey) -> bool:
    return delete_sessions(unit, [key]).sessions > 0


def delete_sessions(unit: Unit, keys: Sequence[SessionKey]) -> Erased:
    erased = Erased()
    for key in keys:
        number = unit.connection.execute(FIND_NUMBER, key).get
        if number is not None:
            erased += records.remove(unit, number)
    return erased


def start_turn(unit: Unit, session: Session, turn: Turn, body: bytes) -> None:
    record = find_record(unit.connection, session)
    if record is None or _status_of(unit, record.number, turn) is not None:
        return
    add_turn(unit, record.home, turn, body, None)
    keys.bind(unit.connection, record.number, turn)
    _touch(unit, record, turn.started_at)


def commit_turn(
    unit: Unit,
    session: Session,
    turn: Turn,
    body: bytes,
    resets_state: bool,
    checkpoint: AutoCheckpoint | None,
) -> Session:
    record = get_record(unit.connection, session)
    known = _status_of(unit, record.number, turn)
    if known is not None and is_committed(*known):
        return record.session
    if known is not None and known[0] != RUNNING:
        raise HeadMoved(session_id=session.key.session_id, turn_id=turn.turn_id)
    rules.check_unmoved(record.session, session, turn.turn_id)
    parent, state_number = _parent_of(unit, record, turn, resets_state)
    rules.check_depth(turn, parent)
    end_turn(unit, record.home, turn, body, state=state_number, is_known=known is not None)
    moved = rules.after_commit(record.session, turn, unit.life)
    if turn.parent != session.head:
        moved = replace(moved, note=parent.note)
    if resets_state:
        moved = moved.with_state(parent.state, by_turn=True)
    records.save(unit, record, moved, rules.end_of(turn), state_number=state_number)
    if checkpoint is not None:
        checkpoints.add_automatic(unit, record, checkpoint, turn, state_number)
    return moved


def record_turn(unit: Unit, session: Session, turn: Turn, body: bytes) -> None:
    record = find_record(unit.connection, session)
    if record is None:
        return
    known = _status_of(unit, record.number, turn)
    if known is not None and known[0] != RUNNING:
        return
    end_turn(unit, record.home, turn, body, state=None, is_known=known is not None)
    _touch(unit, record, rules.end_of(turn))


def end_turn(unit: Unit, home: Home, turn: Turn, body: bytes, *, state: int | None, is_known: bool) -> None:
    """Store the turn as it ended, ``state`` being the number of the session's state, and count it."""
    assert turn.status is not TurnStatus.RUNNING
    if is_known:
        values = _turn_row(unit, home.uid, turn, body, state)
        unit.connection.execute(_SET_TURN, (*values, home.number, values[0]))
    else:
        add_turn(unit, home, turn, body, state)
    if turn.is_committed:
        keys.bind(unit.connection, home.number, turn)
    else:
        keys.release(unit.connection, home.number, to_id_bytes(turn.turn_id))
    stats.count_turn(unit, turn)
    if home.has_user:
        records.add_usage(unit, home.number, rules.day_of(turn), 1, turn.usage)


def add_turn(unit: Unit, home: Home, turn: Turn, body: bytes, state: int | None) -> None:
    """Store the turn as it is; nothing is counted and no key bound."""
    unit.connection.execute(ADD_TURN, (*_turn_row(unit, home.uid, turn, body, state), home.number))


def make_room(unit: Unit, session: Session, cap: SessionCap) -> None:
    """Remove as many victims as are in the way of ``session``; changes nothing if it raises."""
    if session.user_id is None:
        return
    if unit.connection.execute(FIND_NUMBER, session.key).fetchone():
        raise SessionExists(session_id=session.key.session_id)
    user = session.user_id, session.key.owner
    excess = (unit.connection.execute(_COUNT_OF_USER, user).get or 0) + 1 - cap.most
    if excess <= 0:
        return
    found = ((v, find_record(unit.connection, v)) for v in cap.victims if (v.user_id, v.key.owner) == user)
    gone = [record.number for victim, record in found if record is not None and _may_go(unit, record, victim)]
    if len(gone) < excess:
        raise SessionLimit(session_id=session.key.session_id)
    for number in gone[:excess]:
        records.remove(unit, number)


def _parent_of(unit: Unit, record: Record, turn: Turn, resets_state: bool) -> tuple[rules.Place, int | None]:
    """Return where ``turn`` goes on from, with the state that it leaves there, and that one's number."""
    session = record.session
    # The usual turn goes on from the head, of which all is known.
    if turn.parent == session.head and not resets_state:
        place = rules.Place(session.head, session.depth, session.note, session.state)
        return place, records.keep_state(unit, record)
    spot = spot_at(unit.connection, record, turn.parent)
    if resets_state:
        return spot
    return spot.place._replace(state=session.state), records.keep_state(unit, record)


def _may_go(unit: Unit, record: Record, victim: Session) -> bool:
    is_running = unit.connection.execute(_FIND_RUNNING, (record.number,)).fetchone()
    return record.session.last_accessed == victim.last_accessed and is_running is None


def _touch(unit: Unit, record: Record, now: int) -> Session:
    touched = record.session.touched(now, unit.life)
    records.save(unit, record, touched, now, state_number=record.state_number)
    return touched


def _status_of(unit: Unit, number: int, turn: Turn) -> Any:
    return unit.connection.execute(_FIND_TURN_STATUS, (number, to_id_bytes(turn.turn_id))).fetchone()


def _turn_row(unit: Unit, uid: bytes, turn: Turn, body: bytes, state: int | None) -> tuple[Any, ...]:
    strings = (turn.agent_id, turn.provider, turn.model, turn.boot_id)
    return to_turn_row(unit.sealer, uid, turn, body, TurnNames(*map(unit.intern, strings)), state)
