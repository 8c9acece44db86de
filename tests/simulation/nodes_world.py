"""Two nodes over one store, with leases that run out at any time and a store that fails, from one seed.

A lease that runs out while its turn goes on is what a paused process is for the others; here
the turn even goes on meanwhile, so more can go wrong than with real pauses.
"""

import asyncio
import random
from collections import defaultdict
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from app.domain.branch import Back
from app.domain.chat import ChatRequest, OnBusy, PastTurn
from app.domain.errors import AgentPoolError, HeadMoved, ModelError, RunsElsewhere, StoreUnavailable
from app.domain.events import TurnCancelled, TurnFailed, TurnFinished
from app.domain.ids import SessionKey
from app.domain.lease import Node
from app.domain.session import LifeSpan, SessionChange
from app.domain.turn import CancelOrder, ContextMessage, JsonObject, TurnStatus
from app.pool.limits import PoolLimits
from app.pool.manager import AgentManager
from app.services.admission import Admission
from app.services.chat import ChatService
from app.services.compaction import Compactor
from app.services.conductor import Conductor
from app.services.ownership import Ownership
from app.services.sessions import SessionManager
from app.services.turns import Flight, Turns
from app.stores.memory.shared import SharedMemoryStore
from tests.fakes import FakeAgent, FakeFactory, FakeStore, Fault, Gate, LoopClock, Script, new_ids

CLIENTS = 6
REQUESTS_PER_CLIENT = 5
LEASE_S = 3.0
LONGEST_WORLD_S = 1500.0
WRITES = {
    "create_session",
    "ensure_session",
    "update_session",
    "delete_session",
    "start_turn",
    "commit_turn",
    "record_turn",
}


class SimulatedNode:
    """One process: all that it has of its own, over its own wire to the store."""

    def __init__(self, world: "NodesWorld", number: int, store: SharedMemoryStore) -> None:
        self.world = world
        self.node = Node(f"boot-{number}", f"http://node-{number}")
        self.inner = store
        self.store = FakeStore(store, self._fault)
        self.is_cut_off = False
        self.turns = Turns(LoopClock(), replay_s=30)

    def _fault(self, operation: str) -> Fault:
        return Fault(error=StoreUnavailable()) if self.is_cut_off else self.world.fault(operation)

    async def begin(self, nodes: "list[SimulatedNode]") -> None:
        await self.inner.open(self.node.boot_id, self.node.url)
        world, store, clock, turns = self.world, self.store, LoopClock(), self.turns
        factory = FakeFactory(world.script)
        limits = PoolLimits(max_instances=3, queue_depth=4, queue_wait_s=20, idle_ttl_s=world.idle_ttl_s)
        self.pool = pool = AgentManager(store, factory, limits, clock)
        self.ownership = Ownership(
            self.inner.leases,
            LocalNodes(nodes),
            here=self.node,
            new_id=world.new_id,
            queue_wait_s=20,
        )
        admission = Admission(store, factory, clock, world.new_id, LifeSpan(), ownership=self.ownership)
        compactor = Compactor(store, factory, clock, world.new_id)
        self.conductor = Conductor(
            store,
            factory,
            pool,
            turns,
            admission,
            compactor,
            clock,
            self.ownership,
            boot_id=self.node.boot_id,
            turn_timeout_s=10,
        )
        self.chat = ChatService(
            store,
            factory,
            admission,
            pool,
            turns,
            self.conductor,
            compactor,
            world.new_id,
            self.ownership,
        )
        self.sessions = SessionManager(store, factory, pool, turns, admission, self.ownership)


class LocalNodes:
    """Nodes of one process ask each other without a wire."""

    def __init__(self, nodes: list[SimulatedNode]) -> None:
        self._nodes = nodes

    def _find(self, node: Node) -> SimulatedNode:
        return next(each for each in self._nodes if each.node == node)

    async def stats_of(self, node: Node) -> JsonObject:
        return {}

    async def has_live(self, node: Node, key: SessionKey) -> bool:
        return self._find(node).pool.is_live(key)

    async def turns_of(self, node: Node, key: SessionKey) -> tuple[str, ...]:
        return self._find(node).chat.turns_here(key)

    async def cancel(self, node: Node, key: SessionKey, order: CancelOrder) -> tuple[str, ...]:
        return self._find(node).chat.cancel_here(key, order)


class NodesWorld:
    """``play`` lets the clients at both nodes and then compares what they were told with what is stored."""

    def __init__(self, seed: int) -> None:
        self.dice = dice = random.Random(f"nodes {seed}")
        self.names = [f"s{number}" for number in range(dice.randint(1, 3))]
        self.failure_rate = dice.choice((0, 0, 0.05, 0.2))
        self.lapse_rate = dice.choice((0, 0.2, 0.6))
        self.rewind_rate = dice.choice((0, 0.15))
        self.delete_rate = dice.choice((0, 0, 0.1))
        self.interrupt_rate = dice.choice((0, 0.3))
        self.idle_ttl_s = dice.choice((1, 1000))
        self.dies_at = dice.uniform(1, 8) if dice.random() < 0.2 else None
        self.new_id = new_ids()
        self.keyed: list[ChatRequest] = []
        self.asked = 0
        self.told: dict[str, Any] = {}  # turn id: the last event that a client saw of it
        self.sent: dict[str, tuple[ContextMessage, ...]] = {}  # turn id: what its agent knew
        self.bodies: dict[str, list[str]] = defaultdict(list)  # message: the turns that ran with it
        self.errors: set[str] = set()
        self.lapsed = 0
        self.broken: Exception | None = None

    async def play(self) -> None:
        store = SharedMemoryStore(LifeSpan(), lease_s=LEASE_S)
        self.store = store
        self.nodes = [SimulatedNode(self, 1, store)]
        self.nodes.append(SimulatedNode(self, 2, store.beside()))
        loop = asyncio.get_running_loop()
        keepers = []
        for node in self.nodes:
            await node.begin(self.nodes)
            keepers.append(loop.create_task(node.ownership.keep_for_ever()))
        if self.dies_at is not None:
            loop.call_later(self.dies_at, self._cut_off, keepers[1])
        fate = loop.create_task(self._let_leases_lapse())
        clients = [loop.create_task(self._client()) for _ in range(CLIENTS)]
        for client in clients:
            await client
        fate.cancel()
        if not self.failure_rate and self.dies_at is None:
            in_flight = {flight.turn_id for node in self.nodes for flight in node.turns.all()}
            held = {lease.holder.nonce for lease in self.store._content.leases.values()}
            assert held <= in_flight, "a session was not given back"
        self.failure_rate = 0
        await asyncio.sleep(200)  # what was left is recorded, or reaped
        self._check()
        for keeper in keepers:
            keeper.cancel()
        for node in self.nodes:
            await node.conductor.close()
            await node.pool.close()

    def after_step(self) -> None:
        if self.broken is not None:
            raise self.broken
        assert asyncio.get_event_loop().time() < LONGEST_WORLD_S, "somebody waits for ever"

    def _cut_off(self, keeper: "asyncio.Task[None]") -> None:
        """As good as dead for all others: the second node reaches the store no more."""
        self.nodes[1].is_cut_off = True
        keeper.cancel()

    # -- who does what

    async def _client(self) -> None:
        for _ in range(REQUESTS_PER_CLIENT):
            await asyncio.sleep(self.dice.choice((0, 0.2, 1, 3)))
            try:
                await self._request(self.dice.choice(self.nodes))
            except AgentPoolError as error:
                self.errors.add(error.code)

    def _request(self, node: SimulatedNode) -> Coroutine[Any, Any, None]:
        kind = self.dice.random()
        if kind < self.rewind_rate:
            return self._rewind(node)
        if kind < self.rewind_rate + self.delete_rate:
            return node.sessions.delete(self.dice.choice(self.names))
        if kind < 0.3:
            return self._cancel(node)
        if kind < 0.35:
            return self._change(node)
        return self._chat(node, self._make_request())

    async def _rewind(self, node: SimulatedNode) -> None:
        await node.sessions.rewind(self.dice.choice(self.names), Back(1))

    async def _cancel(self, node: SimulatedNode) -> None:
        key = SessionKey("", self.dice.choice(self.names))
        await node.chat.cancel(key, keep_partial=self.dice.random() < 0.5, all_turns=self.dice.random() < 0.3)

    async def _change(self, node: SimulatedNode) -> None:
        await node.sessions.update(self.dice.choice(self.names), SessionChange(title=str(self.asked)))

    def _make_request(self) -> ChatRequest:
        if self.keyed and self.dice.random() < 0.4:
            return replace(self.dice.choice(self.keyed), on_busy=self._pick_policy())
        self.asked += 1
        request = ChatRequest(
            session_id=self.dice.choice(self.names),
            message=f"message {self.asked}",
            idempotency_key=f"k{self.asked}" if self.dice.random() < 0.5 else None,
            on_busy=self._pick_policy(),
        )
        if request.idempotency_key is not None:
            self.keyed.append(request)
        return request

    def _pick_policy(self) -> OnBusy:
        if self.dice.random() < self.interrupt_rate:
            return self.dice.choice((OnBusy.INTERRUPT, OnBusy.ROLLBACK))
        return self.dice.choice((OnBusy.QUEUE, OnBusy.QUEUE, OnBusy.REJECT))

    async def _chat(self, node: SimulatedNode, request: ChatRequest, hops: int = 0) -> None:
        try:
            begun = await node.chat.begin(request)
            if isinstance(begun, PastTurn):
                assert begun.turn.input == request.message
                return
            await self._attend(begun)
        except RunsElsewhere as elsewhere:
            assert request.idempotency_key is not None, "sent away although it has no key"
            if hops < 3:  # as the HTTP face forwards it
                other = next(each for each in self.nodes if each.node == elsewhere.node)
                await self._chat(other, request, hops + 1)

    async def _attend(self, flight: Flight) -> None:
        try:
            self.told[flight.turn_id] = await flight.wait_ended()
        finally:
            flight.leave()

    async def _let_leases_lapse(self) -> None:
        while True:
            await asyncio.sleep(self.dice.choice((0.3, 1.0)))
            if self.dice.random() < self.lapse_rate:
                leases = self.store._content.leases
                for key in list(leases):
                    if self.dice.random() < 0.5:
                        self.lapsed += 1
                        leases[key] = replace(leases[key], until=0.0)
                        for waiter in self.store._content.waiters.pop(key, ()):
                            waiter.set_result(None)

    # -- what goes wrong

    def fault(self, operation: str) -> Fault:
        delay_s = self.dice.choice((0, 0, 0.01, 0.1, 0.5))
        if self.dice.random() >= self.failure_rate:
            return Fault(delay_s=delay_s)
        if operation not in WRITES:
            return Fault(delay_s=delay_s, error=StoreUnavailable())
        unknown = StoreUnavailable(outcome_unknown=True)
        if self.dice.random() < 0.5:
            return Fault(delay_s=delay_s, error=self.dice.choice((StoreUnavailable(), unknown)))
        return Fault(late_delay_s=delay_s, late_error=unknown)

    def script(self, agent: FakeAgent, message: str) -> Script:
        try:
            self._note_body(agent, message)
        except Exception as error:  # for the services it is only an agent that failed
            self.broken = error
            raise
        fate, pause_s = self.dice.random(), self.dice.choice((0, 0.1, 0.5, 2.0))
        if fate < 0.1:
            return Script(pause_s=pause_s, error=ModelError())
        if fate < 0.15:
            holdout = Gate()
            asyncio.get_running_loop().call_later(5, holdout.open)
            return Script(deltas=("x",) * 5, pause_s=1.0, holdout=holdout)
        return Script(pause_s=pause_s)

    def _note_body(self, agent: FakeAgent, message: str) -> None:
        flights = {flight.turn_id: flight for node in self.nodes for flight in node.turns.all()}
        task = asyncio.current_task()
        assert task is not None
        flight = flights[task.get_name().rpartition(" ")[2]]
        others = [f for f in flights.values() if f.key == flight.key and f is not flight]
        at_work = [f for f in others if f.body is not None and not f.body.done() and not has_to_end(f)]
        assert self.lapse_rate or self.dies_at or not at_work, "two turns of a session at once"
        self.bodies[message].append(flight.turn_id)
        self.sent[flight.turn_id] = tuple(agent.messages)

    # -- what must be true

    def _check(self) -> None:
        assert "INTERNAL_ERROR" not in self.errors
        for record in self.store._records.values():
            committed = {turn.turn_id for turn in record.turns.values() if turn.is_committed}
            if not self.rewind_rate:
                on_branch = {turn.turn_id for turn in record.up(record.session.head)}
                assert on_branch == committed, "a turn that was committed is beside the branch"
            for turn in record.turns.values():
                assert turn.status is not TurnStatus.RUNNING, "recorded as running for ever"
                if turn.turn_id in committed & self.sent.keys():
                    path = [m for t in reversed(list(record.up(turn.parent))) for m in t.messages]
                    assert self.sent[turn.turn_id] == tuple(path), "committed behind what it did not know"
        self._check_told()
        self._check_keys()
        assert not self.store._content.leases, "a session is leased for ever"
        if self.dies_at is None:
            assert not any(node.ownership._held for node in self.nodes)
            assert not any(len(node.turns) for node in self.nodes)

    def _check_told(self) -> None:
        stored = {t.turn_id: t for record in self.store._records.values() for t in record.turns.values()}
        is_calm = not (self.lapse_rate or self.dies_at or self.failure_rate or self.delete_rate)
        for turn_id, terminal in self.told.items():
            is_kept = (turn := stored.get(turn_id)) is not None and turn.is_committed
            if isinstance(terminal, TurnFinished):
                assert is_kept or self.delete_rate, f"{turn_id} was acknowledged and is lost"
            if isinstance(terminal, TurnFailed) and not terminal.error.outcome_unknown:
                assert not is_kept, f"{turn_id} failed and is there"
                assert not is_calm or terminal.error.code != HeadMoved.code, "built on an old head"
            if isinstance(terminal, TurnCancelled):
                assert is_kept == terminal.partial_kept or self.delete_rate

    def _check_keys(self) -> None:
        stored = {t.turn_id: t for record in self.store._records.values() for t in record.turns.values()}
        for request in self.keyed:
            ran = self.bodies[request.message]
            kept = [turn_id for turn_id in ran if (t := stored.get(turn_id)) is not None and t.is_committed]
            assert len(kept) <= 1, f"{kept} were committed with {request.idempotency_key}"
            if not self.delete_rate:
                abandoned = [turn_id for turn_id in ran if turn_id not in kept]
                assert all(turn_id in stored for turn_id in abandoned), "asked a model, and left no record"


def has_to_end(flight: Flight) -> bool:
    """Whether its body was told to end; one that ignores that is in nobody's way."""
    return flight.cancel_reason is not None or flight.has_timed_out or flight.is_ousted
