"""The pool with 100,000 live agents: a lease, the statistics, a sweep.

A batch is 1,000 operations: its milliseconds are microseconds for each.
"""

import asyncio
import random

import pytest

from app.domain.ids import SessionKey
from app.pool.limits import PoolLimits
from app.pool.manager import AgentManager
from tests.benchmarks.conftest import Run
from tests.contract.builders import make_session
from tests.fakes import FakeClock, FakeFactory, FakeStore

ENTRIES, FEW_ENTRIES = 100_000, 5000
GROUP = 1000
BATCH = 1000
pytestmark = pytest.mark.benchmark(group="pool")


@pytest.fixture(scope="module")
def entries(pytestconfig: pytest.Config) -> int:
    """How many agents live; few where nothing is timed."""
    return FEW_ENTRIES if pytestconfig.getoption("benchmark_disable") else ENTRIES


async def fill(clock: FakeClock, entries: int) -> AgentManager:
    """Return a pool of idle agents, of which ``GROUP`` came into it in each second."""
    store = FakeStore()
    limits = PoolLimits(max_instances=entries, idle_ttl_s=entries / GROUP)
    pool = AgentManager(store, FakeFactory(), limits, clock)
    for start in range(0, entries, GROUP):
        names = [str(number) for number in range(start, start + GROUP)]
        await store.create_sessions([make_session(name) for name in names])
        for name in names:
            await use(pool, SessionKey("", name))
        clock.advance(1)
        await asyncio.sleep(0)
    return pool


async def use(pool: AgentManager, key: SessionKey) -> None:
    async with pool.lease(key) as lease:
        lease.give_back()


@pytest.fixture(scope="module")
def pool(run: Run, entries: int) -> AgentManager:
    return run(fill(FakeClock(), entries))


def test_thousand_leases(benchmark, run: Run, pool: AgentManager, entries: int) -> None:
    """Acquire and release the agents of random sessions, all of them live."""
    keys = [SessionKey("", str(number)) for number in random.Random(1).choices(range(entries), k=BATCH)]

    async def batch() -> None:
        for key in keys:
            await use(pool, key)

    benchmark(lambda: run(batch()))
    assert pool.stats().idle == entries


def test_stats(benchmark, pool: AgentManager, entries: int) -> None:
    """What ``/agent-stats`` reads."""
    assert benchmark(pool.stats).idle == entries


def test_sweep_that_expires_a_thousand(benchmark, run: Run, entries: int) -> None:
    """One pass that finds 1,000 agents due among 100,000: nothing else runs meanwhile."""
    clock = FakeClock()
    pool = run(fill(clock, entries))
    removed = []

    def sweep() -> None:
        removed.append(pool.sweep().removed)

    # The first group is due as soon as the last has come; each second another one.
    benchmark.pedantic(sweep, setup=lambda: clock.advance(1) if removed else None, rounds=20)
    assert set(removed) == {GROUP}
