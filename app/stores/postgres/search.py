"""Sessions by a text in their title where titles are encrypted: each is opened here.

One page looks at ``LOOK_LIMIT`` sessions at most; it may then hold fewer than were asked for, or none, and
its cursor goes on behind the last one looked at.
"""

import logging
from dataclasses import replace
from typing import Any, NamedTuple

from app.domain.errors import SnapshotUnreadable
from app.domain.ids import SessionKey
from app.domain.session import LifeSpan, SessionQuery
from app.stores import rules
from app.stores.postgres.conditions import Conditions
from app.stores.postgres.rows import RECORD_COLUMNS, from_raw_text
from app.stores.postgres.unit import View
from app.stores.session_texts import from_title
from app.stores.side_rows import Row

LOOK_LIMIT = 5000
STEP_SESSIONS = 500
"""How many titles are opened at a time: while that goes on, some milliseconds, no turn is served."""

_LIST = (
    "SELECT last_accessed, id, owner, session_id, uid, title FROM sessions WHERE {where}"
    " AND (last_accessed, id) < ({time}, {number}) ORDER BY last_accessed DESC, id DESC LIMIT {step}"
)
_GET = f"SELECT {RECORD_COLUMNS} FROM sessions WHERE id = ANY ($1) ORDER BY last_accessed DESC, id DESC"

Position = tuple[int, int]
"""The time of a session's last activity, and its number."""

_log = logging.getLogger(__name__)


class Hits(NamedTuple):
    """The records of a page; ``following`` is behind where the next page begins."""

    rows: list[Any]
    following: Position | None


async def search(view: View, query: SessionQuery, life: LifeSpan, after: Position) -> Hits:
    """Return the next ``query.limit`` sessions that fit."""
    found, last_seen = await _look(view, query, life, after, query.limit + 1)
    page = found[: query.limit]
    rows = await view.connection.fetch(_GET, [number for _, number in page])
    return Hits(rows, page[-1] if len(found) > len(page) else last_seen)


async def count(view: View, query: SessionQuery, life: LifeSpan, start: Position) -> int | None:
    """Return how many sessions ``search`` finds in all its pages, ``None`` if one look does not tell."""
    found, last_seen = await _look(view, query, life, start, rules.TOTAL_LIMIT + 1)
    return None if last_seen or len(found) > rules.TOTAL_LIMIT else len(found)


async def _look(
    view: View, query: SessionQuery, life: LifeSpan, after: Position, most: int
) -> tuple[list[Position], Position | None]:
    """Return up to ``most`` hits, and the last session looked at if there may be more behind it."""
    found: list[Position] = []
    looked = unreadable = 0
    while len(found) < most and looked < LOOK_LIMIT:
        rows = await _list(view, query, life, after)
        for last_accessed, number, *row in rows:
            try:
                if len(found) < most and _has(view, row, query.text or ""):
                    found.append((last_accessed, number))
            except (SnapshotUnreadable, ValueError):
                unreadable += 1
        looked += len(rows)
        if len(rows) < STEP_SESSIONS:
            break
        after = rows[-1][0], rows[-1][1]
    if unreadable:
        _log.error("%d titles are unreadable and not searched", unreadable)
    return found, after if looked == LOOK_LIMIT else None


async def _list(view: View, query: SessionQuery, life: LifeSpan, after: Position) -> list[Any]:
    conditions = Conditions(replace(query, text=None), life)
    time, number = map(conditions.mark, after)
    sql = _LIST.format(where=conditions.where, time=time, number=number, step=STEP_SESSIONS)
    rows: list[Any] = await view.connection.fetch(sql, *conditions.values)
    return rows


def _has(view: View, row: Row, text: str) -> bool:
    owner, session_id, uid, raw = row
    key = SessionKey(owner.decode(), session_id.decode())
    if key.session_id.startswith(text):
        return True
    title = from_title(view.sealer, key, uid, from_raw_text(raw))
    return title is not None and text.casefold() in title.casefold()
