"""What moves, names, notes and events cost in the SQLite store, however long a session is."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import apsw
import pytest

from app.domain.branch import Back, ToCheckpoint, ToTurn
from app.domain.checkpoint import AutoCheckpoint
from app.domain.journal import Position
from app.domain.session import Session
from app.domain.turn import Turn, Usage
from app.stores.sqlite import file as sqlite_file
from app.stores.sqlite import journal as sqlite_journal
from app.stores.sqlite import reads as sqlite_reads
from app.stores.sqlite.connection import Connection
from app.stores.sqlite.rows import Names
from app.stores.sqlite.store import SqliteStore

from .builders import (
    BOOT,
    LIFE,
    T0,
    extend,
    make_checkpoint,
    make_note,
    make_session,
    make_turn,
    new_id,
    running,
    stored_session,
)

SHORT, LONG = 10, 1000


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "agentpool.db")


@pytest.fixture
async def store(path: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SqliteStore]:
    """A store that syncs nothing: here steps and rows are counted, in sessions of thousands of turns."""

    def connect_unsynced(path: str) -> apsw.Connection:
        connection = connect(path)
        connection.pragma("synchronous", "off")
        return connection

    connect = sqlite_file.connect
    monkeypatch.setattr(sqlite_file, "connect", connect_unsynced)
    store = SqliteStore(path, LIFE)
    await store.open(BOOT)
    yield store
    await store.close()


Write = Callable[[SqliteStore, Session, list[Turn]], Awaitable[Any]]


async def _checkpoint(store: SqliteStore, session: Session, turns: list[Turn]) -> None:
    await store.add_checkpoint(session, make_checkpoint())


async def _patched_checkpoint(store: SqliteStore, session: Session, turns: list[Turn]) -> None:
    await store.add_checkpoint(await store.patch_state(session.key, {"x": 1}, T0), make_checkpoint())


async def _restore(store: SqliteStore, session: Session, turns: list[Turn]) -> None:
    session = await store.move_head(session, ToTurn(turns[0].turn_id), T0)
    named = await store.add_checkpoint(session, make_checkpoint())
    session = await store.move_head(session, ToTurn(turns[-1].turn_id), T0)
    await store.move_head(session, ToCheckpoint(named.checkpoint_id), T0)


async def _rewind(store: SqliteStore, session: Session, turns: list[Turn]) -> None:
    await store.move_head(session, Back(len(turns) - 1), T0)


async def _note(store: SqliteStore, session: Session, turns: list[Turn]) -> None:
    await store.add_note(session, make_note(turns[0].turn_id), Usage(1, 1))


async def _patch(store: SqliteStore, session: Session, turns: list[Turn]) -> None:
    await store.patch_state(session.key, {"x": 1}, T0)


async def _edit(store: SqliteStore, session: Session, turns: list[Turn]) -> None:
    turn = make_turn(session, parent=turns[0].turn_id, depth=2)
    await store.commit_turn(session, turn, resets_state=True, checkpoint=AutoCheckpoint(new_id(), 3))


@pytest.mark.parametrize(
    ("write", "rows"),
    [
        # A name; with a state that is new: a patch's two, the state, the name, the record.
        (_checkpoint, 1),
        (_patched_checkpoint, 5),
        (_rewind, 3),  # the record, an event, a counter
        (_restore, 10),  # three of these and a name
        (_patch, 2),
        (_note, 3),
        (_edit, 10),  # the turn, the record, a name, seven counters
    ],
)
async def test_what_is_written_does_not_grow_with_the_session(
    store: SqliteStore, write: Write, rows: int
) -> None:
    """Each changes as many rows, and a known few, in a session of 10 turns and in one of 1,000."""
    written = []
    for length in (SHORT, LONG):
        session, turns = await extend(store, await stored_session(store, f"s{length}"), length)
        before = await _rows_written(store)
        await write(store, session, turns)
        written.append(await _rows_written(store) - before)
    assert written == [rows, rows]


async def test_a_plain_turn_costs_the_same_with_all_there_is_beside_it(store: SqliteStore) -> None:
    """A turn that goes on from the head takes as many steps with states, notes and names as without."""
    plain, rich = await stored_session(store, "plain"), await stored_session(store, "rich", state={"a": 1})
    plain, _ = await extend(store, plain, 20)
    rich, turns = await extend(store, rich, 20)
    for number in range(20):
        rich = await store.patch_state(rich.key, {"n": number}, T0)
        await store.add_checkpoint(rich, make_checkpoint())
        rich = await store.add_note(rich, make_note(turns[number].turn_id), Usage())
    costs = []
    for session in (plain, rich):
        session = await store.commit_turn(session, make_turn(session))  # keeps the state, once
        turn = make_turn(session)
        await store.start_turn(session, running(turn))
        costs.append(await _steps_of_write(store, store.commit_turn, session, turn))
    assert costs[1] <= 1.1 * costs[0]


async def test_ten_thousand_events_cost_as_hundred(store: SqliteStore, path: str) -> None:
    """A page of 50 from either end or the middle, and an append, take under twice the steps at 10,000."""
    costs = []
    for events in (100, 10_000):
        session, turns = await extend(store, await stored_session(store, f"s{events}"), events // 4)
        for number in range(events // 40):
            session = await store.patch_state(session.key, {"n": number}, T0)
        middle = Position(turns[len(turns) // 2].started_at)
        costs.append(
            [
                await _steps_of_write(store, store.commit_turn, session, make_turn(session)),
                await _steps_of_write(store, store.patch_state, session.key, {"n": 1}, T0),
                *(
                    _steps_of_read(path, sqlite_journal.list_entries, Names(), session, *where)
                    for where in (
                        (None, 20, True),
                        (None, 20, False),
                        (middle, 10, True),
                        (middle, 10, False),
                    )
                ),
            ]
        )
    assert all(many < 2 * few for few, many in zip(*costs, strict=True)), costs


async def test_a_noted_session_loads_like_a_short_one(store: SqliteStore, path: str) -> None:
    """With a note 20 turns before the head the path of 1,020 turns takes as many steps as that of 20."""
    short, _ = await extend(store, await stored_session(store, "short"), 20)
    long, turns = await extend(store, await stored_session(store, "long"), 1020)
    long = await store.add_note(long, make_note(turns[999].turn_id), Usage())
    assert len(sqlite_reads.load_path(sqlite_file.connect_reader(path), long).messages) == 40
    few, many = (_steps_of_read(path, sqlite_reads.load_path, session) for session in (short, long))
    assert many < 1.5 * few


async def test_a_thousand_turns_fork_in_one_step(store: SqliteStore) -> None:
    """A fork of a long session with many states is one transaction, and all of it is there."""
    session, turns = await extend(store, await stored_session(store, state={"n": -1}), 500)
    for number in range(500):
        session = await store.patch_state(session.key, {"n": number}, T0)
        turns.append(make_turn(session))
        session = await store.commit_turn(session, turns[-1])
    before = store.transactions
    fork = await store.fork_session(session, None, make_session("fork"))
    assert store.transactions == before + 1
    assert await store.find_session(fork.key) == fork
    assert (await store.load_path(fork)).messages == (await store.load_path(session)).messages
    states = [(await store.at_turn(fork, turns[depth].turn_id)).state["n"] for depth in (0, 499, 500, 999)]
    assert states == [-1, -1, 0, 499]


async def test_no_query_reads_a_whole_table(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that a store asks SQLite, only what is small by nature is read as a whole: the counters."""
    plans: dict[str, list[str]] = {}

    class Explaining(Connection):
        def execute(self, sql: str, *values: Any, **options: Any) -> apsw.Cursor:
            if sql not in plans and sql.split(" ")[0] in {"SELECT", "WITH", "UPDATE", "DELETE", "INSERT"}:
                plans[sql] = [row[3] for row in super().execute("EXPLAIN QUERY PLAN " + sql, *values)]
            return super().execute(sql, *values, **options)

    monkeypatch.setattr(sqlite_file, "Connection", Explaining)
    store = SqliteStore(path, LIFE)
    await store.open(BOOT)
    plans.clear()  # the start counts all sessions, in an index
    await _do_everything(store)
    await store.close()
    whole = [step for steps in plans.values() for step in steps if step.startswith("SCAN")]
    whole = [step for step in whole if "VALUES CLAUSE" not in step]  # rows of the statement's own
    assert len(plans) > 40
    assert {step for step in whole if step != "SCAN path"} == {"SCAN counters"}
    sorting = [sql for sql, steps in plans.items() for step in steps if "ORDER BY" in step]
    assert all(" FROM notes " in sql for sql in sorting)  # a session has few, and each cost a model's call


async def _do_everything(store: SqliteStore) -> None:
    session, turns = await extend(store, await stored_session(store, state={"a": 1}, user_id="u"), 4)
    session = await store.patch_state(session.key, {"b": 2}, T0)
    await store.add_checkpoint(session, make_checkpoint())
    session = await store.add_note(session, make_note(turns[1].turn_id), Usage(1, 1))
    session = await store.move_head(session, Back(1), T0)
    edit = make_turn(session, parent=turns[0].turn_id, depth=2)
    session = await store.commit_turn(
        session, edit, resets_state=True, checkpoint=AutoCheckpoint(new_id(), 1)
    )
    checkpoints = await store.list_checkpoints(session, 1)
    await store.list_checkpoints(session, 1, checkpoints.next_cursor)
    session = await store.move_head(session, ToCheckpoint(checkpoints.checkpoints[0].checkpoint_id), T0)
    await store.fork_session(session, ToTurn(turns[2].turn_id), make_session("fork"))
    await store.get_note(session)
    await store.load_path(session)
    await store.at_turn(session, None)
    for newest_first in (True, False):
        await store.list_entries(session, None, 10, newest_first=newest_first)
    await store.delete_checkpoints(session, checkpoints.checkpoints[0].checkpoint_id)
    await store.delete_checkpoints(session)
    await store.get_session_stats()
    for now in (T0 + 1000, T0 + 200_000, T0 * 2):
        await store.expire_and_purge(now, 10)
    assert store.session_count_nowait() == 0


async def _rows_written(store: SqliteStore) -> int:
    return await store._write("count", lambda unit: unit.connection.total_changes())


async def _steps_of_write(store: SqliteStore, call: Callable[..., Awaitable[Any]], *values: Any) -> int:
    """Return how many steps of SQLite's machine the writer takes for a call."""
    steps = _Steps()
    await store._write("watch", lambda unit: unit.connection.set_progress_handler(steps, 1))
    await call(*values)
    await store._write("unwatch", lambda unit: unit.connection.set_progress_handler(None))
    return steps.taken


def _steps_of_read(path: str, call: Callable[..., Any], *values: Any) -> int:
    connection = sqlite_file.connect_reader(path)
    steps = _Steps()
    connection.set_progress_handler(steps, 1)
    call(connection, *values)
    connection.close()
    return steps.taken


class _Steps:
    def __init__(self) -> None:
        self.taken = 0

    def __call__(self) -> bool:
        self.taken += 1
        return False
