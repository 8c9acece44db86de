"""What SQLite alone can show of moving: broken rows, and how little a copy keeps twice."""

from collections.abc import AsyncIterator
from pathlib import Path

import apsw
import pytest

from app.domain.errors import SnapshotUnreadable, StoreUnavailable
from app.domain.ids import SessionKey
from app.domain.state import StateScope
from app.stores.sqlite.store import SqliteStore

from .builders import BOOT, LIFE, T0, extend, stored_session
from .moving import copy_all, dumped, fill, get_dump

HIT = SessionKey("", "tree")
OF_HIT = "session = (SELECT id FROM sessions WHERE owner = '' AND session_id = 'tree')"


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "agentpool.db")


@pytest.fixture
async def store(path: str) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(path, LIFE)
    await store.open(BOOT)
    yield store
    await store.close()


def damage(path: str, statement: str) -> None:
    with apsw.Connection(path) as connection:
        connection.execute(statement)
        assert connection.changes() > 0
    connection.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE sessions SET title = 'x' WHERE session_id = 'tree'",
        f"UPDATE turns SET depth = depth + 1 WHERE depth = 2 AND {OF_HIT}",
        f"UPDATE states SET body = x'00' WHERE number = 2 AND {OF_HIT}",
        f"DELETE FROM states WHERE number = 2 AND {OF_HIT}",
        f"UPDATE notes SET tokens_after = 0 WHERE {OF_HIT}",
        f"UPDATE checkpoints SET automatic = 0 WHERE automatic = 1 AND {OF_HIT}",
        f"UPDATE session_events SET created_at = created_at + 1 WHERE number = 1 AND {OF_HIT}",
        f"UPDATE idempotency_keys SET fingerprint = x'00' WHERE key = 'key-1' AND {OF_HIT}",
    ],
)
async def test_whatever_is_broken_in_a_session_is_noticed(
    store: SqliteStore, path: str, statement: str
) -> None:
    """Its dump raises and names the session; every other one is still given, and it is still listed."""
    full = await fill(store)
    damage(path, statement)
    with pytest.raises(SnapshotUnreadable) as caught:
        await store.dump_session(HIT)
    assert caught.value.session_id == "tree"
    assert [(await get_dump(store, key)).session.key for key in full.keys[1:]] == full.keys[1:]
    assert await store.list_after(None, 99) == tuple(sorted(full.keys))


async def test_a_missing_turn_makes_the_dump_less_than_whole(store: SqliteStore, path: str) -> None:
    """A row that is gone breaks no other row's seal, but the dump shows that something lacks."""
    session, _ = await extend(store, await stored_session(store), 3)
    assert (await get_dump(store, session.key)).is_whole()
    damage(path, "DELETE FROM turns WHERE depth = 2")
    assert not (await get_dump(store, session.key)).is_whole()


async def test_a_broken_session_is_replaced(store: SqliteStore, path: str, tmp_path: Path) -> None:
    """Loading over a session that cannot be read makes it readable, and counts it once."""
    source = SqliteStore(str(tmp_path / "source.db"), LIFE)
    await source.open(BOOT)
    await fill(source)
    await copy_all(source, store)
    damage(path, "UPDATE sessions SET title = 'x', phase = 9 WHERE session_id = 'tree'")
    damage(path, f"UPDATE turns SET body = x'00' WHERE {OF_HIT}")
    await copy_all(source, store)
    assert await dumped(store) == await dumped(source)
    assert store.session_count_nowait() == source.session_count_nowait()
    await source.close()


async def test_broken_shared_state_is_no_rest(store: SqliteStore, path: str) -> None:
    """What belongs to no session is given as a whole or not at all."""
    for scope in (StateScope("a"), StateScope("b")):
        await store.patch_shared(scope, {"x": 1}, T0)
    damage(path, "UPDATE shared_state SET rev = rev + 1 WHERE app_name = 'a'")
    with pytest.raises(SnapshotUnreadable):
        await store.dump_rest()


async def test_a_copy_keeps_a_state_once(store: SqliteStore, path: str, tmp_path: Path) -> None:
    """Forty turns in two states take two rows of states, as they did in the original."""
    source = SqliteStore(str(tmp_path / "source.db"), LIFE)
    await source.open(BOOT)
    session, _ = await extend(source, await stored_session(source, state={"n": 0}), 20)
    session = await source.patch_state(session.key, {"n": 1}, session.updated_at + 1)
    await extend(source, session, 20)
    await copy_all(source, store)
    counts = []
    for file in (path, str(tmp_path / "source.db")):
        connection = apsw.Connection(file, flags=apsw.SQLITE_OPEN_READONLY)
        counts.append(connection.execute("SELECT count(*) FROM states").get)
        connection.close()
    assert counts == [2, 2]
    await source.close()


async def test_moving_has_more_patience_than_serving(
    store: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a call that serves somebody has given up long since, everything is still copied."""
    source = SqliteStore(str(tmp_path / "source.db"), LIFE)
    await source.open(BOOT)
    await fill(source)
    monkeypatch.setattr("app.stores.sqlite.store.READ_TIMEOUT_S", 0.0)
    monkeypatch.setattr("app.stores.sqlite.store.WRITE_TIMEOUT_S", 0.0)
    with pytest.raises(StoreUnavailable):
        await source.get_session_stats()
    await copy_all(source, store)
    assert await dumped(store) == await dumped(source)
    await source.close()


async def test_moving_does_not_wait_for_ever(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where even that patience ends, the call fails, and says that it may yet be done."""
    session, _ = await extend(store, await stored_session(store), 1)
    dump = await get_dump(store, session.key)
    monkeypatch.setattr("app.stores.sqlite.moving.PATIENCE_S", 0.0)
    for call in (store.dump_rest(), store.load_session(dump)):
        with pytest.raises(StoreUnavailable) as caught:
            await call
        assert caught.value.outcome_unknown
