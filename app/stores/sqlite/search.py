"""Sessions by a text in their title where titles are encrypted: SQL cannot look into them, so each is opened.

That takes some 3 µs for each, and as long again for the total. So one page looks at ``LOOK_LIMIT``
sessions at most; it may then hold fewer than were asked for, or none, and its cursor goes on behind
the last one looked at.
"""

import logging
from typing import Any, NamedTuple

from app.domain.errors import SnapshotUnreadable
from app.domain.ids import SessionKey
from app.stores import rules
from app.stores.sealing import Sealer
from app.stores.session_texts import from_title
from app.stores.side_rows import Row
from app.stores.sqlite.connection import Connection

LOOK_LIMIT = 5000

_LIST = (
    "SELECT last_accessed, id, owner, session_id, uid, title FROM sessions WHERE {where}"
    " AND (last_accessed, id) < (:time, :number) ORDER BY last_accessed DESC, id DESC LIMIT :looks"
)
_START = {"time": 2**62, "number": 2**62}

Position = tuple[int, int]
"""The time of a session's last activity, and its number."""

_log = logging.getLogger(__name__)


class Hits(NamedTuple):
    """Where the sessions of a page are; ``following`` is where the next page begins behind."""

    positions: list[Position]
    following: Position | None


def search(connection: Connection, where: str, values: dict[str, Any], text: str, limit: int) -> Hits:
    """Return the next ``limit`` sessions that have ``text`` where the SQL ``where`` is true."""
    found, last_seen = _look(connection, where, values, text, limit + 1)
    if len(found) > limit:
        return Hits(found[:limit], found[limit - 1])
    return Hits(found, last_seen)


def count(connection: Connection, where: str, values: dict[str, Any], text: str) -> int | None:
    """Return how many sessions ``search`` finds in all its pages, ``None`` if one look does not tell."""
    found, last_seen = _look(connection, where, values | _START, text, rules.TOTAL_LIMIT + 1)
    return None if last_seen or len(found) > rules.TOTAL_LIMIT else len(found)


def _look(
    connection: Connection, where: str, values: dict[str, Any], text: str, most: int
) -> tuple[list[Position], Position | None]:
    """Return up to ``most`` hits, and the last session looked at if there may be more behind it."""
    found: list[Position] = []
    looked, unreadable, position = 0, 0, None
    rows = connection.execute(_LIST.format(where=where), values | {"looks": LOOK_LIMIT})
    for last_accessed, number, *row in rows:
        looked, position = looked + 1, (last_accessed, number)
        try:
            if _has(connection.sealer, row, text, values["folded"]):
                found.append(position)
        except (SnapshotUnreadable, TypeError, AttributeError):
            unreadable += 1
        if len(found) == most:
            break
    rows.close(True)
    if unreadable:
        _log.error("%d titles are unreadable and not searched", unreadable)
    return found, position if looked == LOOK_LIMIT else None


def _has(sealer: Sealer, row: Row, text: str, folded: str) -> bool:
    owner, session_id, uid, stored = row
    if session_id.startswith(text):
        return True
    title = from_title(sealer, SessionKey(owner, session_id), uid, stored)
    return title is not None and folded in title.casefold()
