"""A pool in a world where everything goes wrong that can, from one seed."""

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

from app.domain.errors import (
    AgentPoolError,
    Draining,
    InternalError,
    PoolExhausted,
    SessionBusy,
    SnapshotUnreadable,
    StoreUnavailable,
    TurnQueueFull,
)
from app.domain.ids import SessionKey
from app.domain.stats import DiscardCause
from app.pool.lease import Lease
from app.pool.limits import PoolLimits
from app.pool.manager import AgentManager
from app.pool.slot import SlotState
from app.pool.table import PoolTable
from tests.fakes import FakeAgent, FakeFactory, FakeStore, Fault, LoopClock, fill
from tests.simulation.checked import CheckedTable

CLIENTS = 14
CLAIMS_PER_CLIENT = 4
LONGEST_WORLD_S = 3000.0
EXPECTED = (
    Draining,
    PoolExhausted,
    SessionBusy,
    TurnQueueFull,
    StoreUnavailable,
    SnapshotUnreadable,
    InternalError,
)


class Gone(Exception):
    """A turn's body went wrong."""


class PoolWorld:
    """Clients, operators and a store that fails; ``play`` lets them at one pool.

    ``inside`` says who is in a session: at most one. ``dead`` are the agents that must
    never be seen again.
    """

    def __init__(self, seed: int, table_class: type[PoolTable] = PoolTable) -> None:
        self.dice = dice = random.Random(f"pool {seed}")
        self.keys = [SessionKey("", f"s{number}") for number in range(dice.randint(1, 5))]
        self.has_fronts = dice.random() < 0.5
        self.drains_at = dice.uniform(0, 20) if dice.random() < 0.2 else None
        self.limits = PoolLimits(
            max_instances=dice.randint(1, 4),
            idle_ttl_s=dice.choice((0, 1, 5)),
            capacity_wait_s=dice.choice((0, 1, 5, 5)),
            capacity_queue=dice.choice((0, 1, 3, 3)),
            queue_depth=dice.choice((0, 2, 6, 6)),
            queue_wait_s=dice.choice((0, 2, 20, 20)),
            activation_timeout_s=dice.choice((0.5, 2)),
        )
        self.store = FakeStore(fault_for=self._fault)
        self.factory = FakeFactory()
        self.pool = AgentManager(self.store, self.factory, self.limits, LoopClock())
        self.table = CheckedTable(self.limits, table_class)
        self.pool._table = self.table  # type: ignore[assignment]
        self.inside: dict[SessionKey, object] = {}
        self.dead: set[int] = set()
        self.idle_at_drain: set[SessionKey] | None = None
        self.zombies = 0

    def after_step(self) -> None:
        self.table.after_step()
        self.table.entries.clear()
        assert asyncio.get_event_loop().time() < LONGEST_WORLD_S, "somebody waits for ever"
        stats = self.pool.stats()
        assert stats.zombies == self.zombies
        if stats.draining:
            idle = set(self.table.idle)
            assert self.idle_at_drain is None or idle <= self.idle_at_drain, "idle after the drain began"
            self.idle_at_drain = idle

    async def play(self) -> None:
        await fill(self.store, *(key.session_id for key in self.keys))
        clients = [self._start(self._client(), f"client {number}") for number in range(CLIENTS)]
        operator = self._start(self._operate(), "operator")
        for client in clients:
            await client
        operator.cancel()
        await asyncio.sleep(200)  # hung loads end, zombies too
        await self._check_the_end()

    # -- who does what

    async def _client(self) -> None:
        for _ in range(CLAIMS_PER_CLIENT):
            await asyncio.sleep(self.dice.choice((0, 0, 0.5, 2)))
            claim = self._hold if self.dice.random() < 0.2 else self._turn
            task = self._start(self._bounded(claim), "claim")
            if self.dice.random() < 0.4:
                asyncio.get_running_loop().call_later(self._moment(), task.cancel)
            await asyncio.wait([task])
            if not task.cancelled():
                task.result()

    async def _bounded(self, claim: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await claim()
        except (*EXPECTED, Gone):
            pass

    async def _turn(self) -> None:
        dice, key = self.dice, self.dice.choice(self.keys)
        user = dice.choice((None, "ann", "bob"))
        asked_at = asyncio.get_running_loop().time()
        try:
            may_wait, front = dice.random() < 0.8, self.has_fronts and dice.random() < 0.2
            async with self.pool.lease(key, user=user, may_wait=may_wait, front=front) as lease:
                self._check_wait(asked_at)
                await self._use(key, lease)
        except AgentPoolError:
            self._check_wait(asked_at)
            raise

    async def _use(self, key: SessionKey, lease: Lease) -> None:
        agent = lease.agent
        assert isinstance(agent, FakeAgent)
        assert agent.session_id == key.session_id
        assert id(agent) not in self.dead, "a discarded agent was used again"
        self._go_in(key, lease)
        try:
            await asyncio.sleep(self._moment())
            if self.dice.random() < 0.2:
                await self._refit(key, lease)
        except BaseException:
            self._bury(lease)
            self._go_out(key, lease)
            raise
        self._end(key, lease, self.dice.random())

    async def _refit(self, key: SessionKey, lease: Lease) -> None:
        session = await self.store.inner.find_session(key)
        assert session is not None
        self.factory.revision += 1
        lease.agent.stamp = self.factory.stamp_of(session)
        await lease.fit(session)

    def _end(self, key: SessionKey, lease: Lease, outcome: float) -> None:
        self._go_out(key, lease)
        if outcome < 0.6:
            lease.give_back()
        elif outcome < 0.75:
            self._bury(lease)
            lease.discard(DiscardCause.CONFLICT)
        elif outcome < 0.85:
            self._bury(lease)
            self.zombies += 1
            ended = lease.abandon(DiscardCause.DEADLINE)
            asyncio.get_running_loop().call_later(self._moment(), self._zombie_ended, ended)
        else:
            self._bury(lease)
            if outcome < 0.95:
                raise Gone
        lease.give_back() if outcome < 0.9 else lease.abandon(DiscardCause.ERROR)()

    def _zombie_ended(self, ended: Callable[[], None]) -> None:
        self.zombies -= 1
        ended()

    async def _hold(self) -> None:
        key, front = self.dice.choice(self.keys), self.has_fronts and self.dice.random() < 0.5
        async with self.pool.hold(key, front=front):
            token = object()
            self._go_in(key, token)
            try:
                assert not self.pool.is_live(key)
                await asyncio.sleep(self._moment())
            finally:
                self._go_out(key, token)

    async def _operate(self) -> None:
        loop, dice = asyncio.get_running_loop(), self.dice
        while True:
            await asyncio.sleep(dice.choice((0, 0.5, 1.5)))
            if self.drains_at is not None and loop.time() >= self.drains_at:
                self.pool.begin_drain()
                if dice.random() < 0.5:
                    await self.pool.close()
            match dice.randrange(4):
                case 0:
                    self.pool.sweep()
                case 1:
                    self.pool.cleanup_oldest(1)
                case 2:
                    self.pool.cleanup_idle(dice.choice((0, 1)))
                case 3:
                    self.pool.evict(dice.choice(self.keys))

    def _fault(self, _: str) -> Fault:
        outcome = self.dice.random()
        if outcome < 0.1:
            error = self.dice.choice((StoreUnavailable(), SnapshotUnreadable(), TimeoutError()))
            return Fault(delay_s=self._moment(), error=error)
        if outcome < 0.15:
            return Fault(delay_s=100)
        return Fault(delay_s=self._moment()) if outcome < 0.6 else Fault()

    def _moment(self) -> float:
        return self.dice.choice((0, 0, 0.1, 0.5, 0.5, 1, 1.5))

    def _start(self, coroutine: Any, name: str) -> asyncio.Task[Any]:
        return asyncio.get_running_loop().create_task(coroutine, name=name)

    # -- what must be true

    def _go_in(self, key: SessionKey, who: object) -> None:
        assert key not in self.inside, f"two at once in {key}"
        self.inside[key] = who

    def _go_out(self, key: SessionKey, who: object) -> None:
        assert self.inside.pop(key) is who

    def _bury(self, lease: Lease) -> None:
        self.dead.add(id(lease.agent))

    def _check_wait(self, asked_at: float) -> None:
        limits = self.limits
        bound = limits.queue_wait_s + limits.capacity_wait_s + limits.activation_timeout_s
        if not self.has_fronts:
            waited = asyncio.get_running_loop().time() - asked_at
            assert waited <= bound + 1e-6, f"waited {waited} s where {bound} s is the bound"

    async def _check_the_end(self) -> None:
        pool = self.pool
        assert all(slot.state is SlotState.IDLE for slot in pool._table.slots.values())
        assert not pool._futures
        assert len(pool._tasks) == 0
        assert not self.inside
        stats = pool.stats()
        assert (stats.active, stats.activating, stats.zombies, stats.waiting) == (0, 0, 0, 0)
        await pool.close()
        await pool.close()
        assert pool.live_count() == 0
        assert not pool._table.slots
