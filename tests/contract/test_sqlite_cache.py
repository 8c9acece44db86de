"""What the SQLite store knows of records without reading: always what the file says."""

import asyncio
import pathlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from app.domain.branch import Back
from app.domain.errors import SessionNotFound, StoreUnavailable
from app.domain.ids import SessionKey
from app.domain.session import Path, Session, SessionCap, SessionChange, SessionStatus
from app.domain.turn import Usage
from app.stores.sqlite import reads as sqlite_reads
from app.stores.sqlite.cache import CACHE_BYTES, RecordCache, weigh
from app.stores.sqlite.store import SqliteStore

from .builders import BOOT, LIFE, T0, dropped, make_note, make_session, make_turn, running, stored_session
from .faulty_disk import faulty_disk

Step = Callable[[SqliteStore, Session], Awaitable[Any]]


@pytest.fixture
async def store(tmp_path: pathlib.Path) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(str(tmp_path / "agentpool.db"), LIFE)
    await store.open(BOOT)
    yield store
    await store.close()


async def stored(store: SqliteStore, key: SessionKey) -> Session | None:
    """Return the record as the file has it."""
    return await store._read(sqlite_reads.find_session, key)


def known(store: SqliteStore, key: SessionKey) -> Session | None:
    assert store._writer is not None
    return store._writer.records.find(key)


async def _fork(store: SqliteStore, session: Session) -> None:
    await store.fork_session(session, None, make_session("fork"))


async def _start(store: SqliteStore, session: Session) -> None:
    await store.start_turn(session, running(make_turn(session, started_at=T0 + 70_000)))
    await store.ping()


WRITES: dict[str, Step] = {
    "update": lambda store, s: store.update_session(s.key, SessionChange(title="t", metadata={"a": [1]}), T0),
    "archive": lambda store, s: store.update_session(s.key, SessionChange(status=SessionStatus.ARCHIVED), T0),
    "state": lambda store, s: store.patch_state(s.key, {"n": {"deep": 1.5}}, T0 + 5),
    "touch": lambda store, s: store.touch_session(s.key, T0 + 60_000),
    "start": _start,
    "commit": lambda store, s: store.commit_turn(s, make_turn(s)),
    "record": lambda store, s: store.record_turn(s, dropped(make_turn(s))),
    "back": lambda store, s: store.move_head(s, Back(1), T0 + 9),
    "note": lambda store, s: store.add_note(s, make_note(str(s.head)), Usage()),
    "fork": _fork,
    "sweep": lambda store, s: store.expire_and_purge(T0 + 999_999, 10),
    "purge": lambda store, s: store.expire_and_purge(T0 * 2, 10),
    "delete": lambda store, s: store.delete_session(s.key),
    "delete many": lambda store, s: store.delete_sessions([s.key]),
}


@pytest.mark.parametrize("write", WRITES)
async def test_every_write_leaves_what_the_file_has(store: SqliteStore, write: str) -> None:
    """After any write what is known of a session is its record in the file; of one that is gone, nothing."""
    session = await stored_session(store, state={"a": 1}, metadata={"b": [None, True]}, title="T")
    session = await store.commit_turn(session, make_turn(session))
    await WRITES[write](store, session)
    for key in (session.key, SessionKey("", "fork")):
        found = await stored(store, key)
        assert known(store, key) == found == await store.find_session(key)
        # To Python 1 and 1.0 are equal.
        assert repr(known(store, key)) == repr(found)


async def test_a_session_that_made_room_is_not_known(store: SqliteStore) -> None:
    """The victim of its user's cap is gone from memory with the creation that it went for."""
    victim = await stored_session(store, "old", user_id="u")
    await store.create_sessions([make_session("new", user_id="u")], SessionCap(1, (victim,)))
    assert await store.find_session(victim.key) is None


async def test_a_turn_reads_no_record(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that was written since the start is found without a read, another with one."""
    session = await stored_session(store)
    await store.close()
    await store.open(BOOT)
    reads: list[SessionKey] = []
    find = sqlite_reads.find_session
    monkeypatch.setattr(
        sqlite_reads, "find_session", lambda connection, key: reads.append(key) or find(connection, key)
    )
    assert await store.find_session(session.key) == session
    assert reads == [session.key]
    session = await store.commit_turn(session, make_turn(session))
    assert await store.find_session(session.key) == session
    assert reads == [session.key]


async def test_a_new_session_is_loaded_without_reading(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its path is empty, which the record says; one that was made anew under its id is another."""
    session = await stored_session(store)
    assert store._files is not None
    monkeypatch.setattr(store._files, "read", None)
    assert await store.load_path(session) == Path(None, None, (), 0)
    monkeypatch.undo()
    await store.delete_session(session.key)
    with pytest.raises(SessionNotFound):
        await store.load_path(session)
    await store.create_session(make_session(session.key.session_id))
    with pytest.raises(SessionNotFound):
        await store.load_path(session)


async def test_a_work_that_failed_leaves_no_trace(store: SqliteStore) -> None:
    """What a work had saved before it failed is not known; the works beside it are."""
    session, other = await stored_session(store, "a"), await stored_session(store, "b")

    def fail(unit: Any) -> None:
        unit.note(session.key, weigh(replace(session, title="never"), 0))
        raise SessionNotFound

    results = await asyncio.gather(
        store._write("fail", fail),
        store.update_session(other.key, SessionChange(title="new"), T0),
        store._write("fail", fail),
        return_exceptions=True,
    )
    assert [isinstance(result, SessionNotFound) for result in results] == [True, False, True]
    assert known(store, session.key) == session
    assert known(store, other.key) == results[1]


async def test_a_commit_that_failed_is_not_believed(tmp_path: pathlib.Path) -> None:
    """When the sync of a commit fails, the session is read from the file until the next write."""
    with faulty_disk() as disk:
        store = SqliteStore(str(tmp_path / "agentpool.db"), LIFE)
        await store.open(BOOT)
        session = await stored_session(store)
        turn = make_turn(session)
        disk.refuses_sync = True
        with pytest.raises(StoreUnavailable):
            await store.commit_turn(session, turn)
        assert known(store, session.key) is None
        assert await store.find_session(session.key) == await stored(store, session.key)
        disk.refuses_sync = False
        after = await store.commit_turn(session, turn)
        assert known(store, session.key) == after
        await store.close()
        del store


def test_what_is_being_committed_is_not_answered() -> None:
    """From the expectation of a commit to its end its records are unknown, then they are the new ones."""
    cache = RecordCache()
    old, new = make_session("a"), make_session("a", title="new")
    cache.expect({old.key: weigh(old, 0)})
    cache.settle(is_committed=True)
    assert cache.find(old.key) == old
    cache.expect({old.key: weigh(new, 0)})
    cache.expect({})
    assert cache.find(old.key) is None
    cache.settle(is_committed=True)
    assert cache.find(old.key) == new
    cache.settle(is_committed=True)
    assert cache.find(old.key) == new
    cache.expect({old.key: None})
    cache.settle(is_committed=True)
    assert cache.find(old.key) is None


def test_the_least_recently_used_record_goes_first() -> None:
    """The weights of what is kept stay under the limit; one record may have it all, however large it is."""
    cache = RecordCache()
    used, unused, large = make_session("used"), make_session("unused"), make_session("large")
    half = CACHE_BYTES // 12
    cache.expect({used.key: weigh(used, 0), unused.key: weigh(unused, half)})
    cache.settle(is_committed=True)
    assert cache.find(used.key)
    cache.expect({large.key: weigh(large, half)})
    cache.settle(is_committed=True)
    assert [cache.find(session.key) for session in (used, unused, large)] == [used, None, large]
    cache.expect({used.key: weigh(used, CACHE_BYTES)})
    cache.settle(is_committed=True)
    assert [cache.find(session.key) for session in (used, large)] == [used, None]
