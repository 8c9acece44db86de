"""A pool with fakes around it, and what must be true of it when all is quiet."""

import asyncio
from collections.abc import Awaitable
from typing import Any

from app.domain.ids import SessionKey
from app.pool.lease import Lease
from app.pool.limits import PoolLimits
from app.pool.manager import AgentManager
from app.pool.slot import SlotState
from tests.fakes import FakeFactory, FakeStore, Gate, LoopClock, fill
from tests.unit.pool.invariants import check_table

SESSIONS = ("a", "b", "c", "d")


def key_of(name: str) -> SessionKey:
    return SessionKey("", name)


class World:
    """``turn`` is a whole lease as a service would use it: it ends when its gate is open."""

    def __init__(self, pool: AgentManager, store: FakeStore, factory: FakeFactory) -> None:
        self.pool = pool
        self.store = store
        self.factory = factory
        self.served: list[str] = []

    @classmethod
    async def make(cls, **limits: Any) -> "World":
        store, factory = FakeStore(), FakeFactory()
        await fill(store, *SESSIONS)
        sizes = {"max_instances": 2, "queue_wait_s": 30.0, "activation_timeout_s": 10.0} | limits
        return cls(AgentManager(store, factory, PoolLimits(**sizes), LoopClock()), store, factory)

    async def turn(self, name: str = "a", label: str = "", gate: Gate | None = None, **how: Any) -> Lease:
        async with self.pool.lease(key_of(name), **how) as lease:
            self.served.append(label or name)
            if gate is not None:
                await gate.wait()
            lease.give_back()
        return lease

    async def hold(self, name: str = "a", label: str = "hold", gate: Gate | None = None, **how: Any) -> None:
        async with self.pool.hold(key_of(name), **how):
            self.served.append(label)
            if gate is not None:
                await gate.wait()

    async def warm(self, *names: str) -> None:
        for name in names:
            await self.turn(name)
        self.served.clear()

    def check(self) -> None:
        check_table(self.pool._table)

    async def check_quiet(self) -> None:
        """Nobody waits, nobody holds anything, no task runs, and every session can be had."""
        await asyncio.sleep(100)  # of virtual time: whatever loads still run have ended
        self.check()
        slots = self.pool._table.slots.values()
        assert all(slot.state is SlotState.IDLE for slot in slots), list(slots)
        assert not self.pool._futures
        assert len(self.pool._tasks) == 0
        assert self.pool.stats().waiting == 0
        for name in SESSIONS:
            await self.turn(name)
        self.check()


def start(coroutine: Any, name: str = "") -> asyncio.Task[Any]:
    return asyncio.get_running_loop().create_task(coroutine, name=name or None)


async def failure_of(awaitable: Awaitable[Any]) -> BaseException | None:
    """Return what ``awaitable`` raises, ``None`` if it raises nothing."""
    try:
        await awaitable
    except BaseException as error:
        return error
    return None
