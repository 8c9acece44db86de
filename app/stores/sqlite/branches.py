"""Branches in SQLite: heads that move, and sessions that fork.

A move reads as much as it needs to find its place, and writes the record and one event.
"""

from dataclasses import replace

from app.domain.branch import Back, HeadTarget, ToCheckpoint, ToTurn
from app.domain.errors import SnapshotUnreadable, TurnNotFound
from app.domain.ids import to_id_bytes
from app.domain.session import Session, SessionCap
from app.stores import rules
from app.stores.side_rows import Row, from_id
from app.stores.sqlite import checkpoints, journal, notes, records
from app.stores.sqlite.connection import Connection
from app.stores.sqlite.rows import Record, open_turn_row, to_turn_row_of, whose
from app.stores.sqlite.tree import (
    Spot,
    find_record,
    get_record,
    get_state,
    spot_at,
    walk,
    walk_whole,
)
from app.stores.sqlite.unit import Unit
from app.stores.sqlite.writes import ADD_TURN, make_room


def at_turn(connection: Connection, session: Session, turn_id: str | None) -> Session:
    record = find_record(connection, session)
    if record is None:
        raise TurnNotFound(session_id=session.key.session_id, turn_id=turn_id)
    return rules.at_place(session, spot_at(connection, record, turn_id).place)


def move_head(unit: Unit, session: Session, target: HeadTarget, now: int) -> Session:
    record = get_record(unit.connection, session)
    rules.check_unmoved(record.session, session)
    now = rules.fact_time(record.session, now)
    place, state_number = _spot_of(unit.connection, record, target)
    moved = rules.after_move(record.session, place, now, unit.life)
    records.save(unit, record, moved, now, state_number=state_number)
    journal.log(unit, record, rules.head_changed(record.session, target, place), now)
    return moved


def fork_session(
    unit: Unit, origin: Session, target: HeadTarget | None, new: Session, cap: SessionCap | None
) -> Session:
    """Copy the path; what is sealed with the origin's uid is sealed anew."""
    connection, uid = unit.connection, to_id_bytes(new.uid)
    record = get_record(connection, origin)
    place, state_number = _spot_of(connection, record, target)
    # All is read before room is made: the origin may be what goes for the new session.
    rows = _path_rows(connection, record, place, uid)
    numbers = {row[11] for row in rows} | {state_number, record.root_state}
    states = {number: get_state(connection, record, number) for number in numbers if number}
    noted = list(notes.notes_on(connection, record, (row[0] for row in rows)))
    if cap is not None:
        make_room(unit, new, cap)
    fork = rules.after_fork(new, place)
    number = records.add(unit, fork, state_number=state_number, root_state=record.root_state)
    connection.executemany(ADD_TURN, [(*row, number) for row in reversed(rows)])
    for state_of, state in states.items():
        records.add_state(unit, number, uid, state_of, state)
    notes.copy_notes(unit, number, uid, noted)
    return fork


def _spot_of(connection: Connection, record: Record, target: HeadTarget | None) -> Spot:
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
            return spot_at(connection, record, turn_id)
        case Back(turns):
            rules.check_back(record.session, turns)
            return spot_at(connection, record, _back(connection, record, turns))
        case ToCheckpoint(checkpoint_id):
            checkpoint, number = checkpoints.get_target(connection, record, checkpoint_id)
            place = spot_at(connection, record, checkpoint.turn_id).place
            return Spot(place._replace(state=get_state(connection, record, number)), number)


def _back(connection: Connection, record: Record, turns: int) -> str | None:
    """Return the turn so many before the head, ``None`` for the root."""
    session = record.session
    if turns == 0 or turns == session.depth:
        return session.head if turns == 0 else None
    rows = walk(connection, record.number, to_id_bytes(str(session.head)), turns)
    of_session = whose(connection, session)
    for row in rows:
        open_turn_row(row, of_session)
    if len(rows) < turns:
        raise SnapshotUnreadable(session_id=session.key.session_id)
    return from_id(rows[-1][1])


def _path_rows(connection: Connection, record: Record, place: rules.Place, uid: bytes) -> list[Row]:
    """Return the rows of the path to ``place`` as those of the session ``uid``, the deepest first.

    Raises:
        SnapshotUnreadable: the path or one of them is broken.
    """
    session = replace(record.session, head=place.head, depth=place.depth)
    rows = walk_whole(connection, record.number, session, None, 0)
    of_origin = whose(connection, session)
    return [to_turn_row_of(of_origin, uid, row) for row in rows]
