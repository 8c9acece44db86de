"""How what is in memory is listed: what fits, in which order, a page at a time."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from app.domain.session import LifeSpan, Session, SessionQuery
from app.domain.turn import Turn
from app.stores.cursor import from_cursor, to_cursor

T = TypeVar("T")


def page_of(
    items: Iterable[T], order: Callable[[T], tuple[int, str]], kind: str, cursor: str | None, limit: int
) -> tuple[tuple[T, ...], str | None]:
    """Return up to ``limit`` items behind the cursor, the highest first, and the cursor of what follows.

    Raises:
        InvalidInput: the cursor is not one of this ``kind``.
    """
    after = None if cursor is None else from_cursor(kind, cursor)
    rest = sorted((i for i in items if after is None or order(i) < after), key=order, reverse=True)
    page = tuple(rest[:limit])
    return page, to_cursor(kind, *order(page[-1])) if len(rest) > len(page) else None


def session_order(session: Session) -> tuple[int, str]:
    return session.last_accessed, session.uid


def turn_order(turn: Turn) -> tuple[int, str]:
    return turn.started_at, turn.turn_id


def fits(session: Session, query: SessionQuery, life: LifeSpan) -> bool:
    return (
        (query.owner is None or session.key.owner == query.owner)
        and (query.user_id is None or session.user_id == query.user_id)
        and (query.agent_id is None or session.agent_id == query.agent_id)
        and (query.window_id is None or session.window_id == query.window_id)
        and (query.status is None or session.status_at(query.now, life) is query.status)
        and (query.text is None or _contains(session, query.text))
    )


def _contains(session: Session, text: str) -> bool:
    return text.casefold() in (session.title or "").casefold() or session.key.session_id.startswith(text)
