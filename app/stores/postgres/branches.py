"""Branches in PostgreSQL: heads that move, and sessions that fork.

A move reads as much as it needs to find its place, and writes the record and one event.
"""

from dataclasses import replace
from typing import Any

from app.domain.branch import Back, HeadTarget, ToCheckpoint, ToTurn
from app.domain.errors import SnapshotUnreadable, TurnNotFound
from app.domain.ids import to_id_bytes
from app.domain.session import Session, SessionCap
from app.stores import rules
from app.stores.postgres import checkpoints, journal, notes, records
from app.stores.postgres.link import Connection
from app.stores.postgres.rows import TURN_COLUMNS, Record, check_turn_row, marks, new_record
from app.stores.postgres.tree import Spot, find_record, get_record, get_state, spot_at, walk, walk_whole
from app.stores.postgres.unit import Unit
from app.stores.sealing import NO_KEYS
from app.stores.side_rows import from_id, to_state_body

ADD_TURN = f"INSERT INTO turns (session, {TURN_COLUMNS}) VALUES ({marks('x,' + TURN_COLUMNS)})"  # noqa: S608
ADD_STATE = "INSERT INTO states (session, number, body) VALUES ($1, $2, $3)"


async def at_turn(connection: Connection, session: Session, turn_id: str | None) -> Session:
    record = await find_record(connection, session)
    if record is None:
        raise TurnNotFound(session_id=session.key.session_id, turn_id=turn_id)
    return rules.at_place(session, (await spot_at(connection, record, turn_id)).place)


async def move_head(unit: Unit, session: Session, target: HeadTarget, now: int) -> Session:
    record = await get_record(unit.connection, session, lock=True)
    rules.check_unmoved(record.session, session)
    now = rules.fact_time(record.session, now)
    place, state_number = await _spot_of(unit.connection, record, target)
    moved = rules.after_move(record.session, place, now, unit.life)
    await journal.log(unit, record, rules.head_changed(record.session, target, place), now)
    await records.save(unit, record, moved, state_number=state_number)
    return moved


async def fork_session(
    unit: Unit, origin: Session, target: HeadTarget | None, new: Session, cap: SessionCap | None
) -> Session:
    """Copy the path's rows as they are; what is sealed with the origin's uid is sealed anew."""
    connection = unit.connection
    if cap is not None:
        await records.lock_users(unit, [new])
    record = await get_record(connection, origin, lock=True)
    place, state_number = await _spot_of(connection, record, target)
    # All is read before room is made: the origin may be what goes for the new session.
    rows = await _path_rows(connection, record, place)
    numbers = {row[11] for row in rows} | {state_number, record.root_state}
    states = {number: await get_state(connection, record, number) for number in numbers if number}
    copied = await notes.list_notes(connection, record, (row[0] for row in rows))
    if cap is not None:
        await records.make_room(unit, new, cap)
    fork = new_record(
        rules.after_fork(new, place),
        state_number=state_number,
        root_state=record.root_state,
        last_state=max(states, default=0),
    )
    fork = await records.add(unit, fork)
    bodies = [
        (fork.number, number, to_state_body(NO_KEYS, fork.uid, number, states[number])) for number in states
    ]
    await connection.executemany(ADD_TURN, [(fork.number, *row) for row in reversed(rows)])
    await connection.executemany(ADD_STATE, bodies)
    await notes.copy_notes(unit, fork, copied)
    return fork.session


async def _spot_of(connection: Connection, record: Record, target: HeadTarget | None) -> Spot:
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
            return await spot_at(connection, record, turn_id)
        case Back(turns):
            rules.check_back(record.session, turns)
            return await spot_at(connection, record, await _back(connection, record, turns))
        case ToCheckpoint(checkpoint_id):
            checkpoint, number = await checkpoints.get_target(connection, record, checkpoint_id)
            place = (await spot_at(connection, record, checkpoint.turn_id)).place
            return Spot(place._replace(state=await get_state(connection, record, number)), number)


async def _back(connection: Connection, record: Record, turns: int) -> str | None:
    """Return the turn so many before the head, ``None`` for the root."""
    session = record.session
    if turns == 0 or turns == session.depth:
        return session.head if turns == 0 else None
    rows = await walk(connection, record.number, to_id_bytes(str(session.head)), turns)
    for row in rows:
        check_turn_row(row, session.key.session_id)
    if len(rows) < turns:
        raise SnapshotUnreadable(session_id=session.key.session_id)
    return from_id(rows[-1][1])


async def _path_rows(connection: Connection, record: Record, place: rules.Place) -> list[Any]:
    """Return the rows of the path to ``place``, the deepest first.

    Raises:
        SnapshotUnreadable: the path or one of them is broken.
    """
    session = replace(record.session, head=place.head, depth=place.depth)
    rows = await walk_whole(connection, record.number, session, None, 0)
    for row in rows:
        check_turn_row(row, session.key.session_id)
    return rows
