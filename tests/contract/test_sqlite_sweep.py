"""How the SQLite store sweeps and counts: in steps, by index, and right after every kind of end."""

import random
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from signal import SIGKILL

import apsw
import pytest

from app.domain.branch import Back
from app.domain.idempotency import Binding
from app.domain.session import LifeSpan, Session, SessionChange, SessionStatus
from app.domain.state import StateScope
from app.domain.stats import SessionStats
from app.domain.turn import Usage
from app.stores.buckets import bucket_of, percentile
from app.stores.sqlite import file as sqlite_file
from app.stores.sqlite import sweep as sqlite_sweep
from app.stores.sqlite.records import PHASES
from app.stores.sqlite.store import SqliteStore

from .builders import (
    BOOT,
    LIFE,
    T0,
    extend,
    failed,
    make_checkpoint,
    make_note,
    make_session,
    make_turn,
    stored_session,
)
from .children import purge_and_die, write_and_kill

KILLS = 8
DUE = T0 + (LIFE.ttl_s + LIFE.retention_s) * 1000 + 100_000
OWNED = ("turns", "states", "notes", "checkpoints", "session_events", "idempotency_keys")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "agentpool.db")


@pytest.fixture
async def store(path: str) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(path, LIFE)
    await store.open(BOOT)
    yield store
    await store.close()


def _statuses(stats: SessionStats) -> tuple[int, int, int, int]:
    return stats.active, stats.idle, stats.archived, stats.expired


@pytest.mark.parametrize("rows", [1, 3, 7, 1000])
@pytest.mark.parametrize("spread", [0, 1, 40])
async def test_a_sweep_in_steps_ends_where_one_step_would(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch, rows: int, spread: int
) -> None:
    """However few rows a step takes, and however many have one time, each status is right afterwards."""
    monkeypatch.setattr(sqlite_sweep, "ROWS_PER_STEP", rows)
    sessions = [
        make_session(f"s{n}", now=T0 + spread * n, ttl_s=n + 90, archived=n % 5 == 0, marked_idle=n % 7 == 0)
        for n in range(25)
    ]
    sessions = [replace(s, expires_at=None) if s.archived else s for s in sessions]
    await store.create_sessions(sessions)
    for now in (T0, T0 + 95_000, T0 + 100_500, T0 + 100_500, T0 + 103_000, T0 + 150_000):
        await store.expire_and_purge(now, 0)
        expected = Counter(session.status_at(now, LIFE) for session in sessions)
        stats = await store.get_session_stats()
        assert _statuses(stats) == tuple(expected[status] for status in PHASES)
    before = store.transactions
    assert await store.expire_and_purge(T0 + 150_000, 0) == (0, 0)
    assert store.transactions == before + 1


async def test_a_long_sweep_lets_others_write(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep and a purge of thirty sessions take a transaction for each step, none more than its rows."""
    monkeypatch.setattr(sqlite_sweep, "ROWS_PER_STEP", 10)
    await store.create_sessions([make_session(f"s{n}", now=T0 + n) for n in range(30)])
    before = store.transactions
    assert await store.expire_and_purge(DUE, 25) == (30, 25)
    # Three full steps and the end of the sweep; a removal writes its own row and two counts, so
    # four of them fill a step of the purge: six full ones and the end.
    assert store.transactions - before == 11
    assert store.session_count_nowait() == 5


async def test_a_write_counts_a_session_as_it_is_then(store: SqliteStore) -> None:
    """Each write of a session moves it to the status that it has at that time, without a sweep."""
    session = await stored_session(store, ttl_s=1000)
    seen = []

    async def note_status() -> None:
        stats = await store.get_session_stats()
        assert sum(_statuses(stats)) == stats.total
        seen.append(_statuses(stats))

    for status in (SessionStatus.IDLE, SessionStatus.ARCHIVED, SessionStatus.ACTIVE):
        await store.update_session(session.key, SessionChange(status=status), T0)
        await note_status()
    await store.patch_state(session.key, {"a": 1}, T0 + 1_000_000)
    await note_status()
    await store.touch_session(session.key, T0 + 1_000_000)
    await note_status()
    await store.delete_session(session.key)
    await note_status()
    assert seen == [(0, 1, 0, 0), (0, 0, 1, 0), (1, 0, 0, 0), (0, 0, 0, 1), (1, 0, 0, 0), (0, 0, 0, 0)]


async def test_a_session_from_before_the_sweep_is_counted_by_the_sweeps_time(store: SqliteStore) -> None:
    """What is written with an older time than that of the last sweep is not lost to the next one."""
    await store.expire_and_purge(T0 + 2_000_000, 10)
    session = await stored_session(store)
    assert _statuses(await store.get_session_stats()) == (0, 0, 0, 1)
    await store.touch_session(session.key, T0 + 1_950_000)
    assert _statuses(await store.get_session_stats()) == (1, 0, 0, 0)
    assert await store.expire_and_purge(T0 + 1_000_000, 10) == (0, 0)
    await store.expire_and_purge(T0 + 2_060_000, 10)
    assert _statuses(await store.get_session_stats()) == (0, 1, 0, 0)


async def test_another_idle_time_counts_at_the_next_start(store: SqliteStore, path: str) -> None:
    """After a start with another ``idle_after_s`` the statuses are those that this one gives."""
    await store.create_sessions([make_session(f"s{n}", now=T0 + n * 10_000) for n in range(10)])
    await store.expire_and_purge(T0 + 150_000, 10)
    assert _statuses(await store.get_session_stats()) == (4, 6, 0, 0)
    await store.close()
    for idle_after_s, idle in ((80, 8), (0, 0), (100, 6)):
        other = SqliteStore(path, LifeSpan(idle_after_s=idle_after_s, ttl_s=1000, retention_s=500))
        await other.open(BOOT)
        assert _statuses(await other.get_session_stats()) == (10 - idle, idle, 0, 0)
        await other.close()


@pytest.mark.parametrize(
    "harm",
    [
        "DELETE FROM sessions WHERE session_id = 's1'",
        "UPDATE counters SET value = 99 WHERE name = 'sessions'",
        "UPDATE counters SET value = 99 WHERE name = 'idle'",
        "DELETE FROM counters WHERE name IN ('active', 'idle')",
    ],
)
async def test_wrong_counts_of_sessions_are_corrected_at_the_start(
    store: SqliteStore, path: str, harm: str
) -> None:
    """Totals that do not add up are counted anew when the store is opened."""
    await store.create_sessions([make_session(f"s{n}", marked_idle=n % 2 == 0) for n in range(8)])
    await store.close()
    connection = apsw.Connection(path)
    connection.execute(harm)
    total = connection.execute("SELECT count(*) FROM sessions").get
    connection.close()
    await store.open(BOOT)
    stats = await store.get_session_stats()
    assert (stats.total, store.session_count_nowait()) == (total, total)
    assert _statuses(stats) == (total - 4, 4, 0, 0)


async def test_counters_are_right_after_a_kill(path: str) -> None:
    """After SIGKILL amid turns the counters are what the stored turns and sessions give."""
    for life in range(3):
        await write_and_kill(path, f"boot-{life}", 40 + 60 * life)
        store = SqliteStore(path, LIFE)
        await store.open(f"after-{life}")
        stats = await store.get_session_stats()
        turns = await _all_turns(store, path)
        assert stats.turns == len(turns) == stats.turns_finished + stats.turns_failed
        finished = [turn for turn in turns if turn.is_committed]
        assert stats.turns_finished == len(finished) > 0
        assert stats.response_ms == sum(turn.duration_ms for turn in finished)
        assert stats.tokens == sum(turn.usage.total_tokens for turn in turns)
        sessions = [await store.find_session(make_session(key).key) for key in _ids(path)]
        assert stats.total == stats.created == sum(_statuses(stats)) == len(sessions)
        lifetimes = [s.last_accessed - s.created_at for s in sessions if s is not None]
        assert stats.lifetime_ms == sum(lifetimes) > 0
        await store.close()


async def _all_turns(store: SqliteStore, path: str):
    turns = []
    for session_id in _ids(path):
        session = await store.find_session(make_session(session_id).key)
        assert session is not None
        turns += (await store.list_turns(session, 100_000)).turns
    return turns


def _ids(path: str) -> list[str]:
    connection = apsw.Connection(path)
    ids = [row[0] for row in connection.execute("SELECT session_id FROM sessions")]
    connection.close()
    return ids


async def _furnished(store: SqliteStore, number: int) -> Session:
    """Store a session with a row in every table that belongs to sessions."""
    session = await stored_session(store, f"s{number}", state={"n": number}, user_id="u")
    turn = make_turn(session, binding=Binding("", f"key-{number}", b"f" * 16))
    session, turns = await extend(store, await store.commit_turn(session, turn), 3)
    await store.record_turn(session, failed(make_turn(session)))
    session = await store.patch_state(session.key, {"x": 1}, T0)
    await store.add_checkpoint(session, make_checkpoint())
    session = await store.add_note(session, make_note(turns[0].turn_id), Usage(1, 1))
    return await store.move_head(session, Back(1), T0)


async def test_a_kill_amid_a_purge_leaves_no_orphan(store: SqliteStore, path: str) -> None:
    """After SIGKILL anywhere in a purge each session is there with all it has or gone; the rest goes next."""
    for number in range(60):
        await _furnished(store, number)
    scope = StateScope("default", "", "u")
    await store.patch_shared(scope, {"a": 1}, T0)
    usage = await store.get_usage("", "u", 10)
    await store.close()
    whole = _counts(path)
    chance = random.Random(4)
    left = []
    for _ in range(KILLS):
        assert await purge_and_die(path, DUE, chance.randint(500, 9_000)) == -SIGKILL
        counts = _counts(path)
        left.append(counts["sessions"])
        assert {name: count * 60 for name, count in counts.items()} == {
            name: count * counts["sessions"] for name, count in whole.items()
        }
        assert _orphans(path) == 0
    await store.open(BOOT)
    assert await store.expire_and_purge(DUE, 1_000) == (0, left[-1])
    assert len(set(left)) > 2  # some were purged before they were killed, too
    assert _counts(path) == dict.fromkeys(("sessions", *OWNED), 0)
    assert await store.get_usage("", "u", 10) == usage
    assert (await store.get_shared(scope)).values == {"a": 1}
    stats = await store.get_session_stats()
    assert (stats.total, stats.created, *_statuses(stats)) == (0, 60, 0, 0, 0, 0)


def _counts(path: str) -> dict[str, int]:
    connection = apsw.Connection(path)
    counts = {
        table: connection.execute(f"SELECT count(*) FROM {table}").get for table in ("sessions", *OWNED)
    }
    assert connection.pragma("integrity_check") == "ok"
    connection.close()
    return counts


def _orphans(path: str) -> int:
    connection = apsw.Connection(path)
    found = [
        connection.execute(f"SELECT count(*) FROM {table} WHERE session NOT IN (SELECT id FROM sessions)").get
        for table in OWNED
    ]
    connection.close()
    return sum(found)


def test_every_table_of_sessions_is_purged(path: str) -> None:
    """The tables that these tests look at are all that have a column for their session."""
    connection = apsw.Connection(path)
    for step in sqlite_file.migrations():
        connection.execute(step)
    rows = connection.execute(
        "SELECT t.name FROM sqlite_schema AS t JOIN pragma_table_info(t.name) AS c"
        " WHERE t.type = 'table' AND c.name = 'session'"
    )
    assert {name for (name,) in rows} == set(OWNED)
    connection.close()


def test_a_response_time_is_told_to_a_tenth() -> None:
    """From one millisecond to a day each time is given back from its bucket with a tenth off at most."""
    assert percentile({bucket_of(0): 1}, 0.95) == 0
    for time_ms in (*range(1, 5000), *(round(1.07**n) for n in range(125, 270))):
        told = percentile({bucket_of(time_ms): 1}, 0.95)
        assert abs(told - time_ms) <= time_ms / 10
