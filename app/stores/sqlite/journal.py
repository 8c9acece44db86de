"""A session's story in SQLite: what is logged outside its turns, and both together in their order."""

import heapq
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import apsw

from app.domain.errors import SnapshotUnreadable
from app.domain.ids import to_id_bytes
from app.domain.journal import LAST, Entry, Fact, LoggedFact, Position, position_of
from app.domain.session import Session
from app.domain.turn import Turn
from app.stores.sealing import Sealer
from app.stores.side_rows import FACT_COLUMNS, from_fact_row, to_fact_row
from app.stores.sqlite.connection import Connection
from app.stores.sqlite.records import marks
from app.stores.sqlite.rows import LATEST_MS, TURN_COLUMNS, Names, Record, show_turn, whose
from app.stores.sqlite.tree import find_tree, to_raw_id
from app.stores.sqlite.unit import Unit

_FIND_LAST = (
    "SELECT number, created_at FROM session_events WHERE session = ? AND number <= ?"
    " ORDER BY number DESC LIMIT 1"
)
ADD_FACT = f"INSERT INTO session_events ({FACT_COLUMNS}, session) VALUES ({marks(FACT_COLUMNS)}, ?)"
_DROP = "DELETE FROM session_events WHERE session = ? AND number <= ?"
_LIST_FACTS = (
    f"SELECT {FACT_COLUMNS} FROM session_events WHERE session = ?"
    " AND (created_at, number) {beyond} (?, ?) ORDER BY created_at {order}, number {order}"
)
_LIST_TURNS = (
    f"SELECT {TURN_COLUMNS} FROM turns WHERE session = ?"
    " AND (started_at, turn_id) {beyond} (?, ?) ORDER BY started_at {order}, turn_id {order}"
)
_UPWARDS = {"beyond": ">", "order": "ASC"}
_DOWNWARDS = {"beyond": "<", "order": "DESC"}
_MOST = 10**16
"""No number of a fact is as high: ``tie_of`` writes sixteen digits."""
_LOWEST, _HIGHEST = b"", b"\xff" * 17

_log = logging.getLogger(__name__)


def log(unit: Unit, record: Record, fact: Fact, time_ms: int) -> None:
    """Log ``fact``, its time being ``rules.fact_time``; of too many the oldest go."""
    last = unit.connection.execute(_FIND_LAST, (record.number, _MOST)).fetchone() or (0, 0)
    number, previous = last[0] + 1, last[1] if last[1] in range(LATEST_MS) else 0
    logged = LoggedFact(number, max(time_ms, previous), fact)
    unit.connection.execute(ADD_FACT, (*to_fact_row(unit.sealer, record.uid, logged), record.number))
    if unit.life.event_limit:
        unit.connection.execute(_DROP, (record.number, number - unit.life.event_limit))


def list_entries(
    connection: Connection,
    names: Names,
    session: Session,
    position: Position | None,
    limit: int,
    newest_first: bool,
) -> tuple[Entry, ...]:
    tree = find_tree(connection, session)
    if tree is None:
        return ()
    if position is None:
        position = Position(LATEST_MS, LAST) if newest_first else Position(-1, LAST)
    way = _DOWNWARDS if newest_first else _UPWARDS
    facts = (tree.number, position.time_ms, _number_at(position.tie))
    turns = (tree.number, position.time_ms, _turn_id_at(position.tie))
    with (
        _rows(connection, _LIST_FACTS.format(**way), facts) as fact_rows,
        _rows(connection, _LIST_TURNS.format(**way), turns) as turn_rows,
    ):
        told = _facts(fact_rows, connection.sealer, session)
        shown = _turns(turn_rows, connection, names, session)
        merged: Iterator[Entry] = heapq.merge(told, shown, key=position_of, reverse=newest_first)
        return tuple(islice(merged, limit))


@contextmanager
def _rows(connection: Connection, sql: str, values: tuple[Any, ...]) -> Iterator[apsw.Cursor]:
    """Give rows one by one: how many make a page is known only when the broken ones are left out."""
    cursor = connection.execute(sql, values)
    try:
        yield cursor
    finally:
        cursor.close(True)


def _facts(rows: apsw.Cursor, sealer: Sealer, session: Session) -> Iterator[LoggedFact]:
    uid = to_id_bytes(session.uid)
    for row in rows:
        try:
            yield from_fact_row(sealer, uid, row)
        except SnapshotUnreadable:
            _log.error("an event of session %r is unreadable and left out", session.key.session_id)


def _turns(rows: apsw.Cursor, connection: Connection, names: Names, session: Session) -> Iterator[Turn]:
    of_session = whose(connection, session)
    for row in rows:
        turn = show_turn(row, connection, names, of_session)
        # One that begins at no time would have no place in the order.
        if turn is not None and turn.started_at == row[9]:
            yield turn


def _number_at(tie: str) -> int:
    """Return the number of the last fact whose tie is not behind ``tie``."""
    if tie[:1] == "!" and tie[1:].isdecimal() and len(tie) == 17:
        return int(tie[1:])
    return 0 if tie <= "!" else _MOST


def _turn_id_at(tie: str) -> bytes:
    """Return what stands to turns' ids as bytes as ``tie`` does to their text."""
    return to_raw_id(tie) or (_LOWEST if tie < "0" else _HIGHEST)
