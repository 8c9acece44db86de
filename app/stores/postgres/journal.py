"""A session's story in PostgreSQL: what is logged outside its turns, and both together in their order."""

import heapq
import logging
from itertools import islice
from typing import Any, NamedTuple

from app.domain.errors import SnapshotUnreadable
from app.domain.ids import from_id_bytes, to_id_bytes
from app.domain.journal import LAST, Entry, Fact, LoggedFact, Position
from app.domain.session import Session
from app.stores.postgres.rows import LATEST_MS, TURN_COLUMNS, Record, marks, show_turn, to_raw_id
from app.stores.postgres.tree import find_tree
from app.stores.postgres.unit import Unit, View
from app.stores.sealing import Sealer
from app.stores.side_rows import FACT_COLUMNS, Row, from_fact_row, to_fact_row

_FIND_LAST = "SELECT number, created_at FROM session_events WHERE session = $1 ORDER BY number DESC LIMIT 1"
ADD = f"INSERT INTO session_events (session, {FACT_COLUMNS}) VALUES ({marks('x,' + FACT_COLUMNS)})"
_DROP = "DELETE FROM session_events WHERE session = $1 AND number <= $2"
LIST_FACTS = (
    f"SELECT {FACT_COLUMNS} FROM session_events WHERE session = $1"
    " AND (created_at, number) {beyond} ($2, $3) ORDER BY created_at {order}, number {order} LIMIT $4"
)
LIST_TURNS = (
    f"SELECT {TURN_COLUMNS} FROM turns WHERE session = $1"
    " AND (started_at, turn_id) {beyond} ($2, $3) ORDER BY started_at {order}, turn_id {order} LIMIT $4"
)
_UPWARDS = {"beyond": ">", "order": "ASC"}
_DOWNWARDS = {"beyond": "<", "order": "DESC"}
_MOST = 10**16
"""No number of a fact is as high: ``tie_of`` writes sixteen digits."""
_LOWEST, _HIGHEST = b"", b"\xff" * 17

_log = logging.getLogger(__name__)


class _Found(NamedTuple):
    """A row and its place, which does not depend on its being whole."""

    position: Position
    is_fact: bool
    row: Row


async def log(unit: Unit, record: Record, fact: Fact, time_ms: int) -> None:
    """Log ``fact``, its time being ``rules.fact_time``; of too many the oldest go."""
    last: Any = await unit.connection.fetchrow(_FIND_LAST, record.number) or (0, 0)
    number, previous = last[0] + 1, last[1] if last[1] in range(LATEST_MS) else 0
    logged = LoggedFact(number, max(time_ms, previous), fact)
    await unit.connection.execute(ADD, record.number, *to_fact_row(unit.sealer, record.uid, logged))
    if unit.life.event_limit:
        await unit.connection.execute(_DROP, record.number, number - unit.life.event_limit)


async def list_entries(
    view: View, session: Session, position: Position | None, limit: int, newest_first: bool
) -> tuple[Entry, ...]:
    tree = await find_tree(view, session)
    if tree is None:
        return ()
    if position is None:
        position = Position(LATEST_MS, LAST) if newest_first else Position(-1, LAST)
    entries: list[Entry] = []
    # How many rows make a page is known only when the broken ones are left out.
    while (wanted := limit - len(entries)) > 0:
        found = await _next(view, tree.number, position, wanted, newest_first)
        entries += [entry for one in found if (entry := _entry_of(view.sealer, one, session)) is not None]
        if len(found) < wanted:
            break
        position = found[-1].position
    return tuple(entries)


async def _next(view: View, number: int, position: Position, limit: int, newest_first: bool) -> list[_Found]:
    way = _DOWNWARDS if newest_first else _UPWARDS
    time_ms, tie = position
    facts = await view.connection.fetch(LIST_FACTS.format(**way), number, time_ms, _number_at(tie), limit)
    turns = await view.connection.fetch(LIST_TURNS.format(**way), number, time_ms, _turn_id_at(tie), limit)
    told = [_Found(Position(row[1], f"!{row[0]:016d}"), True, row) for row in facts]
    shown = [_Found(Position(row[9], from_id_bytes(row[0])), False, row) for row in turns]
    merged = heapq.merge(told, shown, key=lambda found: found.position, reverse=newest_first)
    return list(islice(merged, limit))


def _entry_of(sealer: Sealer, found: _Found, session: Session) -> Entry | None:
    if not found.is_fact:
        turn = show_turn(sealer, to_id_bytes(session.uid), found.row, session.key.session_id)
        # One that begins at no time would have no place in the order.
        return turn if turn is not None and turn.started_at == found.position.time_ms else None
    try:
        return from_fact_row(sealer, to_id_bytes(session.uid), found.row)
    except SnapshotUnreadable:
        _log.error("an event of session %r is unreadable and left out", session.key.session_id)
        return None


def _number_at(tie: str) -> int:
    """Return the number of the last fact whose tie is not behind ``tie``."""
    if tie[:1] == "!" and tie[1:].isdecimal() and len(tie) == 17:
        return int(tie[1:])
    return 0 if tie <= "!" else _MOST


def _turn_id_at(tie: str) -> bytes:
    """Return what stands to turns' ids as bytes as ``tie`` does to their text."""
    return to_raw_id(tie) or (_LOWEST if tie < "0" else _HIGHEST)
