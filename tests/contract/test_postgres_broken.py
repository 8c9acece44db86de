"""What is broken in the PostgreSQL database concerns its session alone, and is taken for nothing else."""

from collections.abc import AsyncIterator

import asyncpg
import pytest

from app.domain.branch import Back
from app.domain.errors import SnapshotUnreadable
from app.domain.idempotency import Binding
from app.domain.session import SessionQuery
from app.domain.state import StateScope
from app.domain.turn import TurnStatus, Usage
from app.stores.postgres import PostgresStore

from .builders import (
    BOOT,
    LIFE,
    T0,
    current,
    extend,
    make_checkpoint,
    make_note,
    make_turn,
    new_id,
    running,
    stored_session,
)


@pytest.fixture
async def store(postgres_url: str) -> AsyncIterator[PostgresStore]:
    store = PostgresStore(postgres_url, LIFE, accept_volatile=True)
    await store.open(BOOT)
    yield store
    await store.close()


@pytest.fixture
async def database(store: PostgresStore, postgres_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(postgres_url)
    yield connection
    await connection.close()


@pytest.mark.parametrize(
    "change",
    [
        "title = 'other'::bytea",
        "head = NULL",
        "depth = depth + 1",
        "state = '{\"a\":2}'::bytea",
        "state_number = 7",
        "expires_at = NULL",
        "archived = NOT archived",
        "params = '\\xff'::bytea",
        "uid = '\\x00'::bytea",
        "seal = seal + 1",
    ],
)
async def test_a_changed_column_of_a_session_is_noticed(
    store: PostgresStore, database: asyncpg.Connection, change: str
) -> None:
    """The session is unreadable for reads and writes, left out of lists, and can be deleted; others go on."""
    broken = await stored_session(store, "broken", title="mine", state={"a": 1})
    broken, _ = await extend(store, broken, 1)
    other = await stored_session(store, "other")
    await database.execute(f"UPDATE sessions SET {change} WHERE session_id = 'broken'")
    with pytest.raises(SnapshotUnreadable) as caught:
        await store.find_session(broken.key)
    assert caught.value.session_id == "broken"
    with pytest.raises(SnapshotUnreadable):
        await store.touch_session(broken.key, T0)
    page = await store.list_sessions(SessionQuery(owner="", now=T0))
    assert [session.key.session_id for session in page.sessions] == ["other"]
    assert (await extend(store, other, 2))[0].depth == 2
    assert await store.delete_session(broken.key)
    assert (await store.get_session_stats()).total == 1


@pytest.mark.parametrize(
    "change",
    [
        "body = body || '\\x20'::bytea",
        "body = '\\x'::bytea",
        "parent = NULL",
        "depth = 1",
        "status = 3, kept = true",
        "model = 'other'::bytea",
        "started_at = started_at + 1",
        "state = 3",
    ],
)
async def test_a_changed_column_of_a_turn_is_noticed(
    store: PostgresStore, database: asyncpg.Connection, change: str
) -> None:
    """Its path cannot be loaded, it is listed as failed, and nothing goes back to it."""
    session, turns = await extend(store, await stored_session(store), 3)
    await database.execute(f"UPDATE turns SET {change} WHERE depth = 2")
    with pytest.raises(SnapshotUnreadable):
        await store.load_path(session)
    with pytest.raises(SnapshotUnreadable):
        await store.get_turn(session, turns[1].turn_id)
    with pytest.raises(SnapshotUnreadable):
        await store.move_head(session, Back(1), T0 + 9000)
    listed = {turn.turn_id: turn for turn in (await store.list_turns(session, 9)).turns}
    assert listed[turns[1].turn_id].status is TurnStatus.FAILED
    assert listed[turns[2].turn_id].status is TurnStatus.FINISHED
    assert await current(store, session) == session


async def test_a_missing_turn_is_a_broken_path(store: PostgresStore, database: asyncpg.Connection) -> None:
    """A gap on the path is no shorter path."""
    session, _ = await extend(store, await stored_session(store), 3)
    await database.execute("DELETE FROM turns WHERE depth = 1")
    with pytest.raises(SnapshotUnreadable):
        await store.load_path(session)
    with pytest.raises(SnapshotUnreadable):
        await store.list_branch(session, 9)


async def test_rows_of_another_session_do_not_count(
    store: PostgresStore, database: asyncpg.Connection
) -> None:
    """Notes, checkpoints and states that were swapped between sessions are unreadable in both."""
    sessions = []
    for name in ("a", "b"):
        session, (turn,) = await extend(store, await stored_session(store, name, state={"of": name}), 1)
        session = await store.add_note(session, make_note(turn.turn_id), Usage())
        made = await store.add_checkpoint(session, make_checkpoint())
        sessions.append((session, made))
    one, two = [row["id"] for row in await database.fetch("SELECT id FROM sessions ORDER BY id")]
    for table in ("notes", "checkpoints", "states"):
        await database.execute(f"UPDATE {table} SET session = -1 WHERE session = $1", one)
        await database.execute(f"UPDATE {table} SET session = $1 WHERE session = $2", one, two)
        await database.execute(f"UPDATE {table} SET session = $1 WHERE session = -1", two)
    for (session, _), (_, others) in zip(sessions, reversed(sessions), strict=True):
        with pytest.raises(SnapshotUnreadable):
            await store.get_checkpoint(session, others.checkpoint_id)
        assert (await store.list_checkpoints(session, 9)).checkpoints == ()
        with pytest.raises(SnapshotUnreadable):
            await store.load_path(session)
        with pytest.raises(SnapshotUnreadable):
            await store.move_head(session, Back(1), T0 + 9000)


async def test_broken_facts_keys_and_shared_state_are_noticed(
    store: PostgresStore, database: asyncpg.Connection
) -> None:
    """A fact is left out, with its neighbours told; a key and a shared state are unreadable."""
    session = await stored_session(store)
    turn = make_turn(session, binding=Binding("", "k", b"f" * 16))
    session = await store.commit_turn(session, turn)
    for number in range(3):
        await store.patch_state(session.key, {"n": number}, T0 + 5000 + number)
    scope = StateScope("default")
    await store.patch_shared(scope, {"a": 1}, T0)
    await database.execute("UPDATE session_events SET created_at = created_at + 1 WHERE number = 2")
    await database.execute("UPDATE idempotency_keys SET fingerprint = 'other'::bytea")
    await database.execute("UPDATE shared_state SET rev = rev + 1")
    assert len(await store.list_entries(session, None, 9, newest_first=False)) == 3
    assert len(await store.list_entries(session, None, 3, newest_first=True)) == 3
    with pytest.raises(SnapshotUnreadable):
        await store.find_bound("", "k")
    with pytest.raises(SnapshotUnreadable):
        await store.get_shared(scope)
    with pytest.raises(SnapshotUnreadable):
        await store.dump_session(session.key)


async def test_what_is_known_does_not_cover_what_broke(
    store: PostgresStore, database: asyncpg.Connection
) -> None:
    """A turn on a session whose row broke beside what a turn writes does not make the row whole."""
    session = await stored_session(store, title="mine")
    await database.execute("UPDATE sessions SET title = 'other'::bytea")
    turn = make_turn(session, turn_id=new_id())
    await store.start_turn(session, running(turn))
    await store.commit_turn(session, turn)
    with pytest.raises(SnapshotUnreadable):
        await store.find_session(session.key)
