"""What an acknowledged turn survives: SIGKILL, a power cut, a full disk, a failing one."""

import asyncio
import random
from pathlib import Path

import apsw
import pytest

from app.domain.errors import StoreUnavailable
from app.domain.idempotency import Binding
from app.stores.sqlite import file as sqlite_file
from app.stores.sqlite.store import SqliteStore

from .builders import BOOT, LIFE, extend, make_session, make_turn, running
from .children import write_and_kill
from .faulty_disk import faulty_disk

KILLS = 20
TURNS = 60


async def test_sigkill_loses_no_acknowledged_turn(tmp_path: Path) -> None:
    """After twenty SIGKILLs at random moments every acknowledged turn is there exactly once."""
    path = str(tmp_path / "agentpool.db")
    chance = random.Random(20)
    acknowledged: set[tuple[str, str]] = set()
    for life in range(KILLS):
        acknowledged |= await write_and_kill(path, f"boot-{life}", chance.randint(1, 400))
    assert len(acknowledged) >= KILLS
    connection = apsw.Connection(path)
    assert connection.pragma("integrity_check") == "ok"
    connection.close()
    store = SqliteStore(path, LIFE)
    await store.open("last")
    stored = []
    for session_id in {session_id for session_id, _ in acknowledged}:
        session = await store.find_session(make_session(session_id).key)
        assert session is not None
        branch = await store.list_branch(session, 10_000)
        assert [turn.depth for turn in branch] == list(range(1, session.depth + 1))
        stored += [(session_id, turn.turn_id) for turn in branch]
    assert len(stored) == len(set(stored))
    assert acknowledged <= set(stored)
    await store.close()


async def test_a_power_cut_loses_no_acknowledged_turn(tmp_path: Path, cuts: int) -> None:
    """At random cuts, with unsynced writes there or not, the acknowledged turns are all there."""
    assert await _turns_lost_in_cuts(tmp_path, cuts) == 0


async def test_the_power_cut_test_notices_missing_syncs(
    tmp_path: Path, cuts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same cuts lose acknowledged turns when commits are not synced."""

    def connect_unsynced(path: str) -> apsw.Connection:
        connection = sqlite_file_connect(path)
        connection.pragma("synchronous", "normal")
        return connection

    sqlite_file_connect = sqlite_file.connect
    monkeypatch.setattr(sqlite_file, "connect", connect_unsynced)
    assert await _turns_lost_in_cuts(tmp_path, cuts) > 0


async def _turns_lost_in_cuts(tmp_path: Path, cuts: int) -> int:
    """Commit sixty turns, cut the power at ``cuts`` random points, return how many were lost in all."""
    session = make_session()
    acknowledged: list[tuple[int, int]] = []  # (steps of the disk, depth) at each acknowledgement
    with faulty_disk() as disk:
        store = SqliteStore(str(tmp_path / "agentpool.db"), LIFE)
        await store.open(BOOT)
        await store.create_session(session)
        for _ in range(TURNS):
            binding = Binding("", f"key-{session.depth + 1}", b"f" * 16)
            turn = make_turn(session, answer="word " * 2000, binding=binding)
            await store.start_turn(session, running(turn))
            session = await store.commit_turn(session, turn)
            acknowledged.append((len(disk.steps), session.depth))
        await store.close()
        del store
    chance = random.Random(60)
    lost = 0
    for number in range(cuts):
        cut = chance.randint(acknowledged[0][0], len(disk.steps))
        folder = tmp_path / str(number)
        folder.mkdir()
        disk.image(cut, chance, folder)
        promised = max(depth for steps, depth in acknowledged if steps <= cut)
        lost += max(0, promised - await _depth_in_image(str(folder / "agentpool.db")))
    return lost


async def _depth_in_image(path: str) -> int:
    """Open the file, check that it is whole, and return how many turns it has."""
    store = SqliteStore(path, LIFE)
    await store.open("after")
    session = await store.find_session(make_session().key)
    if session is not None:
        assert len((await store.load_path(session)).messages) == 2 * session.depth
        bound = [await store.find_bound("", f"key-{depth + 1}") for depth in range(session.depth)]
        assert [found and found.turn.depth for found in bound] == [*range(1, session.depth + 1)]
    await store.close()
    connection = apsw.Connection(path)
    assert connection.pragma("integrity_check") == "ok"
    connection.close()
    return session.depth if session else 0


async def test_a_full_disk_refuses_writes_and_heals(tmp_path: Path) -> None:
    """Full: commits raise StoreUnavailable with a known outcome, reads go on; with room they work again."""
    store = SqliteStore(str(tmp_path / "agentpool.db"), LIFE)
    await store.open(BOOT)
    session = make_session()
    await store.create_session(session)
    session, _ = await extend(store, session, 1)
    await _set_page_limit(store, 1)
    big = make_turn(session, answer="x" * 50_000)
    for _ in range(3):
        results = await asyncio.gather(
            *(store.commit_turn(session, big) for _ in range(5)), return_exceptions=True
        )
        for error in results:
            assert isinstance(error, StoreUnavailable)
            assert not error.outcome_unknown
            assert error.detail == "The database is full."
    assert len((await store.load_path(session)).messages) == 2
    await _set_page_limit(store, 1_000_000)
    assert (await store.commit_turn(session, big)).depth == 2
    await store.close()


async def _set_page_limit(store: SqliteStore, pages: int) -> None:
    """Let the file have its present size, or ``pages`` if that is more."""
    await store._write("limit", lambda unit: unit.connection.pragma("max_page_count", pages))


async def test_a_sync_that_fails_leaves_the_outcome_unknown(tmp_path: Path) -> None:
    """When the sync of a commit fails the caller hears that the outcome is unknown, and may repeat it."""
    with faulty_disk() as disk:
        store = SqliteStore(str(tmp_path / "agentpool.db"), LIFE)
        await store.open(BOOT)
        session = make_session()
        await store.create_session(session)
        turn = make_turn(session)
        disk.refuses_sync = True
        with pytest.raises(StoreUnavailable) as caught:
            await store.commit_turn(session, turn)
        assert caught.value.outcome_unknown
        assert isinstance(caught.value.__cause__, apsw.IOError)
        disk.refuses_sync = False
        after = await store.commit_turn(session, turn)
        assert (after.head, after.depth) == (turn.turn_id, 1)
        assert await store.commit_turn(session, turn) == after
        await store.close()
        del store
