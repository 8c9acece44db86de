"""What two processes may do to each other in PostgreSQL, and what is when it has lost its last writes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest

from app.domain.errors import KeyTaken, SnapshotUnreadable, StoreUnavailable
from app.domain.idempotency import Binding
from app.domain.session import Session, SessionChange
from app.stores.postgres import PostgresStore

from .builders import BOOT, LIFE, T0, current, make_session, make_turn, running

BINDING = Binding("", "k", b"f" * 32)


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


def meanwhile(store: PostgresStore, act: Callable[[], Awaitable[object]]) -> None:
    """Have something done between the first statement of ``store``'s next call and its second."""
    run, calls = store._link.run, 0

    async def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            await act()
        return await run(*args, **options)

    store._link.run = counted  # type: ignore[method-assign]


async def test_a_start_whose_key_is_taken_meanwhile_keeps_no_lease(
    store: PostgresStore, other: PostgresStore
) -> None:
    """Between a start's two statements somebody else takes the key: the session is free again."""
    session, rival = make_session(), make_session("rival")
    await other.create_sessions([session, rival])
    meanwhile(store, lambda: other.start_turn(rival, running(make_turn(rival, binding=BINDING))))
    with pytest.raises(KeyTaken):
        await store.start_turn(session, running(make_turn(session, binding=BINDING)))
    assert await other.leases.holder(session.key) is None


async def test_a_start_that_finds_a_broken_record_keeps_no_lease(
    store: PostgresStore, other: PostgresStore, connection: asyncpg.Connection
) -> None:
    """The record that comes with the lease cannot be read: the session is free again."""
    session = make_session()
    await other.create_session(session)
    await connection.execute("UPDATE sessions SET seal = seal + 1")
    with pytest.raises(SnapshotUnreadable):
        await store.start_turn(session, running(make_turn(session)))
    assert await other.leases.holder(session.key) is None


async def test_a_start_of_a_session_that_others_change_all_the_time_keeps_no_lease(
    store: PostgresStore, other: PostgresStore
) -> None:
    """A start that never meets the record that it has just read gives up, and the session is free again."""
    session = make_session()
    await other.create_session(session)
    run = store._link.run

    async def changed_before(*args: Any, **options: Any) -> Any:
        await other.touch_session(session.key, T0 + 1)
        return await run(*args, **options)

    store._link.run = changed_before  # type: ignore[method-assign]
    with pytest.raises(StoreUnavailable, match="changes all the time"):
        await store.start_turn(session, running(make_turn(session)))
    assert await other.leases.holder(session.key) is None


async def test_a_start_that_cannot_give_its_lease_back_says_so(
    store: PostgresStore, other: PostgresStore
) -> None:
    """Where the server is gone after the first statement, what became of the start is in doubt."""
    session = make_session()
    await other.create_session(session)

    async def lose() -> None:
        store._link._target = "postgresql://127.0.0.1:1/none"
        assert store._link._pool is not None
        store._link._pool.terminate()
        store._link._pool = await store._link._make_pool()

    meanwhile(store, lose)
    turn = make_turn(session)
    with pytest.raises(StoreUnavailable) as caught:
        await store.start_turn(session, running(turn))
    assert caught.value.outcome_unknown
    held = await other.leases.holder(session.key)
    assert held is not None
    assert held.nonce == turn.turn_id


async def test_taking_a_key_over_and_reaping_do_not_wait_for_each_other(
    store: PostgresStore, other: PostgresStore, connection: asyncpg.Connection
) -> None:
    """Who repeats a turn with its key waits for a reaper that has the lease, and neither fails."""
    session = make_session()
    await store.create_session(session)
    await store.start_turn(session, running(make_turn(session, binding=BINDING)))
    await connection.execute("UPDATE leases SET until = clock_timestamp()")
    found = await current(other, session)
    reaping = connection.transaction()
    await reaping.start()
    await connection.execute("SELECT * FROM leases FOR UPDATE")
    loop = asyncio.get_running_loop()
    again = loop.create_task(other.start_turn(found, running(make_turn(found, binding=BINDING))))
    await until_locked(connection)
    assert await connection.fetchval("SELECT reap_leases(100)") == 1
    await reaping.commit()
    assert await again is None
    assert await other.leases.holder(session.key) is not None


async def test_a_row_that_is_locked_too_long_is_tried_twice(
    store: PostgresStore, connection: asyncpg.Connection
) -> None:
    """A write waits for another one's row only so long, and has then time for a second try."""
    session = make_session()
    await store.create_session(session)
    holding = connection.transaction()
    await holding.start()
    await connection.execute("SELECT * FROM sessions FOR UPDATE")
    loop = asyncio.get_running_loop()
    touching = loop.create_task(store.touch_session(session.key, T0 + 1))
    first = await until_locked(connection)
    while await until_locked(connection) == first:
        pass
    await holding.rollback()
    assert (await touching).last_accessed == T0 + 1


async def until_locked(connection: asyncpg.Connection) -> int:
    """Return which process of the server waits for a row of somebody else's."""
    async with asyncio.timeout(5):
        while True:
            pid: int | None = await connection.fetchval(
                "SELECT pid FROM pg_locks"
                " WHERE NOT granted AND pg_blocking_pids(pid) @> ARRAY[pg_backend_pid()]"
            )
            if pid is not None:
                return pid


async def test_a_hurry_of_many_for_one_session_ends_well(store: PostgresStore) -> None:
    """Forty changes of one session at once wait for each other's locks and are all done."""
    session: Session = make_session(state={"n": 0})
    await store.create_session(session)
    await asyncio.gather(*(store.patch_state(session.key, {f"k{n}": n}, T0 + n) for n in range(40)))
    assert len((await current(store, session)).state) == 41
