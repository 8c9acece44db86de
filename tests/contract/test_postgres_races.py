"""What two processes may do to each other in PostgreSQL, and what is when it has lost its last writes."""

from collections.abc import AsyncIterator

import asyncpg
import pytest

from app.domain.session import SessionChange
from app.stores.postgres import PostgresStore

from .builders import BOOT, LIFE, T0, current, make_session, make_turn, running


@pytest.fixture
async def store(postgres_url: str) -> AsyncIterator[PostgresStore]:
    store = PostgresStore(postgres_url, LIFE, accept_volatile=True)
    await store.open(BOOT)
    yield store
    await store.close()


@pytest.fixture
async def other(store: PostgresStore, postgres_url: str) -> AsyncIterator[PostgresStore]:
    """Another process."""
    other = PostgresStore(postgres_url, LIFE, accept_volatile=True)
    await other.open("boot-2")
    yield other
    await other.close()


@pytest.fixture
async def connection(store: PostgresStore, postgres_url: str) -> AsyncIterator[asyncpg.Connection]:
    """Somebody who looks into the tables."""
    connection = await asyncpg.connect(postgres_url)
    yield connection
    await connection.close()


@pytest.mark.parametrize("change", ["state", "title"])
async def test_what_others_wrote_after_a_crash_is_not_overwritten(
    store: PostgresStore, other: PostgresStore, connection: asyncpg.Connection, change: str
) -> None:
    """A start that a crash took back and another's write since then are told apart when the turn commits."""
    session = make_session(state={"k": "old"})
    await store.create_session(session)
    await connection.execute("CREATE TABLE before AS SELECT * FROM sessions")
    turn = make_turn(session)
    await store.start_turn(session, running(turn))
    await connection.execute(
        "UPDATE sessions AS s SET last_accessed = b.last_accessed, expires_at = b.expires_at,"
        " marked_idle = b.marked_idle, seal = b.seal, stamp = b.stamp FROM before AS b;"
        "DELETE FROM turns; DELETE FROM leases; DROP TABLE before"
    )
    if change == "state":
        await other.patch_state(session.key, {"k": "new"}, T0 + 5000)
    else:
        await other.update_session(session.key, SessionChange(title="new"), T0 + 5000)
    committed = await store.commit_turn(session, turn)
    assert committed.head == turn.turn_id
    assert (committed.state["k"], committed.title) == (("new", None) if change == "state" else ("old", "new"))
    assert await current(other, session) == committed
