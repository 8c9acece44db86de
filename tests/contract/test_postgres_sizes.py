"""What the PostgreSQL store does where there is much: many sessions, or large ones."""

from collections.abc import AsyncIterator
from dataclasses import replace

import asyncpg
import pytest

from app.domain.errors import StoreUnavailable
from app.domain.stats import SessionStats
from app.stores.postgres import PostgresStore

from .builders import BOOT, LIFE, T0, make_session, stored_session

IDLE_LIFE = replace(LIFE, idle_after_s=5)
MANY = 300


@pytest.fixture
async def store(postgres_url: str) -> AsyncIterator[PostgresStore]:
    store = PostgresStore(postgres_url, LIFE, accept_volatile=True)
    await store.open(BOOT)
    yield store
    await store.close()


@pytest.fixture
async def connection(store: PostgresStore, postgres_url: str) -> AsyncIterator[asyncpg.Connection]:
    """Somebody who looks into the tables."""
    connection = await asyncpg.connect(postgres_url)
    yield connection
    await connection.close()


def shown(stats: SessionStats) -> tuple[int, int, int, int]:
    return stats.active, stats.idle, stats.archived, stats.expired


async def test_another_idle_time_counts_all_sessions_in_one_step(
    store: PostgresStore, connection: asyncpg.Connection, postgres_url: str
) -> None:
    """However many change their status by it, the counters are written once, and right."""
    await store.create_sessions([make_session(f"s{number}", now=T0 + number) for number in range(MANY)])
    await store.expire_and_purge(T0 + 10_000, 1)
    assert shown(await store.get_session_stats()) == (MANY, 0, 0, 0)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("SELECT set_idle_after(5000)")
    written = await connection.fetchval(
        "SELECT n_tup_upd FROM pg_stat_xact_user_tables"
        " WHERE relname = 'counters' AND schemaname = current_schema()"
    )
    await transaction.rollback()
    assert written == 1
    other = PostgresStore(postgres_url, IDLE_LIFE, accept_volatile=True)
    await other.open("boot-2")
    assert shown(await other.get_session_stats()) == (0, MANY, 0, 0)
    await other.touch_session(make_session("s1").key, T0 + 20_000)
    assert shown(await other.get_session_stats()) == (1, MANY - 1, 0, 0)
    await other.close()


async def slow_down(connection: asyncpg.Connection, seconds: float) -> None:
    """Let each session take so long to remove, as large ones do."""
    await connection.execute(
        "CREATE FUNCTION be_slow() RETURNS trigger LANGUAGE plpgsql AS $$"
        f" BEGIN PERFORM pg_sleep({seconds}); RETURN OLD; END $$;"
        "CREATE TRIGGER be_slow BEFORE DELETE ON sessions FOR EACH ROW EXECUTE FUNCTION be_slow()"
    )


async def hurry(connection: asyncpg.Connection) -> None:
    await connection.execute("DROP FUNCTION IF EXISTS be_slow() CASCADE")


@pytest.mark.parametrize(("seconds", "count"), [(0.1, 20), (0.3, 4), (1.0, 2)])
async def test_large_sessions_are_purged_a_few_at_a_time(
    store: PostgresStore, connection: asyncpg.Connection, seconds: float, count: int
) -> None:
    """Where a step takes too long the purge goes on with fewer, and with one alone that takes seconds."""
    await store.create_sessions([make_session(f"s{number}", ttl_s=1) for number in range(count)])
    long_after = T0 + 1000 * (LIFE.ttl_s + LIFE.retention_s) * 10
    await slow_down(connection, seconds)
    try:
        assert await store.expire_and_purge(long_after, 100) == (count, count)
    finally:
        await hurry(connection)
    assert store.session_count_nowait() == (await store.get_session_stats()).total == 0


async def test_a_large_session_can_be_deleted(store: PostgresStore, connection: asyncpg.Connection) -> None:
    """A delete that the server works on for longer than other calls may take is done, one key or many."""
    one, *others = [await stored_session(store, f"s{number}") for number in range(4)]
    await slow_down(connection, 1.0)
    try:
        assert await store.delete_session(one.key)
        assert (await store.delete_sessions([session.key for session in others[:2]])).sessions == 2
    finally:
        await hurry(connection)
    assert await store.find_session(one.key) is None
    assert (await store.get_session_stats()).total == 1


async def test_a_slow_statement_is_not_taken_for_a_silent_server(
    store: PostgresStore, connection: asyncpg.Connection
) -> None:
    """Who asks for too much is told so by the server itself, and the next calls have all their time."""
    session = await stored_session(store)
    with pytest.raises(StoreUnavailable, match="takes too long"):
        await store._read(lambda view: view.connection.execute("SELECT pg_sleep(3)"))
    assert not store._link._is_silent
    assert await store.find_session(session.key) == session
