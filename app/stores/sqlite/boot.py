"""What the writer does once after opening: end the turns of dead processes, make counters sure."""

import logging
import time
from typing import Any

from app.domain.errors import SnapshotUnreadable
from app.stores import rules
from app.stores.codec import to_turn_body
from app.stores.sealing import is_encrypted
from app.stores.side_rows import Row
from app.stores.sqlite import keys
from app.stores.sqlite.records import PHASES, SWEPT
from app.stores.sqlite.rows import TURN_COLUMNS, Home, Names, Whose, from_turn_row
from app.stores.sqlite.unit import Unit
from app.stores.sqlite.writes import end_turn

_FAILED = 2
_ORPHANS = (
    f"SELECT {TURN_COLUMNS}, session, id, (SELECT uid FROM sessions WHERE id = turns.session)"
    " FROM turns WHERE status = 0 AND boot != ?"
)
_IDLE_AFTER = "idle_after_s"
# ``Session.status_at``, numbered as in ``PHASES``.
_SET_PHASES = (
    "UPDATE sessions SET phase = CASE WHEN archived THEN 2 WHEN expires_at <= :now THEN 3"
    " WHEN marked_idle OR last_accessed <= :idle_line THEN 1 ELSE 0 END"
)

_log = logging.getLogger(__name__)


def begin_boot(unit: Unit, boot_id: str) -> None:
    """Note this boot, turn the start records of every other into failed turns, load the counters."""
    connection = unit.connection
    connection.execute("BEGIN IMMEDIATE")
    now = time.time_ns() // 1_000_000
    boot = unit.intern(boot_id)
    connection.execute("INSERT OR IGNORE INTO boots (boot, started_at) VALUES (?, ?)", (boot, now))
    unit.totals.clear()
    unit.totals.update(dict(connection.execute("SELECT name, value FROM counters")))
    names = Names()
    for row in connection.execute(_ORPHANS, (boot,)).fetchall():
        _interrupt(unit, row, names, now)
    _recount(unit)
    unit.end_work()
    unit.write_counts()
    connection.execute("COMMIT")
    unit.end_group()


def _recount(unit: Unit) -> None:
    """Count the sessions, which is cheap; and their statuses if those do not add up or mean another time."""
    # Counted, not believed: a wrong total would stay wrong for ever.
    total = unit.connection.execute("SELECT count(*) FROM sessions").get
    _correct(unit, "sessions", total)
    is_same_life = unit.value(_IDLE_AFTER) == unit.life.idle_after_s
    if is_same_life and sum(unit.value(phase.value) for phase in PHASES) == total:
        return
    _correct(unit, _IDLE_AFTER, unit.life.idle_after_s)
    now = unit.value(SWEPT)
    line = rules.idle_line(now, unit.life)
    unit.connection.execute(_SET_PHASES, {"now": now, "idle_line": line})
    found: dict[Any, int] = dict(
        unit.connection.execute("SELECT phase, count(*) FROM sessions GROUP BY phase")
    )
    for code, phase in enumerate(PHASES):
        _correct(unit, phase.value, found.get(code, 0))


def _correct(unit: Unit, name: str, value: int) -> None:
    unit.count(name, value - unit.value(name))


def _interrupt(unit: Unit, row: Row, names: Names, now: int) -> None:
    *columns, number, row_number, uid = row
    try:
        turn = from_turn_row(columns, unit.connection, names, Whose(unit.sealer, uid, ""))
    except SnapshotUnreadable:
        if is_encrypted(row[12]):
            # Perhaps only its key is missing: it ends at the first start with that.
            _log.error("the start record of a turn cannot be decrypted (row %d)", row_number)
            return
        # Its seal stays wrong, so whoever asks for it learns that it is broken; but it does not run.
        _log.error("the start record of a turn is unreadable (row %d)", row_number)
        unit.connection.execute("UPDATE turns SET status = ? WHERE id = ?", (_FAILED, row_number))
        keys.release(unit.connection, number, row[0])
        return
    failed = rules.interrupted(turn, now)
    home = Home(number, uid, has_user=True)
    end_turn(unit, home, failed, to_turn_body(failed), state=None, is_known=True)
