"""The SQLite store through its port, durable (``synchronous=FULL``): commits, finds, paths.

A batch is 1,000 operations: its milliseconds are microseconds for each, and 1,000,000
divided by them is how many there are in a second.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.domain.session import Session
from app.stores.sqlite.store import SqliteStore
from tests.benchmarks.conftest import Run
from tests.contract.builders import BOOT, LIFE, current, extend, make_turn, stored_session

BATCH = 1000
CLIENTS = 50
pytestmark = pytest.mark.benchmark(group="store")


@pytest.fixture
def store(run: Run, tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(str(tmp_path / "agentpool.db"), LIFE)
    run(store.open(BOOT))
    yield store
    run(store.close())


async def make_sessions(store: SqliteStore) -> list[Session]:
    return [await stored_session(store, f"s{number}") for number in range(CLIENTS)]


def test_thousand_commits_of_fifty_clients(benchmark, run: Run, store: SqliteStore) -> None:
    """Fifty clients, each of which commits its next turn when the one before is durable."""
    sessions = run(make_sessions(store))

    async def client(number: int) -> None:
        for _ in range(BATCH // CLIENTS):
            session = sessions[number]
            sessions[number] = await store.commit_turn(session, make_turn(session))

    async def batch() -> None:
        await asyncio.gather(*map(client, range(CLIENTS)))

    benchmark.pedantic(lambda: run(batch()), rounds=10, warmup_rounds=1)
    depths = {run(current(store, session)).depth for session in sessions}
    assert len(depths) == 1
    assert depths.pop() % (BATCH // CLIENTS) == 0


def test_commit_of_one_client(benchmark, run: Run, store: SqliteStore) -> None:
    """One commit with nobody to share its transaction with."""
    sessions = [run(stored_session(store))]

    async def commit() -> None:
        sessions[0] = await store.commit_turn(sessions[0], make_turn(sessions[0]))

    benchmark(lambda: run(commit()))


@pytest.mark.parametrize("clients", [1, CLIENTS])
def test_thousand_finds(benchmark, run: Run, store: SqliteStore, clients: int) -> None:
    """The records of sessions, read by one client and by fifty at once."""
    sessions = run(make_sessions(store))

    async def client(number: int) -> None:
        for _ in range(BATCH // clients):
            assert await store.find_session(sessions[number].key) is not None

    async def batch() -> None:
        await asyncio.gather(*map(client, range(clients)))

    benchmark(lambda: run(batch()))


@pytest.mark.parametrize("messages", [20, 1000])
def test_load_path(benchmark, run: Run, store: SqliteStore, messages: int) -> None:
    """What an activation reads: the whole context of a session."""
    session, _ = run(extend(store, run(stored_session(store)), messages // 2))
    path = benchmark(lambda: run(store.load_path(session)))
    assert len(path.messages) == messages
