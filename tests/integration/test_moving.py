"""Moving house: the copying itself, over real stores."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import apsw
import pytest

from app.domain.dump import RestDump, SessionDump
from app.domain.errors import StoreUnavailable
from app.domain.ids import SessionKey
from app.domain.session import SessionChange
from app.services.moving import AT_ONCE, PAGE, Moved, Mover, MoveRefused
from app.stores.memory.store import MemoryStore
from app.stores.sqlite.store import SqliteStore
from tests.contract.builders import BOOT, LIFE, T0, extend, make_session, make_turn, stored_session
from tests.contract.moving import Full, all_reads, dumped, fill, get_dump


class Leaky(MemoryStore):
    """A store that loses something of what it is given."""

    def __init__(self, lost: str) -> None:
        super().__init__(LIFE)
        self._lost = lost

    async def load_session(self, dump: SessionDump) -> None:
        if self._lost == "a session" and dump.session.key.session_id == "tree":
            return
        if self._lost == "a note":
            dump = SessionDump(dump.session, dump.root_state, dump.turns, (), dump.facts, dump.checkpoints)
        await super().load_session(dump)

    async def load_rest(self, rest: RestDump) -> None:
        if self._lost == "a session, later":
            await self.delete_session(SessionKey("alice", "same"))
        if self._lost != "usage":
            await super().load_rest(rest)


class Gated(MemoryStore):
    """A store that loads no session before it is told to; ``waiting`` is set when so many wait."""

    def __init__(self, expected: int) -> None:
        super().__init__(LIFE)
        self.most = 0
        self.waiting = asyncio.Event()
        self.may_load = asyncio.Event()
        self._expected = expected
        self._under_way = 0

    async def load_session(self, dump: SessionDump) -> None:
        self._under_way += 1
        self.most = max(self.most, self._under_way)
        if self._under_way == self._expected:
            self.waiting.set()
        await self.may_load.wait()
        self._under_way -= 1
        await super().load_session(dump)


@pytest.fixture
async def source(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(str(tmp_path / "source.db"), LIFE)
    await store.open(BOOT)
    yield store
    await store.close()


@pytest.fixture
async def target() -> AsyncIterator[MemoryStore]:
    store = MemoryStore(LIFE)
    await store.open(BOOT)
    yield store
    await store.close()


async def move(source: SqliteStore, target: MemoryStore) -> Moved:
    mover = Mover(source, target, lambda _: None)
    await mover.check()
    return await mover.copy()


async def check_same(source: SqliteStore, target: MemoryStore, full: Full) -> None:
    assert await dumped(target) == await dumped(source)
    assert await all_reads(target, full) == await all_reads(source, full)


async def test_everything_is_moved_and_counted(source: SqliteStore, target: MemoryStore) -> None:
    """The copy reads as the original, and the counts are those of what is in it."""
    full = await fill(source)
    dumps = [await get_dump(source, key) for key in full.keys]
    moved = await move(source, target)
    assert moved.is_verified
    assert (moved.unreadable, moved.differing) == ([], [])
    assert moved.sessions == len(full.keys) == target.session_count_nowait()
    assert moved.turns == sum(len(dump.turns) for dump in dumps)
    assert (moved.notes, moved.checkpoints) == (3, sum(len(dump.checkpoints) for dump in dumps))
    assert moved.events == sum(len(dump.facts) for dump in dumps)
    rest = await source.dump_rest()
    assert (moved.states, moved.users) == (len(rest.shared), len({(u.owner, u.user_id) for u in rest.usage}))
    assert moved.json_bytes == sum(len(text) for text in (await dumped(source)).values())
    await check_same(source, target, full)


async def test_a_move_may_be_repeated(source: SqliteStore, target: MemoryStore) -> None:
    """Again, and again after the source has gone on: each time the copy is as the source is then."""
    full = await fill(source)
    await move(source, target)
    assert (await move(source, target)).is_verified
    await check_same(source, target, full)
    session = await source.find_session(full.keys[0])
    assert session is not None
    await extend(source, session, 2, started_at=session.updated_at + 1000)
    full.keys.append((await stored_session(source, "new")).key)
    assert (await move(source, target)).is_verified
    await check_same(source, target, full)


async def test_more_than_a_page_is_moved_a_few_at_a_time(source: SqliteStore) -> None:
    """However many sessions there are, only so many are under way, and each is moved once."""
    keys = [SessionKey("", f"s{number}") for number in range(2 * PAGE + 1)]
    await source.create_sessions([make_session(key.session_id) for key in keys])
    seen: list[int] = []
    target = Gated(AT_ONCE)
    await target.open(BOOT)
    moving = asyncio.ensure_future(Mover(source, target, lambda moved: seen.append(moved.sessions)).copy())
    await target.waiting.wait()
    target.may_load.set()
    moved = await moving
    assert (target.most, moved.sessions, moved.is_verified) == (AT_ONCE, len(keys), True)
    assert seen == sorted(seen)
    assert len(seen) == len(keys)
    assert set(await target.list_after(None, 999)) == set(keys)


async def test_a_cancelled_move_is_repeated(source: SqliteStore) -> None:
    """Cancelled in the middle: nothing goes on by itself, and a repeat makes all the same."""
    full = await fill(source)
    target = Gated(AT_ONCE)
    await target.open(BOOT)
    moving = asyncio.ensure_future(Mover(source, target, lambda _: None).copy())
    await target.waiting.wait()
    moving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await moving
    target.may_load.set()
    for key in full.keys[:3]:
        await target.load_session(await get_dump(source, key))
    assert target.session_count_nowait() == 3
    assert (await move(source, target)).is_verified
    await check_same(source, target, full)


async def test_a_target_with_other_sessions_is_refused(source: SqliteStore, target: MemoryStore) -> None:
    """One that the source has not is enough, and nothing is changed."""
    await fill(source)
    await stored_session(target, "foreign", owner="alice")
    before = await dumped(target)
    with pytest.raises(MoveRefused, match="'foreign'"):
        await move(source, target)
    assert await dumped(target) == before


@pytest.mark.parametrize("change", ["a turn", "a title", "a state", "another one"])
async def test_a_copy_that_has_gone_on_is_refused(
    source: SqliteStore, target: MemoryStore, change: str
) -> None:
    """What users did in the copy since is not written over, nor a session that only has the same id."""
    key = (await stored_session(source)).key
    await move(source, target)
    session = await target.find_session(key)
    assert session is not None
    if change == "a turn":
        await target.commit_turn(session, make_turn(session))
    elif change == "a title":
        await target.update_session(key, SessionChange(title="new"), T0)
    elif change == "a state":
        await target.patch_state(key, {"a": 1}, T0)
    else:
        await target.delete_session(key)
        await stored_session(target)
    with pytest.raises(MoveRefused, match="'s1'"):
        await move(source, target)


async def test_a_broken_session_is_left_behind(
    source: SqliteStore, target: MemoryStore, tmp_path: Path
) -> None:
    """It is named, the others are moved and verified; so it is in a repeat, where an older copy stays."""
    full = await fill(source)
    await move(source, target)
    await target.delete_session(full.keys[1])
    connection = apsw.Connection(str(tmp_path / "source.db"))
    for session_id in ("tree", "tools"):
        number = "(SELECT id FROM sessions WHERE session_id = ?)"
        connection.execute(f"UPDATE turns SET body = x'00' WHERE session = {number}", (session_id,))
    connection.close()
    before = await get_dump(target, full.keys[0])
    for _ in range(2):
        moved = await move(source, target)
        assert set(moved.unreadable) == set(full.keys[:2])
        assert (moved.sessions, moved.is_verified) == (len(full.keys) - 2, True)
        assert await get_dump(target, full.keys[0]) == before
        assert await target.find_session(full.keys[1]) is None


async def test_a_session_that_lacks_a_turn_is_broken(
    source: SqliteStore, target: MemoryStore, tmp_path: Path
) -> None:
    """A row that is gone, of which no other row tells, keeps its session from being moved."""
    session, _ = await extend(source, await stored_session(source), 3)
    connection = apsw.Connection(str(tmp_path / "source.db"))
    connection.execute("DELETE FROM turns WHERE depth = 2")
    connection.close()
    moved = await move(source, target)
    assert (moved.unreadable, moved.sessions) == ([session.key], 0)


@pytest.mark.parametrize("lost", ["a session", "a note", "a session, later", "usage"])
async def test_what_the_target_loses_is_found(source: SqliteStore, lost: str) -> None:
    """A session, a part of one, one that was there a moment ago, or the rest: the move is not verified."""
    await fill(source)
    target = Leaky(lost)
    await target.open(BOOT)
    moved = await Mover(source, target, lambda _: None).copy()
    assert not moved.is_verified
    assert bool(moved.differing) == (lost in ("a session", "a note"))


async def test_a_store_that_fails_ends_the_move(source: SqliteStore, target: MemoryStore) -> None:
    """The failure is raised, and what was under way has ended by then."""
    await fill(source)
    await target.close()
    with pytest.raises(StoreUnavailable):
        await Mover(source, target, lambda _: None).copy()
    assert [task for task in asyncio.all_tasks() if task.get_name().startswith("moving")] == []
