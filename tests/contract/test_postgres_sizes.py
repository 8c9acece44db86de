"""What the PostgreSQL store does where there is much: many sessions, or large ones."""

from collections.abc import AsyncIterator
from dataclasses import replace

import asyncpg
import pytest

from app.domain.stats import SessionStats
from app.stores.postgres import PostgresStore

from .builders import BOOT, LIFE, T0, make_session

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
