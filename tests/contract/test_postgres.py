"""What the PostgreSQL store promises beyond the port: how it opens, and what its calls cost."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import asyncpg
import pytest

from app.domain.errors import StoreUnavailable
from app.domain.session import Session, SessionQuery, SessionStatus
from app.domain.turn import Usage
from app.stores.codec import to_turn_body
from app.stores.opening import open_store
from app.stores.postgres import PostgresStore, boot, checkpoints, journal, listing, reads
from app.stores.postgres.link import Connection
from app.stores.postgres.rows import new_stamp
from app.stores.postgres.turns import commit_turn
from app.stores.postgres.unit import Unit
from app.stores.sealing import NO_KEYS
from tests.postgresserver import PostgresServer, free_port

from .builders import (
    BOOT,
    LIFE,
    T0,
    extend,
    failed,
    make_checkpoint,
    make_session,
    make_turn,
    running,
    stored_session,
)
from .checks import until_awaited
from .children import open_and_count


@pytest.fixture
async def store(postgres_url: str) -> AsyncIterator[PostgresStore]:
    store = PostgresStore(postgres_url, LIFE, accept_volatile=True)
    await store.open(BOOT)
    yield store
    await store.close()


class Statements:
    """What a store's connections are asked, from now on."""

    def __init__(self, store: PostgresStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        original = store._link._try

        async def listening(work: Any, progress: Any) -> Any:
            async def heard(connection: Connection) -> Any:
                connection.add_query_logger(self._note)
                try:
                    return await work(connection)
                finally:
                    connection.remove_query_logger(self._note)

            return await original(heard, progress)

        monkeypatch.setattr(store._link, "_try", listening)

    def _note(self, record: Any) -> None:
        self.asked.append(record.query)


async def test_a_warm_turn_is_two_statements(store: PostgresStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for the start and one for the commit, each turn: also with state, a user and a key."""
    session = await stored_session(store, user_id="u", state={"a": 1})
    statements = Statements(store, monkeypatch)
    for number in range(3):
        turn = make_turn(session, f"q{number}")
        assert await store.start_turn(session, running(turn)) is None
        session = await store.commit_turn(session, turn)
    assert len(statements.asked) == 6
    assert session.depth == 3
    turn = make_turn(session)
    await store.start_turn(session, running(turn))
    await store.record_turn(session, failed(turn))
    assert len(statements.asked) == 8


async def test_a_session_that_moved_on_elsewhere_costs_one_statement_more(
    store: PostgresStore, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the other process made of it comes with the answer, and the next start is told so."""
    session = await stored_session(store)
    other = PostgresStore(postgres_url, LIFE, accept_volatile=True)
    await other.open("boot-2")
    found = await other.find_session(session.key)
    assert found is not None
    moved = await other.commit_turn(found, make_turn(found))
    await other.close()
    statements = Statements(store, monkeypatch)
    known = store.recall_session(session.key)
    assert known == session
    turn = make_turn(moved)
    assert await store.start_turn(known, running(replace(turn, parent=None, depth=1))) == moved
    assert await store.start_turn(moved, running(turn)) is None
    await store.commit_turn(moved, turn)
    assert len(statements.asked) == 3


async def test_ten_processes_may_open_a_fresh_database_at_once(postgres: PostgresServer) -> None:
    """Each finds the schema whole, and it was made once."""
    postgres.execute("DROP SCHEMA IF EXISTS fresh CASCADE; CREATE SCHEMA fresh")
    postgres_url = f"{postgres.url}?search_path=fresh"
    counts = await asyncio.gather(*(open_and_count(postgres_url, f"p{number}") for number in range(10)))
    assert counts == ["1"] * 10
    connection = await asyncpg.connect(postgres_url)
    assert await connection.fetchval("SELECT count(*) FROM migrations") == len(boot.migrations())
    assert await connection.fetchval("SELECT count(*) FROM sessions") == 10
    await connection.close()


async def test_a_newer_schema_is_refused(postgres_url: str) -> None:
    """A database that a newer version has written is left alone, with one line."""
    connection = await asyncpg.connect(postgres_url)
    await connection.execute("CREATE TABLE IF NOT EXISTS migrations (number integer PRIMARY KEY)")
    await connection.execute("INSERT INTO migrations VALUES (999)")
    try:
        with pytest.raises(StoreUnavailable, match="a newer version has written it"):
            await PostgresStore(postgres_url, LIFE, accept_volatile=True).open(BOOT)
    finally:
        await connection.execute("DELETE FROM migrations WHERE number = 999")
        await connection.close()


async def test_a_server_that_may_lose_what_it_acknowledged_is_refused(postgres_url: str) -> None:
    """Without accept_volatile, a server with fsync off is not opened, and the line says what to do."""
    with pytest.raises(StoreUnavailable, match=r"fsync = off.*--accept-volatile"):
        await PostgresStore(postgres_url, LIFE).open(BOOT)


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "no-such-host.invalid:5432"])
async def test_a_server_that_is_not_there_gives_one_line(host: str) -> None:
    """Opening fails soon, without a word of the URL or the password."""
    store = open_store(f"postgresql://me:hunter2@{host.format(port=free_port())}/x", LIFE)
    async with asyncio.timeout(5):
        with pytest.raises(StoreUnavailable) as caught:
            await store.open(BOOT)
    assert caught.value.detail == "The database cannot be reached."
    assert "hunter2" not in repr(caught.value)


async def test_a_wrong_url_gives_one_line() -> None:
    """What is no URL is refused without repeating it."""
    with pytest.raises(StoreUnavailable, match="cannot be read") as caught:
        await open_store("postgresql://me:hunter2@[::1/x", LIFE).open(BOOT)
    assert "hunter2" not in str(caught.value)


async def test_a_pool_of_somebody_else_stays_open(postgres_url: str) -> None:
    """A store may be given a pool; closing the store leaves it open, and the store can be used before."""
    async with asyncpg.create_pool(postgres_url, min_size=1, max_size=3) as pool:
        store = PostgresStore(pool, LIFE, accept_volatile=True)
        await store.open(BOOT)
        session, _ = await extend(store, await stored_session(store), 2)
        turn = make_turn(session)
        await store.start_turn(session, running(turn))
        await store.leases.wait_free(session.key, 0.05)
        await store.commit_turn(session, turn)
        await store.close()
        assert await pool.fetchval("SELECT count(*) FROM turns") == 3


async def test_commits_do_not_wait_for_each_other(store: PostgresStore) -> None:
    """While one commit is held open before its end, commits and new sessions of its owner and user go on."""
    held, *others = [await stored_session(store, f"s{n}", user_id="u") for n in range(30)]
    turn, reached, gate = make_turn(held), asyncio.Event(), asyncio.Event()

    async def work(connection: Connection) -> Session:
        session = await commit_turn(
            Unit(connection, NO_KEYS, LIFE), held, turn, to_turn_body(turn), False, None
        )
        reached.set()
        async with asyncio.timeout(5):
            await gate.wait()
        return session

    holding = asyncio.get_running_loop().create_task(store._link.transact(work, limit_s=10))
    await reached.wait()
    async with asyncio.timeout(5):
        await asyncio.gather(*(extend(store, session, 2) for session in others))
        await stored_session(store, "new", user_id="u")
    assert not holding.done()
    gate.set()
    assert (await holding).head == turn.turn_id
    assert (await store.get_usage("", "u", 1)).turns == 59
    page = await store.list_sessions(SessionQuery(owner="", now=T0, user_id="u"))
    assert page.total == 31


async def test_who_waits_is_woken_at_once(store: PostgresStore, postgres_url: str) -> None:
    """A commit in one process wakes who waits for the session in another: far sooner than by looking."""
    other = PostgresStore(postgres_url, LIFE, accept_volatile=True)
    await other.open("boot-2")
    session = await stored_session(store)
    loop = asyncio.get_running_loop()
    for _ in range(3):
        turn = make_turn(session)
        await store.start_turn(session, running(turn))
        waiting = loop.create_task(other.leases.wait_free(session.key, 20))
        await until_awaited(postgres_url)
        session = await store.commit_turn(session, turn)
        freed = loop.time()
        await waiting
        assert loop.time() - freed < 0.2
    await other.close()


async def test_a_schema_may_have_a_long_name(postgres: PostgresServer) -> None:
    """Who waits is woken also where the schema's name has all the letters that PostgreSQL permits."""
    name = "s" * 63
    postgres.execute(f"DROP SCHEMA IF EXISTS {name} CASCADE; CREATE SCHEMA {name}")
    url = f"{postgres.url}?search_path={name}"
    store = PostgresStore(url, LIFE, accept_volatile=True)
    await store.open(BOOT)
    session = await stored_session(store)
    turn = make_turn(session)
    await store.start_turn(session, running(turn))
    waiting = asyncio.get_running_loop().create_task(store.leases.wait_free(session.key, 20))
    await until_awaited(url)
    await store.commit_turn(session, turn)
    async with asyncio.timeout(1):
        await waiting
    await store.close()


async def test_a_waiter_outlives_the_connection_that_it_listened_on(
    store: PostgresStore, postgres_url: str
) -> None:
    """When the listening connection breaks, who waits returns, and the next one listens on a new one."""
    session = await stored_session(store)
    turn = make_turn(session)
    await store.start_turn(session, running(turn))
    loop = asyncio.get_running_loop()
    waiting = loop.create_task(store.leases.wait_free(session.key, 20))
    await until_awaited(postgres_url)
    connection = await asyncpg.connect(postgres_url)
    killed = await connection.fetchval(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'"
    )
    assert killed >= 1
    async with asyncio.timeout(5):
        await waiting
    await connection.execute("UPDATE leases SET is_awaited = false")
    waiting = loop.create_task(store.leases.wait_free(session.key, 20))
    await until_awaited(postgres_url)
    await store.commit_turn(session, turn)
    async with asyncio.timeout(5):
        await waiting
    await connection.close()


QUERIES = [
    {"owner": "o1"},
    {"owner": None},
    {"owner": "o1", "user_id": "u1"},
    {"owner": "o1", "status": SessionStatus.ACTIVE},
]


@pytest.mark.parametrize("fields", QUERIES)
async def test_pages_of_sessions_go_by_index(store: PostgresStore, fields: dict[str, Any]) -> None:
    """No page needs sorting, whatever the filter: rows come in an index's order, behind the last page."""
    made = [make_session(f"s{n}", owner=f"o{n % 10}", user_id=f"u{n % 50}", now=T0 + n) for n in range(500)]
    await store.create_sessions(made)
    page = await store.list_sessions(SessionQuery(now=T0, limit=5, **fields))
    query = SessionQuery(now=T0, limit=5, cursor=page.next_cursor, **fields)
    sql, values = listing.page_of(query, LIFE)
    plan = await explain(store, sql, *values)
    assert "Index Scan Backward using sessions_by_" in plan
    assert "Sort" not in plan


@pytest.mark.parametrize(
    ("sql", "index"),
    [
        (reads.LIST_TURNS, "turns_by_start"),
        (journal.LIST_TURNS.format(beyond=">", order="ASC"), "turns_by_start"),
        (journal.LIST_FACTS.format(beyond="<", order="DESC"), "session_events_by_time"),
        (checkpoints.LIST, "checkpoints_by_time"),
    ],
)
async def test_pages_of_a_session_go_by_index(store: PostgresStore, sql: str, index: str) -> None:
    """Turns, facts and checkpoints are read in the order of an index, too."""
    key = 0 if "session_events" in sql else bytes(16)
    plan = await explain(store, sql, 1, T0, key, 5)
    assert index in plan
    assert "Sort" not in plan


async def explain(store: PostgresStore, sql: str, *values: Any) -> str:
    """Return the plan where sorting and reading whole tables are the last resort, as with many rows."""

    async def work(connection: Connection) -> str:
        for way in ("seqscan", "bitmapscan", "sort"):
            await connection.execute(f"SET LOCAL enable_{way} = off")
        return "\n".join(row[0] for row in await connection.fetch(f"EXPLAIN {sql}", *values))

    return await store._link.transact(work)


async def test_a_cancelled_read_leaves_no_transaction(store: PostgresStore, postgres: PostgresServer) -> None:
    """Cancelled at any moment of a read, the store goes on, and the server has no transaction left over."""
    session, _ = await extend(store, await stored_session(store), 3)
    for steps in range(12):
        call = asyncio.get_running_loop().create_task(store.list_turns(session, 10))
        for _ in range(steps):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert (await store.list_turns(session, 10)).total == 3
    await store.add_checkpoint(session, make_checkpoint())
    assert (await store.get_usage("", "nobody", 1)).turns == Usage().total_tokens
    connection = await asyncpg.connect(postgres.url)
    async with asyncio.timeout(5):
        while await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE application_name = 'agentpool' AND state LIKE 'idle in%'"
        ):
            pass
    await connection.close()


async def test_a_cancelled_start_leaves_no_lease(store: PostgresStore) -> None:
    """Cancelled at any moment, neither a turn's lease nor its record is left, nor a hold's lease."""
    sessions = [await stored_session(store, f"s{steps}") for steps in range(12)]
    loop, cancelled = asyncio.get_running_loop(), []
    for steps, session in enumerate(sessions):
        hold = make_session(f"none-{steps}").key
        calls = {
            session.key: loop.create_task(store.start_turn(session, running(make_turn(session)))),
            hold: loop.create_task(store.leases.take(hold, "a hold")),
        }
        for _ in range(steps):
            await asyncio.sleep(0)
        for call in calls.values():
            call.cancel()
        await asyncio.gather(*calls.values(), return_exceptions=True)
        cancelled += [key for key, call in calls.items() if call.cancelled()]
    await store.close()
    await store.open(BOOT)
    assert len(cancelled) > 6
    for key in cancelled:
        assert await store.leases.holder(key) is None
        await store.leases.take(key, "another hold")
    for session in sessions:
        assert session.key not in cancelled or (await store.list_turns(session, 9)).total == 0


async def test_a_database_that_came_back_older_is_believed(store: PostgresStore) -> None:
    """A record that is newer than the stored one is forgotten when that is read, not recalled for ever."""
    session, _ = await extend(store, await stored_session(store), 2)
    record = store._records.find(session.key)
    assert record is not None
    newer = replace(session, head=None, rev=session.rev + 1)
    store._records.keep(record._replace(session=newer, stamp=new_stamp()))
    assert store.recall_session(session.key) == newer
    assert await store.find_session(session.key) == session
    assert store.recall_session(session.key) == session
