"""What is promised of the SQLite store alone: the file, the lock, grouping, statistics."""

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from threading import Event

import apsw
import pytest

from app.domain.errors import SessionLimit, StoreLocked, StoreUnavailable
from app.domain.session import SessionQuery
from app.domain.turn import TurnStatus
from app.stores.sqlite import writes as sqlite_writes
from app.stores.sqlite.connection import Connection
from app.stores.sqlite.file import migrations
from app.stores.sqlite.store import SqliteStore
from app.stores.sqlite.unit import Unit

from .builders import BOOT, LIFE, T0, make_session, make_turn, running

OPENING = """
import asyncio, sys
from app.domain.session import LifeSpan
from app.stores.sqlite import writes as sqlite_writes
from app.stores.sqlite.store import SqliteStore
asyncio.run(SqliteStore(sys.argv[1], LifeSpan()).open("other"))
"""


_IN_ORDER = "SELECT session_id FROM sessions ORDER BY id"


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "agentpool.db")


@pytest.fixture
async def store(path: str) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(path, LIFE)
    await store.open(BOOT)
    yield store
    await store.close()


async def test_what_waits_together_is_committed_together(store: SqliteStore) -> None:
    """Three hundred commits at once take less than a tenth as many transactions."""
    sessions = [make_session(f"s{number}") for number in range(300)]
    await asyncio.gather(*(store.create_session(session) for session in sessions))
    before = store.transactions
    await asyncio.gather(*(store.commit_turn(session, make_turn(session)) for session in sessions))
    assert store.transactions - before < 30


async def test_a_bad_work_does_not_fail_its_group(store: SqliteStore) -> None:
    """Of forty sessions created at once the one that cannot be stored fails alone."""
    sessions = [make_session(f"s{n}", title="\ud800" if n == 20 else "fine") for n in range(40)]
    results = await asyncio.gather(
        *(store.create_session(session) for session in sessions), return_exceptions=True
    )
    assert [n for n, result in enumerate(results) if result is not None] == [20]
    assert store.session_count_nowait() == 39
    assert (await store.list_sessions(SessionQuery(owner="", now=T0))).total == 39


@pytest.mark.parametrize("bad", [0, 20, 39])
async def test_a_work_that_fails_late_is_undone_alone(store: SqliteStore, bad: int) -> None:
    """Of forty works in a group one raises after writing: it leaves nothing, the others run in order."""

    def work(unit: Unit, number: int) -> None:
        sqlite_writes.create_session(unit, make_session(f"s{number}"))
        if number == bad:
            raise SessionLimit

    gate = Event()
    holding = store._write("hold", lambda unit: gate.wait())
    calls = asyncio.gather(
        holding, *(store._write("work", work, number) for number in range(40)), return_exceptions=True
    )
    asyncio.get_running_loop().call_soon(gate.set)
    _, *results = await calls
    assert [n for n, result in enumerate(results) if result is not None] == [bad]
    assert [n for n in range(40) if await store.find_session(make_session(f"s{n}").key) is None] == [bad]
    rows = await store._write("look", lambda unit: unit.connection.execute(_IN_ORDER).fetchall())
    assert [row[0] for row in rows] == [f"s{n}" for n in range(40) if n != bad]
    assert store.session_count_nowait() == (await store.get_session_stats()).total == 39
    assert store.transactions <= 5


async def test_a_name_that_was_rolled_back_is_stored_again(store: SqliteStore) -> None:
    """A model first named in a commit that failed is known to the next commit."""
    session = make_session()
    await store.create_session(session)
    good = make_turn(session, model="new-model")
    with pytest.raises(ValueError):
        await store.commit_turn(session, replace(good, depth=7))
    await store.commit_turn(session, good)
    assert (await store.get_turn(session, good.turn_id)).model == "new-model"


async def test_a_lost_start_record_is_logged(
    store: SqliteStore, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A start record that cannot be written leaves an error in the log and raises nowhere."""
    session = make_session()
    await store.create_session(session)
    _break(path, "UPDATE sessions SET rev = rev + 1")
    with caplog.at_level(logging.ERROR):
        await store.start_turn(session, running(make_turn(session)))
        await store.ping()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "start_turn" in caplog.text


async def test_a_second_store_on_the_file_is_refused(store: SqliteStore, path: str) -> None:
    """While a store is open, opening its file again raises StoreLocked in one sentence; later it works."""
    second = SqliteStore(path, LIFE)
    with pytest.raises(StoreLocked, match=rf"^The database {path} is in use by process {os.getpid()}\.$"):
        await second.open(BOOT)
    link = path + ".link"
    os.symlink(path, link)
    with pytest.raises(StoreLocked):
        await SqliteStore(link, LIFE).open(BOOT)
    await store.close()
    await second.open(BOOT)
    await second.close()


async def test_another_process_is_refused(store: SqliteStore, path: str) -> None:
    """A second process that opens the file ends with StoreLocked."""
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", OPENING, path, stderr=subprocess.PIPE)
    _, errors = await child.communicate()
    assert child.returncode == 1
    assert b"StoreLocked: The database" in errors


async def test_a_store_may_wait_for_the_lock(store: SqliteStore, path: str) -> None:
    """With wait_for_lock the opening ends when the other store is closed."""
    waiting = SqliteStore(path, LIFE, wait_for_lock=True)
    opening = asyncio.get_running_loop().create_task(waiting.open("boot-2"))
    await store.create_session(make_session())
    assert not opening.done()
    await store.close()
    await opening
    assert waiting.session_count_nowait() == 1
    await waiting.close()


async def test_a_waiting_store_can_be_given_up(store: SqliteStore, path: str) -> None:
    """An opening that is cancelled or closed while it waits ends, and can be begun anew."""
    waiting = SqliteStore(path, LIFE, wait_for_lock=True)
    for _ in range(2):
        opening = asyncio.get_running_loop().create_task(waiting.open("boot-2"))
        await store.ping()
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
    await waiting.close()
    await store.close()
    await waiting.open("boot-2")
    await waiting.close()


@pytest.mark.parametrize("name", ["", ":memory:", "missing/agentpool.db", "."])
async def test_an_unusable_path_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No path, no file, no directory: StoreUnavailable says which, and nothing is created."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreUnavailable):
        await SqliteStore(name, LIFE).open(BOOT)
    assert os.listdir(tmp_path) == []


async def test_a_newer_schema_is_refused(store: SqliteStore, path: str) -> None:
    """A file of a newer schema raises StoreUnavailable that names both, and is left alone."""
    await store.close()
    newer = len(migrations()) + 1
    _break(path, f"PRAGMA user_version = {newer}")
    with pytest.raises(StoreUnavailable, match=f"schema {newer}"):
        await SqliteStore(path, LIFE).open(BOOT)
    with apsw.Connection(path) as connection:
        assert connection.pragma("user_version") == newer
    connection.close()


async def test_a_file_of_another_program_is_refused(path: str) -> None:
    """Neither another program's database nor a file that is none is written to."""
    _break(path, "CREATE TABLE mine (a)")
    with pytest.raises(StoreUnavailable, match="another program"):
        await SqliteStore(path, LIFE).open(BOOT)
    _write(path, b"no database " * 1000)
    with pytest.raises(StoreUnavailable, match="damaged"):
        await SqliteStore(path, LIFE).open(BOOT)
    assert _read(path) == b"no database " * 1000


async def test_the_file_is_its_owners_alone(store: SqliteStore, path: str) -> None:
    """Nobody else may read the database, its log or its lock."""
    await store.create_session(make_session())
    for suffix in ("", "-wal", "-shm", ".lock"):
        assert os.stat(path + suffix).st_mode & 0o077 == 0


async def test_a_short_turn_is_small(store: SqliteStore, path: str) -> None:
    """A thousand turns of two short messages, noted at their start too, take under 300 bytes each."""
    session = make_session()
    await store.create_session(session)
    await store.close()
    before = _size(path)
    await store.open(BOOT)
    for _ in range(1000):
        turn = make_turn(session)
        await store.start_turn(session, running(turn))
        session = await store.commit_turn(session, turn)
    await store.close()
    assert (_size(path) - before) / 1000 < 300


async def test_statistics_are_counted_with_the_turns(store: SqliteStore, path: str) -> None:
    """The counters hold each ended turn once, whether it had a start record or was repeated."""
    session = make_session()
    await store.create_session(session)
    turn = make_turn(session)
    await store.start_turn(session, running(turn))
    after = await store.commit_turn(session, turn)
    await store.commit_turn(session, turn)
    bad = replace(make_turn(after), status=TurnStatus.FAILED, reply=None, finish_reason=None)
    await store.record_turn(session, bad)
    await store.record_turn(session, bad)
    await store.close()
    with apsw.Connection(path) as connection:
        counters = dict(connection.execute("SELECT name, value FROM counters"))
    connection.close()
    assert counters == {
        "sessions": 1, "created": 1, "active": 1, "lifetime_ms": 2812, "idle_after_s": 100,
        "turns": 2, "turns_failed": 1, "turns_finished": 1, "response_ms": 812, "ms:78": 1,
        "prompt_tokens": 42, "completion_tokens": 12,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("query", "index"),
    [
        (SessionQuery(owner=None, now=T0), "sessions_by_time"),
        (SessionQuery(owner="o", now=T0), "sessions_by_owner"),
        (SessionQuery(owner="o", now=T0, user_id="u"), "sessions_by_user"),
        (SessionQuery(owner=None, now=T0, user_id="u"), "sessions_by_user"),
        (SessionQuery(owner="o", now=T0, agent_id="a"), "sessions_by_owner"),
        (SessionQuery(owner=None, now=T0, agent_id="a"), "sessions_by_time"),
    ],
)
async def test_a_page_is_read_in_the_order_of_an_index(
    store: SqliteStore, path: str, query: SessionQuery, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page of sessions never sorts: it follows the index of its narrowest filter."""
    from app.stores.sqlite import reads as sqlite_reads

    plans: list[str] = []

    class Explaining(Connection):
        def execute(self, sql: str, *args: object) -> apsw.Cursor:  # type: ignore[override]
            if "ORDER BY" in sql:
                plans.extend(row[3] for row in super().execute("EXPLAIN QUERY PLAN " + sql, *args))
            return super().execute(sql, *args)  # type: ignore[arg-type]

    connection = Explaining(path)
    sqlite_reads.list_sessions(connection, query, LIFE)
    connection.close()
    assert len(plans) == 1
    assert f"INDEX {index} " in plans[0]


def _break(path: str, sql: str) -> None:
    """Change the file behind the store's back."""
    connection = apsw.Connection(path)
    connection.execute(sql)
    connection.close()


def _size(path: str) -> int:
    return os.path.getsize(path)


def _write(path: str, content: bytes) -> None:
    Path(path).write_bytes(content)


def _read(path: str) -> bytes:
    return Path(path).read_bytes()
