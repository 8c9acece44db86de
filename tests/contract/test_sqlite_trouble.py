"""What the SQLite store does when its disk is full, fails or hangs, and when its own thread dies."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import apsw
import pytest

from app.domain.errors import StoreUnavailable
from app.domain.session import Session, SessionQuery
from app.stores.sqlite import file as sqlite_file
from app.stores.sqlite import keeper as sqlite_keeper
from app.stores.sqlite import store as sqlite
from app.stores.sqlite import writer as sqlite_writer
from app.stores.sqlite.store import SqliteStore

from .builders import BOOT, LIFE, T0, make_session, make_turn, running
from .faulty_disk import FaultyDisk, faulty_disk

PATIENCE_S = 20


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(str(tmp_path / "agentpool.db"), LIFE)
    await store.open(BOOT)
    yield store
    await store.close()


@pytest.fixture
async def session(store: SqliteStore) -> Session:
    session = make_session()
    await store.create_session(session)
    return session


async def begin(store: SqliteStore, session: Session) -> None:
    await store.start_turn(session, running(make_turn(session)))


async def until_it_begins(store: SqliteStore, session: Session) -> None:
    """Try to begin turns, each after a round trip through the writer, until one may."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            await store.ping()
            try:
                return await begin(store, session)
            except StoreUnavailable:
                continue


async def test_no_turn_begins_on_a_full_disk(
    store: SqliteStore, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without free space turns and new sessions are refused, all else works; with space they go on."""
    turn = make_turn(session)
    await store.start_turn(session, running(turn))
    monkeypatch.setattr(sqlite, "ROOM_CHECK_S", 0)
    monkeypatch.setattr(sqlite_file, "has_room", lambda _: False)
    store._look_again_at = 0
    for refused in (begin(store, session), store.create_session(make_session("s2"))):
        with pytest.raises(StoreUnavailable, match="full") as caught:
            await refused
        assert not caught.value.outcome_unknown
    session = await store.commit_turn(session, turn)
    assert (await store.list_sessions(SessionQuery(owner="", now=T0))).total == 1
    assert (await store.list_turns(session, 10)).total == 1
    monkeypatch.undo()
    await until_it_begins(store, session)


async def test_free_space_is_asked_for_once_a_second(
    store: SqliteStore, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred turns that begin together look at the file system at most once or twice."""
    looks: list[str] = []
    monkeypatch.setattr(sqlite_file, "has_room", lambda directory: looks.append(directory) or True)
    await asyncio.gather(*(begin(store, session) for _ in range(100)))
    assert len(looks) <= 2


@pytest.mark.parametrize(
    ("blocks", "free", "expected"),
    [(1000, 2048, True), (1000, 2047, False), (0, 0, True)],
)
def test_room_is_what_a_user_may_still_write(
    monkeypatch: pytest.MonkeyPatch, blocks: int, free: int, expected: bool
) -> None:
    """Eight MiB are enough, a block less is not, and a file system that does not count is believed."""
    found = SimpleNamespace(f_blocks=blocks, f_bavail=free, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda _: found)
    assert sqlite_file.has_room("/") is expected


def test_a_directory_that_cannot_be_asked_is_believed(tmp_path: Path) -> None:
    """Where the file system gives no answer, the write itself will tell."""
    assert sqlite_file.has_room(str(tmp_path / "gone"))


async def refuse_once(disk: FaultyDisk, store: SqliteStore, session: Session) -> None:
    disk.refuses_sync = True
    with pytest.raises(StoreUnavailable):
        await store.commit_turn(session, make_turn(session))


async def test_no_turn_begins_while_the_disk_refuses_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After a failed write turns are refused until a small write of the store's own has succeeded."""
    monkeypatch.setattr(sqlite_writer, "PROBE_S", 0.001)
    with faulty_disk() as disk:
        store = SqliteStore(str(tmp_path / "agentpool.db"), LIFE)
        await store.open(BOOT)
        session = make_session()
        await store.create_session(session)
        await refuse_once(disk, store, session)
        for _ in range(50):
            with pytest.raises(StoreUnavailable, match="refuses writes"):
                await begin(store, session)
            await store.ping()
        assert await store.find_session(session.key) == session
        disk.refuses_sync = False
        await until_it_begins(store, session)
        await store.close()
        del store
    said = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert [line.partition(";")[0] for line in said] == [
        "the disk refuses writes",
        "the disk takes writes again",
    ]


async def test_any_write_that_succeeds_ends_the_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit that the disk takes lets turns begin at once, long before the next probe; a ping does not."""
    monkeypatch.setattr(sqlite_writer, "PROBE_S", 1000)
    with faulty_disk() as disk:
        store = SqliteStore(str(tmp_path / "agentpool.db"), LIFE)
        await store.open(BOOT)
        session = make_session()
        await store.create_session(session)
        await refuse_once(disk, store, session)
        disk.refuses_sync = False
        await store.ping()
        with pytest.raises(StoreUnavailable):
            await begin(store, session)
        session = await store.commit_turn(session, make_turn(session))
        await begin(store, session)
        await store.close()
        del store


@pytest.mark.parametrize(
    ("code", "refuses"),
    [
        (apsw.SQLITE_FULL, True),
        (apsw.SQLITE_READONLY, True),
        (apsw.SQLITE_IOERR_WRITE, True),
        (apsw.SQLITE_IOERR_READ, False),
        (apsw.SQLITE_CORRUPT, False),
        (apsw.SQLITE_BUSY, False),
    ],
)
async def test_what_concerns_one_page_refuses_no_turn(
    store: SqliteStore, session: Session, code: int, refuses: bool
) -> None:
    """Only errors that the next write will meet, too, keep turns from beginning."""

    def fail(_: object) -> None:
        raise apsw.exception_for(code)

    with pytest.raises(StoreUnavailable):
        await store._write("fail", fail)
    if refuses:
        with pytest.raises(StoreUnavailable):
            await begin(store, session)
    else:
        await begin(store, session)


async def test_a_writer_that_dies_leaves_nobody_waiting(
    store: SqliteStore, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    """Those in the dead thread's hands hear that the outcome is unknown, all others that nothing was done."""
    gate = Event()
    holding = store._write("hold", lambda unit: gate.wait())
    dying = store._write("die", _die)
    waiting = [store.commit_turn(session, make_turn(session)) for _ in range(100)]
    calls = asyncio.gather(holding, dying, *waiting, store.ping(), return_exceptions=True)
    asyncio.get_running_loop().call_soon(gate.set)
    with caplog.at_level(logging.CRITICAL):
        async with asyncio.timeout(PATIENCE_S):
            _, *results = await calls
    assert all(isinstance(result, StoreUnavailable) for result in results)
    assert results[0].outcome_unknown
    assert not results[-1].outcome_unknown
    assert [record.levelname for record in caplog.records] == ["CRITICAL"]
    later: list[Callable[[], Any]] = [
        store.ping,
        lambda: begin(store, session),
        lambda: store.find_session(session.key),
        lambda: store.load_path(session),
    ]
    for call in later:
        with pytest.raises(StoreUnavailable):
            await call()
    await store.close()


def _die(_: object) -> None:
    raise SystemExit


async def test_a_store_whose_writer_died_can_be_opened_again(store: SqliteStore, session: Session) -> None:
    """After the thread's death the file is released and whole: opening again goes on where it ended."""
    with pytest.raises(StoreUnavailable):
        await store._write("die", _die)
    await store.open("boot-2")
    session = await store.commit_turn(session, make_turn(session))
    assert (await store.find_session(session.key)) == session


async def test_a_write_that_hangs_has_an_unknown_outcome(
    store: SqliteStore, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit behind a hanging write ends in doubt after a bounded time, and no turn begins until then."""
    monkeypatch.setattr(sqlite, "WRITE_TIMEOUT_S", 0.05)
    gate = Event()
    assert store._writer is not None
    hanging = store._writer.submit(lambda unit: gate.wait(), "hang")
    turn = make_turn(session)
    try:
        with pytest.raises(StoreUnavailable) as caught:
            await store.commit_turn(session, turn)
        assert caught.value.outcome_unknown
        with pytest.raises(StoreUnavailable, match="does not finish"):
            await begin(store, session)
        assert await store.find_session(session.key) == session
    finally:
        gate.set()
    assert await hanging
    monkeypatch.undo()
    after = await store.commit_turn(session, turn)
    assert (after.head, after.depth) == (turn.turn_id, 1)
    await begin(store, after)


async def test_a_read_that_hangs_fails(
    store: SqliteStore, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every reader hanging a read raises in bounded time, and later ones work again."""
    monkeypatch.setattr(sqlite, "READ_TIMEOUT_S", 0.05)
    gate = Event()
    calls = [store._read(lambda connection: gate.wait()) for _ in range(sqlite_keeper.READERS)]
    results = await asyncio.gather(*calls, store.list_turns(session, 1), return_exceptions=True)
    gate.set()
    assert [type(result) for result in results] == [StoreUnavailable] * (sqlite_keeper.READERS + 1)
    monkeypatch.undo()
    assert (await store.load_path(session)).messages == ()
