"""The sweep in SQLite: statuses for counting brought up to now, and sessions purged that are due.

Both go by index through what has changed its status since the last sweep, or is due, and
never through what has not. A step takes some thousand rows, so that turns need not wait
long for the writer (a session goes as a whole, though, however many turns it has); what the
next step has to do is in the file, so any may be the last.
"""

from typing import Any, NamedTuple

from app.domain.session import SessionStatus
from app.stores import rules
from app.stores.sqlite import records
from app.stores.sqlite.records import PHASES, SWEPT, count_phase
from app.stores.sqlite.unit import Unit

ROWS_PER_STEP = 1000

_ACTIVE = PHASES.index(SessionStatus.ACTIVE)
_IDLE = PHASES.index(SessionStatus.IDLE)
_EXPIRED = PHASES.index(SessionStatus.EXPIRED)

NEWLY_IDLE = (
    f"SELECT id, phase, last_accessed FROM sessions WHERE phase = {_ACTIVE}"
    " AND last_accessed > ? AND last_accessed <= ? ORDER BY last_accessed LIMIT ?"
)
NEWLY_EXPIRED = (
    f"SELECT id, phase, expires_at FROM sessions WHERE phase != {_EXPIRED}"
    " AND expires_at > ? AND expires_at <= ? ORDER BY expires_at LIMIT ?"
)
COUNT_EXPIRED = "SELECT count(*) FROM sessions WHERE expires_at > ? AND expires_at <= ?"
DUE = (
    "SELECT id FROM sessions AS s WHERE expires_at <= ? AND NOT EXISTS"
    " (SELECT 1 FROM turns WHERE status = 0 AND session = s.id AND boot = ?)"
    " ORDER BY expires_at LIMIT ?"
)
_SET_PHASE = "UPDATE sessions SET phase = ? WHERE id = ?"


class Step(NamedTuple):
    """What one step did, and whether there is more to do."""

    done: int
    is_last: bool


def sweep(unit: Unit, now: int) -> Step:
    """Move the statuses on towards ``now``; the step's ``done`` counts those that expired in its time."""
    since = unit.value(SWEPT)
    if now <= since:
        return Step(0, True)
    reached = now
    if unit.life.idle_after_s:
        shift = unit.life.idle_after_s * 1000
        reached = _move(unit, NEWLY_IDLE, since - shift, now - shift, _IDLE) + shift
    reached = min(reached, _move(unit, NEWLY_EXPIRED, since, now, _EXPIRED))
    expired = unit.connection.execute(COUNT_EXPIRED, (since, reached)).get
    unit.count(SWEPT, reached - since)
    return Step(expired, reached == now)


def purge(unit: Unit, now: int, limit: int, boot_id: str) -> Step:
    """Remove up to ``limit`` sessions that are due, each with all that it has; the oldest first."""
    line = rules.purge_line(now, unit.life)
    if line is None:
        return Step(0, True)
    boot = unit.intern(boot_id)
    due: list[Any] = unit.connection.execute(DUE, (line, boot, limit)).fetchall()
    end = unit.connection.total_changes() + ROWS_PER_STEP
    for count, (number,) in enumerate(due, 1):
        records.remove(unit, number)
        if unit.connection.total_changes() >= end:
            return Step(count, count == len(due))
    return Step(len(due), True)


def _move(unit: Unit, query: str, since: int, until: int, phase: int) -> int:
    """Set the phase of what ``query`` finds between two times; return up to when nothing is left to set."""
    rows: list[Any] = unit.connection.execute(query, (since, until, ROWS_PER_STEP)).fetchall()
    unit.connection.executemany(_SET_PHASE, [(phase, number) for number, _, _ in rows])
    for _, was, _ in rows:
        count_phase(unit, was, -1)
        count_phase(unit, phase, 1)
    # Others may have the time of the last one.
    return until if len(rows) < ROWS_PER_STEP else rows[-1][2] - 1
