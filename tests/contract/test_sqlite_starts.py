"""Start records that wait: nobody can tell, but that most turns take one write instead of two."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from threading import Event
from typing import Any

import pytest

from app.domain.branch import Back
from app.domain.errors import AgentPoolError, StoreUnavailable
from app.domain.idempotency import Binding
from app.domain.session import Session, SessionCap, SessionChange, SessionQuery, SessionStatus
from app.domain.turn import Turn, TurnStatus, Usage
from app.stores.sqlite import starts as sqlite_starts
from app.stores.sqlite.store import SqliteStore

from .builders import (
    BOOT,
    LIFE,
    T0,
    Ids,
    dropped,
    failed,
    make_checkpoint,
    make_note,
    make_session,
    make_turn,
    running,
    stored_session,
)

PATIENCE_S = 20
STARTED = T0 + 70_000
TABLES = ("sessions", "turns", "idempotency_keys", "counters", "usage_days", "names", "session_counts",
          "states", "notes", "checkpoints", "session_events")  # fmt: skip


@pytest.fixture
async def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SqliteStore]:
    # So that only what a test does hands a start record over.
    monkeypatch.setattr(sqlite_starts, "START_DELAY_S", 1000)
    store = SqliteStore(str(tmp_path / "agentpool.db"), LIFE)
    await store.open(BOOT)
    yield store
    await store.close()


@pytest.fixture
async def session(store: SqliteStore) -> Session:
    return await stored_session(store, user_id="u", marked_idle=True)


async def rows(store: SqliteStore, table: str) -> list[Any]:
    """Return what is in a table, and let nothing be handed over for it."""
    query = f"SELECT * FROM {table}"
    return await store._write("look", lambda unit: unit.connection.execute(query).fetchall())


async def test_a_turn_that_ends_soon_is_written_once(store: SqliteStore, session: Session) -> None:
    """A commit or a record takes one transaction together with its start, and leaves nothing waiting."""
    before = store.transactions
    turn = make_turn(session)
    await store.start_turn(session, running(turn))
    session = await store.commit_turn(session, turn)
    bad = make_turn(session)
    await store.start_turn(session, running(bad))
    await store.record_turn(session, failed(bad))
    assert store.transactions - before == 2
    assert store._starts is not None
    assert not store._starts.has(session.key)
    assert [turn.status for turn in (await store.list_turns(session, 10)).turns] == ["failed", "finished"]


async def test_a_turn_that_lasts_is_written_soon(
    store: SqliteStore, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Start records of several sessions are written when their time is over, though nobody asks."""
    monkeypatch.setattr(sqlite_starts, "START_DELAY_S", 0.01)
    other = await stored_session(store, "s2")
    await store.start_turn(session, running(make_turn(session)))
    await asyncio.sleep(0)
    await store.start_turn(other, running(make_turn(other)))
    async with asyncio.timeout(PATIENCE_S):
        while len(await rows(store, "turns")) < 2:
            pass


async def test_a_turn_waits_for_its_own_time(
    store: SqliteStore, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the time of one start record is over, those that began later go on waiting."""
    other = await stored_session(store, "s2")
    with monkeypatch.context() as soon:
        soon.setattr(sqlite_starts, "START_DELAY_S", 0.01)
        await store.start_turn(session, running(make_turn(session)))
    await store.start_turn(other, running(make_turn(other)))
    async with asyncio.timeout(PATIENCE_S):
        while len(await rows(store, "turns")) < 1:
            pass
    assert store._starts is not None
    assert store._starts.has(other.key)


async def test_a_turn_that_lasts_is_found_by_the_next_process(store: SqliteStore, session: Session) -> None:
    """Closing writes what waits: the next boot finds the turn and calls it interrupted."""
    turn = make_turn(session)
    await store.start_turn(session, running(turn))
    await store.close()
    await store.open("boot-2")
    stored = await store.get_turn(session, turn.turn_id)
    assert stored.error is not None
    assert stored.error.code == "INTERRUPTED"


Look = Callable[[SqliteStore, Session, Turn], Awaitable[bool]]


async def _is_listed(store: SqliteStore, session: Session, turn: Turn) -> bool:
    return [one.status for one in (await store.list_turns(session, 10)).turns] == [TurnStatus.RUNNING]


async def _is_got(store: SqliteStore, session: Session, turn: Turn) -> bool:
    return (await store.get_turn(session, turn.turn_id)).status is TurnStatus.RUNNING


async def _is_told(store: SqliteStore, session: Session, turn: Turn) -> bool:
    return len(await store.list_entries(session, None, 10, newest_first=True)) == 1


async def _is_activity(store: SqliteStore, session: Session, turn: Turn) -> bool:
    found = await store.find_session(session.key)
    return found == session.touched(STARTED, LIFE)


async def _is_activity_in_lists(store: SqliteStore, session: Session, turn: Turn) -> bool:
    page = await store.list_sessions(SessionQuery(owner="", now=STARTED))
    return page.sessions == (session.touched(STARTED, LIFE),)


async def _is_newest(store: SqliteStore, session: Session, turn: Turn) -> bool:
    (oldest,) = await store.list_oldest("", "u", 1)
    return oldest.last_accessed == STARTED


async def _is_counted(store: SqliteStore, session: Session, turn: Turn) -> bool:
    return (await store.get_session_stats()).active == 1


async def _is_kept(store: SqliteStore, session: Session, turn: Turn) -> bool:
    return await store.expire_and_purge(T0 * 2, 10) == (1, 0)


async def _is_no_victim(store: SqliteStore, session: Session, turn: Turn) -> bool:
    new = make_session("new", user_id="u")
    return (await store.create_sessions([new], SessionCap(1, (session,))))[0] is not None


async def _is_no_victim_of_a_fork(store: SqliteStore, session: Session, turn: Turn) -> bool:
    with pytest.raises(AgentPoolError):
        await store.fork_session(session, None, make_session("new", user_id="u"), SessionCap(1, (session,)))
    return store.session_count_nowait() == 1


async def _is_before_a_change(store: SqliteStore, session: Session, turn: Turn) -> bool:
    change = SessionChange(status=SessionStatus.IDLE)
    changed = await store.update_session(session.key, change, STARTED + 1)
    return changed.marked_idle and changed.last_accessed == STARTED


@pytest.mark.parametrize(
    "look",
    [_is_listed, _is_got, _is_told, _is_activity, _is_activity_in_lists, _is_newest, _is_counted, _is_kept,
     _is_no_victim, _is_no_victim_of_a_fork, _is_before_a_change],
)  # fmt: skip
async def test_whoever_looks_sees_the_turn_run(store: SqliteStore, session: Session, look: Look) -> None:
    """As soon as it has started, all that reads or depends on running turns and activity knows of it."""
    turn = make_turn(session, started_at=STARTED)
    await store.start_turn(session, running(turn))
    assert await look(store, session, turn)


async def test_two_who_look_at_once_both_see_it(store: SqliteStore, session: Session) -> None:
    """One that looks while the start record is on its way to the disk waits for it, too."""
    await store.start_turn(session, running(make_turn(session)))
    pages = await asyncio.gather(*(store.list_turns(session, 10) for _ in range(3)))
    assert [page.total for page in pages] == [1, 1, 1]


async def test_a_look_at_a_turn_that_is_being_stored_finds_it(store: SqliteStore, session: Session) -> None:
    """While its commit is on its way a turn is not missing, and the start record behind it does nothing."""
    turn = make_turn(session)
    await store.start_turn(session, running(turn))
    after, page = await asyncio.gather(store.commit_turn(session, turn), store.list_turns(session, 10))
    assert [one.status for one in page.turns] == [TurnStatus.FINISHED]
    assert await store.find_session(session.key) == after


async def test_a_turn_whose_end_cannot_be_stored_still_runs(store: SqliteStore, session: Session) -> None:
    """A commit that fails leaves the start record waiting, for who looks and for the next process."""
    turn = make_turn(session)
    await store.start_turn(session, running(turn))
    with pytest.raises(ValueError):
        await store.commit_turn(session, replace(turn, depth=7))
    assert await _is_listed(store, session, turn)


async def test_a_writer_that_hangs_holds_up_no_reader(
    store: SqliteStore, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who looks while nothing can be written sees in bounded time what is written."""
    monkeypatch.setattr(sqlite_starts, "PATIENCE_S", 0.01)
    gate = Event()
    assert store._writer is not None
    hanging = store._writer.submit(lambda unit: gate.wait(), "hang")
    await store.start_turn(session, running(make_turn(session)))
    try:
        assert (await store.list_turns(session, 10)).total == 0
        assert await store.find_session(session.key) == session
    finally:
        gate.set()
    await hanging
    assert (await store.list_turns(session, 10)).total == 1


async def test_a_dead_writer_takes_what_waits_with_it(
    store: SqliteStore, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    """When the writing thread dies, closing a store with a start record that waits raises nothing."""

    def die(_: object) -> None:
        raise SystemExit

    await store.start_turn(session, running(make_turn(session)))
    with pytest.raises(StoreUnavailable):
        await store._write("die", die)
    await store.close()
    assert [record.levelname for record in caplog.records] == ["CRITICAL"]


class Script:
    """Does to a store what the seed says: turns that overlap with everything else."""

    def __init__(self, store: SqliteStore, seed: int, *, waits: bool) -> None:
        self.store, self.chance, self.waits = store, Random(seed), waits
        self.ids = Ids()
        self.now = T0
        self.sessions: dict[str, Session] = {}
        self.turns: dict[str, Turn] = {}

    async def run(self) -> None:
        steps = [self.start, self.commit, self.drop, self.touch, self.mark, self.state, self.back, self.name,
                 self.note, self.delete, self.sweep]  # fmt: skip
        for _ in range(150):
            self.now += self.chance.randrange(20_000)
            name = self.chance.choice("abc")
            if name not in self.sessions:
                fields = {"uid": self.ids(), "user_id": "u", "state": {"n": 0}, "now": self.now}
                self.sessions[name] = await stored_session(self.store, name, **fields)
            step = self.chance.choice([self.start, self.commit] if name in self.turns else steps)
            try:
                await step(name, self.sessions[name])
            except AgentPoolError:
                pass
            if not self.waits:
                await self.store.ping()

    async def turn(self, session: Session) -> Turn:
        key = Binding("", self.chance.choice("klmn"), b"f" * 16)
        # Of two turns with one key the services let only one through, and none after a commit.
        is_free = key not in [turn.binding for turn in self.turns.values()]
        may_bind = is_free and not await self.store.find_bound("", key.key)
        binding = key if may_bind else None
        return make_turn(session, turn_id=self.ids(), started_at=self.now, binding=binding)

    async def start(self, name: str, session: Session) -> None:
        self.turns[name] = await self.turn(session)
        await self.store.start_turn(session, running(self.turns[name]))

    async def commit(self, name: str, session: Session) -> None:
        turn = self.turns.pop(name, None) or await self.turn(session)
        self.sessions[name] = await self.store.commit_turn(session, turn)

    async def drop(self, name: str, session: Session) -> None:
        turn = self.turns.pop(name, None) or await self.turn(session)
        await self.store.record_turn(session, dropped(turn))

    async def touch(self, name: str, session: Session) -> None:
        self.sessions[name] = await self.store.touch_session(session.key, self.now)

    async def mark(self, name: str, session: Session) -> None:
        change = SessionChange(status=self.chance.choice(list(SessionStatus)[:3]))
        self.sessions[name] = await self.store.update_session(session.key, change, self.now)

    async def state(self, name: str, session: Session) -> None:
        self.sessions[name] = await self.store.patch_state(session.key, {"n": self.now}, self.now)

    async def back(self, name: str, session: Session) -> None:
        self.sessions[name] = await self.store.move_head(session, Back(1), self.now)

    async def name(self, name: str, session: Session) -> None:
        await self.store.add_checkpoint(
            session, make_checkpoint(checkpoint_id=self.ids(), created_at=self.now)
        )

    async def note(self, name: str, session: Session) -> None:
        note = make_note(str(session.head), note_id=self.ids(), created_at=self.now)
        if session.head is not None:
            self.sessions[name] = await self.store.add_note(session, note, Usage(3, 4))

    async def delete(self, name: str, session: Session) -> None:
        if self.chance.random() < 0.3:
            del self.sessions[name]
            await self.store.delete_session(session.key)

    async def sweep(self, name: str, session: Session) -> None:
        await self.store.expire_and_purge(self.now, 10)


async def unordered(store: SqliteStore, table: str) -> list[str]:
    """Return the rows of a table; without the numbers that say only which was first."""
    skipped = 1 if table in {"turns", "idempotency_keys"} else 0
    return sorted(repr(row[skipped:]) for row in await rows(store, table))


@pytest.mark.parametrize("seed", range(6))
async def test_the_file_is_the_same_as_without_waiting(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever happens beside and during turns, at the end every table says what it says if none waits."""
    monkeypatch.setattr(sqlite_starts, "START_DELAY_S", 1000)
    contents = []
    for waits in (True, False):
        store = SqliteStore(str(tmp_path / f"{waits}.db"), LIFE)
        await store.open(BOOT)
        await Script(store, seed, waits=waits).run()
        await store.ping()
        contents.append({table: await unordered(store, table) for table in TABLES})
        await store.close()
    assert contents[0] == contents[1]
