"""What several contract tests assert of a session's branch, asked in every way there is, or wait for."""

import asyncio
from dataclasses import replace

import asyncpg

from app.domain.session import Session
from app.domain.turn import ContextMessage, Turn
from app.ports import SessionStore


def said(turns: list[Turn]) -> tuple[ContextMessage, ...]:
    return tuple(message for turn in turns for message in turn.messages)


async def on_branch(store: SessionStore, session: Session) -> set[str]:
    """Return the turns that the store shows as on the branch, having compared both ways of asking."""
    page = await store.list_turns(session, 200)
    for turn in page.turns:
        assert await store.get_turn(session, turn.turn_id) == turn
    return {turn.turn_id for turn in page.turns if turn.on_branch}


async def check_branch(store: SessionStore, session: Session, turns: list[Turn]) -> None:
    """Assert that the branch of ``session`` is exactly ``turns``, whichever way one asks."""
    assert await store.find_session(session.key) == session
    assert (session.head, session.depth) == (turns[-1].turn_id if turns else None, len(turns))
    assert (await store.load_path(session)).messages == said(turns)
    assert await store.list_branch(session, 200) == tuple(replace(turn, on_branch=True) for turn in turns)
    assert await on_branch(store, session) == {turn.turn_id for turn in turns}


async def until_awaited(url: str) -> None:
    """Return when somebody waits for a lease in this PostgreSQL schema."""
    connection = await asyncpg.connect(url)
    async with asyncio.timeout(5):
        while not await connection.fetchval("SELECT count(*) FROM leases WHERE is_awaited"):
            pass
    await connection.close()
