"""Listings and sums over sessions. Pages go by index; totals are counters, or counted up to a bound."""

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

from app.domain.errors import SnapshotUnreadable
from app.domain.ids import SessionKey
from app.domain.session import LifeSpan, Session, SessionPage, SessionQuery
from app.domain.stats import DayUsage, SessionStats, UserUsage
from app.stores import rules
from app.stores.buckets import P95, percentile
from app.stores.cursor import from_cursor, to_cursor
from app.stores.postgres import search
from app.stores.postgres.conditions import EVER, Conditions
from app.stores.postgres.rows import RECORD_COLUMNS, from_record_row
from app.stores.postgres.unit import Unit, View

SWEEP_ROWS = 1000
PURGE_SIZES = (20, 5, 1)
"""How many sessions one step of a purge removes, and with how many it goes on where that takes too long."""

_LIST_OLDEST = (
    f"SELECT {RECORD_COLUMNS} FROM sessions WHERE user_id = $1 AND owner = $2"
    " ORDER BY last_accessed, id LIMIT $3"
)
_KEPT_TOTAL = (
    "SELECT coalesce(sum(count), 0)::bigint FROM session_counts WHERE owner = $1 AND kind = $2 AND name = $3"
)
_LIST_USAGE = (
    "SELECT day, sum(turns)::bigint, sum(prompt_tokens)::bigint, sum(completion_tokens)::bigint"
    " FROM usage_days WHERE owner = $1 AND user_id = $2 AND day {which}"
    " GROUP BY day ORDER BY day DESC LIMIT $3"
)
COUNTERS = (
    "sessions", "active", "idle", "archived", "expired", "created", "lifetime_ms", "turns", "turns_failed",
    "turns_finished", "response_ms", "prompt_tokens", "completion_tokens",
)  # fmt: skip
_SUMS = ", ".join(f"sum({name})::bigint AS {name}" for name in COUNTERS)
_SUM_COUNTERS = f"SELECT {_SUMS} FROM counters"
_SUM_TIMES = "SELECT bucket, sum(count)::bigint FROM response_times GROUP BY bucket"
COUNT_SESSIONS = "SELECT sum(sessions)::bigint FROM counters"
_SWEEP = "SELECT * FROM sweep($1, $2)"
_PURGE = "SELECT purge($1, $2)"

_log = logging.getLogger(__name__)


async def list_sessions(view: View, query: SessionQuery, life: LifeSpan) -> SessionPage:
    if query.text is not None and view.sealer.encrypts:
        page, after = await search.search(view, query, life, _session_position(query.cursor))
        is_all = query.cursor is None and after is None
        total = len(page) if is_all else await search.count(view, query, life, _session_position(None))
    else:
        sql, values = page_of(query, life)
        rows: list[Any] = await view.connection.fetch(sql, *values)
        page, total = rows[: query.limit], await _total(view, query, life)
        after = (page[-1][19], page[-1][31]) if len(rows) > len(page) else None
    cursor = None if after is None else to_cursor("s", after[0], str(after[1]))
    return SessionPage(tuple(_readable(view, page)), total, cursor)


def page_of(query: SessionQuery, life: LifeSpan) -> tuple[str, list[Any]]:
    """Return the statement for a page and one session more, and its values."""
    time_ms, number = _session_position(query.cursor)
    conditions = Conditions(query, life)
    after = f"(last_accessed, id) < ({conditions.mark(time_ms)}, {conditions.mark(number)})"
    return (
        f"SELECT {RECORD_COLUMNS} FROM sessions WHERE {conditions.where} AND {after}"
        f" ORDER BY last_accessed DESC, id DESC LIMIT {conditions.mark(query.limit + 1)}",
        conditions.values,
    )


async def list_oldest(view: View, owner: str, user_id: str, limit: int) -> tuple[Session, ...]:
    rows = await view.connection.fetch(_LIST_OLDEST, user_id.encode(), owner.encode(), limit)
    return tuple(_readable(view, rows))


async def list_keys(
    view: View, owner: str | None, user_id: str | None, agent_id: str | None, limit: int
) -> tuple[SessionKey, ...]:
    query = SessionQuery(owner=owner, now=0, user_id=user_id, agent_id=agent_id)
    conditions = Conditions(query, LifeSpan())
    sql = f"SELECT owner, session_id FROM sessions WHERE {conditions.where} LIMIT {conditions.mark(limit)}"
    rows = await view.connection.fetch(sql, *conditions.values)
    return tuple(SessionKey(row[0].decode(), row[1].decode()) for row in rows)


async def get_usage(view: View, owner: str, user_id: str, limit: int) -> UserUsage:
    user = owner.encode(), user_id.encode()
    total: Any = await view.connection.fetchrow(_LIST_USAGE.format(which="= -1"), *user, 1)
    days = await view.connection.fetch(_LIST_USAGE.format(which=">= 0"), *user, limit)
    turns, read, written = tuple(total)[1:] if total else (0, 0, 0)
    return UserUsage(turns, read, written, tuple(DayUsage(*row) for row in days))


async def get_session_stats(view: View) -> SessionStats:
    counts = Counter(dict(await view.connection.fetchrow(_SUM_COUNTERS)))
    buckets = {row[0]: row[1] for row in await view.connection.fetch(_SUM_TIMES)}
    same = [name for name in COUNTERS if name not in ("sessions", "prompt_tokens", "completion_tokens")]
    return SessionStats(
        total=counts["sessions"],
        tokens=counts["prompt_tokens"] + counts["completion_tokens"],
        p95_response_ms=percentile(buckets, P95),
        **{name: counts[name] for name in same},
    )


async def get_totals(view: View) -> dict[str, int]:
    """Return every counter that is of all time, sessions there are now included; times by bucket."""
    counts = dict(await view.connection.fetchrow(_SUM_COUNTERS))
    buckets = {f"ms:{row[0]}": row[1] for row in await view.connection.fetch(_SUM_TIMES)}
    return counts | buckets


async def sweep(unit: Unit, now: int) -> tuple[int, bool]:
    """Move the statuses on towards ``now`` by some rows; return how many have expired, and if that is all."""
    expired, is_last = await unit.connection.fetchrow(_SWEEP, now, SWEEP_ROWS)
    return expired, is_last


async def purge(unit: Unit, line: int, limit: int) -> int:
    """Remove up to ``limit`` sessions that expired up to ``line``, the oldest first; return how many."""
    found: Any = await unit.connection.fetchval(_PURGE, line, limit)
    for owner, session_id in found or ():
        unit.note_gone(SessionKey(owner.decode(), session_id.decode()))
    return len(found or ())


async def _total(view: View, query: SessionQuery, life: LifeSpan) -> int | None:
    is_exact = rules.has_exact_total(query)
    if is_exact and query.owner is not None and None in (query.user_id, query.agent_id):
        return await _kept_total(view, query)
    conditions = Conditions(query, life)
    if is_exact:
        total: int = await view.connection.fetchval(
            f"SELECT count(*) FROM sessions WHERE {conditions.where}",
            *conditions.values,
        )
        return total
    counted: int = await view.connection.fetchval(
        f"SELECT count(*) FROM (SELECT 1 FROM sessions WHERE {conditions.where}"
        f" LIMIT {conditions.mark(rules.TOTAL_LIMIT + 1)}) AS found",
        *conditions.values,
    )
    return counted if counted <= rules.TOTAL_LIMIT else None


async def _kept_total(view: View, query: SessionQuery) -> int:
    assert query.owner is not None
    if query.user_id is not None:
        kind, name = "u", query.user_id
    else:
        kind, name = ("", "") if query.agent_id is None else ("a", query.agent_id)
    total: int = await view.connection.fetchval(_KEPT_TOTAL, query.owner.encode(), kind, name.encode())
    return total


def _readable(view: View, rows: Iterable[Any]) -> Iterable[Session]:
    """Yield the sessions in ``rows``; a broken one is left out, so that its neighbours stay listed."""
    for row in rows:
        try:
            yield from_record_row(view.sealer, row).session
        except SnapshotUnreadable as error:
            _log.error("session %r is unreadable and left out of a listing", error.session_id)


def _session_position(cursor: str | None) -> tuple[int, int]:
    if cursor is None:
        return EVER, EVER
    time_ms, tie = from_cursor("s", cursor)
    return time_ms, int(tie) if tie.isascii() and tie.isdigit() and len(tie) < 19 else 0
