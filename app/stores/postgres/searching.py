"""A search through titles that only this process can read: page by page, newest activity first.

It reads of each session what opening its title takes. A request looks through ``MOST_SESSIONS``; a page
that ends there may be short, or empty, and the next one goes on from there.
"""

from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from app.domain.errors import SnapshotUnreadable
from app.domain.ids import SessionKey
from app.domain.session import LifeSpan, SessionQuery
from app.stores import rules
from app.stores.postgres.conditions import Search
from app.stores.postgres.rows import RECORD_COLUMNS, from_raw_text
from app.stores.postgres.unit import View
from app.stores.session_texts import from_title
from app.stores.side_rows import Row

STEP_SESSIONS = 500
"""How many titles are opened at a time: while that goes on, some milliseconds, no turn is served."""
MOST_SESSIONS = 10_000
_COLUMNS = "last_accessed, id, owner, session_id, uid, title"
_FIND = f"SELECT {RECORD_COLUMNS} FROM sessions WHERE id = ANY ($1) ORDER BY last_accessed DESC, id DESC"  # noqa: S608

Place = tuple[int, int]
"""The last activity of a session, and its number."""


class Found(NamedTuple):
    """The records of a page, and the place behind which the next one begins, ``None`` if there is none."""

    rows: list[Any]
    after: Place | None


async def find_page(view: View, query: SessionQuery, life: LifeSpan, after: Place) -> Found:
    """Return up to ``query.limit`` sessions that fit."""
    places: list[Place] = []
    read, place = 0, after
    async for row in _scan(view, query, life, after):
        if _fits(view, row, query):
            if len(places) == query.limit:
                return Found(await _records_at(view, places), places[-1])
            places.append((row[0], row[1]))
        read, place = read + 1, (row[0], row[1])
    return Found(await _records_at(view, places), place if read == MOST_SESSIONS else None)


async def count(view: View, query: SessionQuery, life: LifeSpan, first: Place) -> int | None:
    """Return how many sessions fit, ``None`` if they are too many, or too many to look through."""
    fitting, read = 0, 0
    async for row in _scan(view, query, life, first):
        fitting, read = fitting + _fits(view, row, query), read + 1
        if fitting > rules.TOTAL_LIMIT:
            return None
    return None if read == MOST_SESSIONS else fitting


async def _scan(view: View, query: SessionQuery, life: LifeSpan, after: Place) -> AsyncIterator[Row]:
    """Yield ``_COLUMNS`` of the sessions that fit but for the text, at most ``MOST_SESSIONS``."""
    for _ in range(MOST_SESSIONS // STEP_SESSIONS):
        search = Search(replace(query, text=None), life)
        behind = f"(last_accessed, id) < ({search.mark(after[0])}, {search.mark(after[1])})"
        rows: list[Any] = await view.connection.fetch(
            f"SELECT {_COLUMNS} FROM sessions WHERE {search.where} AND {behind}"  # noqa: S608
            f" ORDER BY last_accessed DESC, id DESC LIMIT {STEP_SESSIONS}",
            *search.values,
        )
        for row in rows:
            yield row
        if len(rows) < STEP_SESSIONS:
            return
        after = rows[-1][0], rows[-1][1]


def _fits(view: View, row: Row, query: SessionQuery) -> bool:
    _, _, owner, session_id, uid, raw = row
    assert query.text is not None
    try:
        key = SessionKey(owner.decode(), session_id.decode())
        title = from_title(view.sealer, key, uid, from_raw_text(raw)) or ""
    except (SnapshotUnreadable, ValueError):
        return False  # it would be left out of the page, too
    return query.text.casefold() in title.casefold() or key.session_id.startswith(query.text)


async def _records_at(view: View, places: Iterable[Place]) -> list[Any]:
    rows: list[Any] = await view.connection.fetch(_FIND, [number for _, number in places])
    return rows
