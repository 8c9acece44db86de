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
from app.stores.postgres.rows import TURN_COLUMNS, Record, marks, new_record, open_turn_row, to_row_of
from app.stores.postgres.tree import Spot, find_record, get_record, get_state, spot_at, walk, walk_whole
from app.stores.postgres.unit import Unit, View
from app.stores.side_rows import Row, from_id, to_state_body

ADD_TURN = f"INSERT INTO turns (session, {TURN_COLUMNS}) VALUES ({marks('x,' + TURN_COLUMNS)})"
ADD_STATE = "INSERT INTO states (session, number, body) VALUES ($1, $2, $3)"


async def at_turn(view: View, session: Session, turn_id: str | None) -> Session:
    record = await find_record(view, session)
    if record is None:
        raise TurnNotFound(session_id=session.key.session_id, turn_id=turn_id)
    return rules.at_place(session, (await spot_at(view, record, turn_id)).place)


async def move_head(unit: Unit, session: Session, target: HeadTarget, now: int) -> Session:
    record = await get_record(unit, session, lock=True)
    rules.check_unmoved(record.session, session)
    now = rules.fact_time(record.session, now)
    place, state_number = await _spot_of(unit, record, target)
    moved = rules.after_move(record.session, place, now, unit.life)
    await journal.log(unit, record, rules.head_changed(record.session, target, place), now)
    await records.save(unit, record, moved, state_number=state_number)
    return moved


async def fork_session(
    unit: Unit, origin: Session, target: HeadTarget | None, new: Session, cap: SessionCap | None
) -> Session:
    """Copy the path with what hangs on it, all of it sealed anew with the fork's uid."""
    if cap is not None:
        await records.lock_users(unit, [new])
    record = await get_record(unit, origin, lock=True)
    place, state_number = await _spot_of(unit, record, target)
    # All is read before room is made: the origin may be what goes for the new session.
    rows = await _path_rows(unit, record, place)
    copies = [_copy_of(unit, record, row, new) for row in reversed(rows)]
    numbers = {row[11] for row in rows} | {state_number, record.root_state}
    states = {number: await get_state(unit, record, number) for number in numbers if number}
    copied = await notes.list_notes(unit, record, (row[0] for row in rows))
    if cap is not None:
        await records.make_room(unit, new, cap)
    fork = new_record(
        unit.sealer,
        rules.after_fork(new, place),
        state_number=state_number,
        root_state=record.root_state,
        last_state=max(states, default=0),
    )
    fork = await records.add(unit, fork)
    bodies = [
        (fork.number, number, to_state_body(unit.sealer, fork.uid, number, state))
        for number, state in states.items()
    ]
    await unit.connection.executemany(ADD_TURN, [(fork.number, *row) for row in copies])
    await unit.connection.executemany(ADD_STATE, bodies)
    await notes.copy_notes(unit, fork, copied)
    return fork.session


async def _spot_of(view: View, record: Record, target: HeadTarget | None) -> Spot:
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
            return await spot_at(view, record, turn_id)
        case Back(turns):
            rules.check_back(record.session, turns)
            return await spot_at(view, record, await _back(view, record, turns))
        case ToCheckpoint(checkpoint_id):
            checkpoint, number = await checkpoints.get_target(view, record, checkpoint_id)
            place = (await spot_at(view, record, checkpoint.turn_id)).place
            return Spot(place._replace(state=await get_state(view, record, number)), number)


async def _back(view: View, record: Record, turns: int) -> str | None:
    """Return the turn so many before the head, ``None`` for the root."""
    session = record.session
    if turns == 0 or turns == session.depth:
        return session.head if turns == 0 else None
    rows = await walk(view, record.number, to_id_bytes(str(session.head)), turns)
    for row in rows:
        open_turn_row(view.sealer, record.uid, row, session.key.session_id)
    if len(rows) < turns:
        raise SnapshotUnreadable(session_id=session.key.session_id)
    return from_id(rows[-1][1])


async def _path_rows(view: View, record: Record, place: rules.Place) -> list[Any]:
    """Return the rows of the path to ``place``, the deepest first.

    Raises:
        SnapshotUnreadable: the path is broken.
    """
    session = replace(record.session, head=place.head, depth=place.depth)
    return await walk_whole(view, record.number, session, None, 0)


def _copy_of(unit: Unit, record: Record, row: Row, new: Session) -> tuple[Any, ...]:
    """Return the row of the record's turn as it is in the session ``new``.

    Raises:
        SnapshotUnreadable: it is broken.
    """
    body = open_turn_row(unit.sealer, record.uid, row, record.session.key.session_id)
    return to_row_of(unit.sealer, to_id_bytes(new.uid), row, body)
