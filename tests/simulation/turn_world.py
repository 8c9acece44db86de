"""Chats, cancels, deletes and a store that fails, over the real services and the real pool, from one seed."""

import asyncio
import random
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from app.domain.chat import ChatRequest, OnBusy, OnDisconnect, PastTurn, RegenerateRequest
from app.domain.errors import AgentPoolError, IdempotencyMismatch, ModelError, StoreUnavailable
from app.domain.ids import SessionKey
from app.domain.session import LifeSpan, Session, SessionChange, SessionStatus
from app.domain.stats import ProcessMemory
from app.domain.turn import CancelReason
from app.pool.limits import PoolLimits
from app.pool.manager import AgentManager
from app.pool.slot import SlotState
from app.pool.table import PoolTable
from app.services.admin import AdminService
from app.services.admission import Admission
from app.services.chat import ChatService
from app.services.compaction import Compactor
from app.services.conductor import Conductor
from app.services.landing import COMMIT_RETRY_S
from app.services.sessions import SessionManager
from app.services.turns import CANCEL_GRACE_S, Flight, FlightState, Turns
from app.stores.memory.store import MemoryStore
from tests.fakes import (
    CountAll,
    FakeAgent,
    FakeFactory,
    FakeStore,
    Fault,
    Gate,
    LoopClock,
    Script,
    make_session,
    new_ids,
)
from tests.simulation.branching import Branching, check_place, contexts_at
from tests.simulation.checked import CheckedTable
from tests.simulation.turn_book import Book, Outcome, follow

CLIENTS = 7
REQUESTS_PER_CLIENT = 4
TURN_TIMEOUT_S = 6.0
SLOWEST_CALL_S = 1.0
LONGEST_WORLD_S = 1500.0
WRITES = {
    "create_session",
    "ensure_session",
    "update_session",
    "delete_session",
    "start_turn",
    "commit_turn",
    "record_turn",
    "move_head",
    "fork_session",
    "add_checkpoint",
    "add_note",
    "patch_state",
}


class TurnWorld:
    """``play`` lets the clients at the services and then checks what is left."""

    def __init__(self, seed: int, table_class: type[PoolTable] = PoolTable) -> None:
        self.dice = dice = random.Random(f"turns {seed}")
        self.names = [f"s{number}" for number in range(dice.randint(1, 4))]
        self.failure_rate = dice.choice((0, 0, 0.05, 0.2, 0.6))
        self.outage_from = dice.uniform(0, 15) if dice.random() < 0.4 else 1e9
        self.outage_s = dice.choice((1, 5, 15))
        self.has_deletes = dice.random() < 0.3
        self.interrupt_rate = dice.choice((0, 0, 0.3, 0.6))
        self.key_rate = dice.choice((0, 0.4, 0.9))
        self.leave_rate = dice.choice((0.1, 0.3, 0.6))
        self.stops_at = dice.uniform(1, 15) if dice.random() < 0.25 else None
        self.limits = PoolLimits(
            max_instances=dice.randint(1, 4),
            idle_ttl_s=dice.choice((0, 1, 5)),
            capacity_wait_s=dice.choice((1, 5)),
            capacity_queue=dice.choice((1, 4)),
            queue_depth=dice.choice((1, 4, 4)),
            queue_wait_s=dice.choice((2, 20, 20)),
            activation_timeout_s=2,
        )
        self.branch_rate = dice.choice((0, 0.3, 0.6))
        self.compacts_after = dice.choice((0, 60))
        self.keyed: list[ChatRequest] = []
        self.trackers: list[asyncio.Task[None]] = []
        self.requests = self.made = 0
        self.broken: AssertionError | None = None
        self.table = CheckedTable(self.limits, table_class)

    def _build(self) -> None:
        clock, new_id, life = LoopClock(), new_ids(), LifeSpan()
        inner = _NotedStore(life)
        self.book = Book(inner, inner.deleted, inner.copied)
        self.store = store = FakeStore(inner, self._fault)
        self.factory = factory = FakeFactory(self._script)
        self.pool = pool = AgentManager(store, factory, self.limits, clock)
        pool._table = self.table  # type: ignore[assignment]
        self.quota = CountAll(clock)
        self.turns = turns = Turns(clock, replay_s=30, quota=self.quota)
        admission = Admission(store, factory, clock, new_id, life)
        self.compactor = compactor = Compactor(
            store, factory, clock, new_id, after_tokens=self.compacts_after, timeout_s=5
        )
        self.conductor = Conductor(
            store,
            factory,
            pool,
            turns,
            admission,
            compactor,
            clock,
            boot_id="boot-1",
            turn_timeout_s=TURN_TIMEOUT_S,
        )
        self.chat = ChatService(store, factory, admission, pool, turns, self.conductor, compactor, new_id)
        self.sessions = SessionManager(store, factory, pool, turns, admission)
        self.admin = AdminService(
            store, pool, turns, clock, self.sessions.cleanup, lambda: ProcessMemory(0, 0)
        )

        self.branching = Branching(self.dice, self.names, self.chat, self.sessions, inner, self.book)

    def after_step(self) -> None:
        if self.broken is not None:
            raise self.broken
        assert asyncio.get_event_loop().time() < LONGEST_WORLD_S, "somebody waits for ever"
        self.table.after_step()
        for entry in self.table.entries:
            self.book.entered(entry)
        self.table.entries.clear()
        assert self.quota.under_way >= len(self.turns)  # and those who compact
        for key, flights in self.turns._by_session.items():
            under_way = [f for f in flights if f.state in (FlightState.RUNNING, FlightState.COMMITTING)]
            assert len(under_way) <= 1, f"two turns at once in {key.session_id}"

    async def play(self) -> None:
        self._build()
        await self.store.inner.open("boot-1")
        clients = [self._start(self._client(), f"client {number}") for number in range(CLIENTS)]
        operator = self._start(self._operate(), "operator")
        for client in clients:
            await client
        for tracker in self.trackers:
            await tracker
        operator.cancel()
        self.failure_rate = 0
        await asyncio.sleep(200)  # what is to be recorded later is recorded, zombies end
        if self.stops_at is None:
            self._check_the_rest()
        else:
            await self._stop()
        self.book.check_history()
        await self._stop()
        self._check_nothing_is_left()

    # -- who does what

    async def _client(self) -> None:
        for _ in range(REQUESTS_PER_CLIENT):
            await asyncio.sleep(self._moment() * 2)
            task = self._start(self._bounded(self._pick_request()), "request")
            if self.dice.random() < self.leave_rate:
                asyncio.get_running_loop().call_later(self._moment(), task.cancel)
            await asyncio.wait([task])
            if not task.cancelled():
                task.result()

    def _pick_request(self) -> Callable[[], Coroutine[Any, Any, None]]:
        if self.dice.random() < self.branch_rate:
            return self._branch
        kind = self.dice.random()
        if self.has_deletes and kind < 0.15:
            return self._delete
        if kind < 0.22:
            return self._cancel
        if kind < 0.26:
            return self._force
        if kind < 0.35:
            return self._change
        return self._watch if kind < 0.5 else self._chat

    async def _bounded(self, request: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await request()
        except AgentPoolError:
            pass

    async def _branch(self) -> None:
        if self.dice.random() < 0.3:
            await self._ask(RegenerateRequest(session_id=self.dice.choice(self.names), **self._pick_how()))
        else:
            await self.branching.act(self._pick_key(), self._pick_policy())

    async def _chat(self) -> None:
        await self._ask(self._make_request())

    async def _ask(self, request: ChatRequest | RegenerateRequest) -> None:
        begin = self.chat.begin if isinstance(request, ChatRequest) else self.chat.begin_again
        try:
            begun = await begin(request)  # type: ignore[operator]
        except IdempotencyMismatch:
            self.book.mismatched(request)
            return
        if isinstance(begun, PastTurn):
            self.book.was_past(begun, request)
        else:
            await self._attend(begun, request)
        self.book.answered(self.chat.reply_of(begun))

    async def _attend(self, flight: Flight, request: ChatRequest | RegenerateRequest) -> None:
        try:
            outcome = self.book.began(flight, request)
            if outcome is not None:
                self.trackers.append(self._start(self._track(outcome), f"tracker {flight.turn_id}"))
            await flight.wait_ended()
        except AgentPoolError:
            is_dropped = flight.cancel_reason is CancelReason.DISCONNECT and not flight.ends_unwatched
            assert not is_dropped, "dropped although somebody waited for it"
            raise
        finally:
            flight.leave()

    def _make_request(self) -> ChatRequest:
        dice = self.dice
        how = self._pick_how()
        self.requests += 1
        message = f"message {self.requests}"
        if self.keyed and dice.random() < self.key_rate:
            request = replace(dice.choice(self.keyed), **how)
            return replace(request, message=message) if dice.random() < 0.1 else request
        name = dice.choice(self.names)
        parent = self.branching.pick_parent(SessionKey("", name)) if self.branch_rate else None
        if dice.random() >= self.key_rate:
            return ChatRequest(session_id=name, message=message, parent=parent, **how)
        session_id = None if dice.random() < 0.1 else name
        key = f"k{self.requests}"
        self.keyed.append(ChatRequest(session_id=session_id, message=message, idempotency_key=key, **how))
        return self.keyed[-1]

    def _pick_how(self) -> dict[str, Any]:
        ends = self.dice.choice((OnDisconnect.CONTINUE, OnDisconnect.CANCEL))
        return {"on_busy": self._pick_policy(), "on_disconnect": ends}

    def _pick_policy(self) -> OnBusy:
        if self.dice.random() < self.interrupt_rate:
            return self.dice.choice((OnBusy.INTERRUPT, OnBusy.ROLLBACK))
        return self.dice.choice((OnBusy.QUEUE, OnBusy.QUEUE, OnBusy.REJECT))

    async def _watch(self) -> None:
        """Watch a turn in flight for a while, whoever made it."""
        flights = self.turns.all()
        if not flights:
            return
        flight = self.dice.choice(flights)
        watched = await self.chat.watch(flight.key, flight.turn_id)
        if isinstance(watched, Flight):
            try:
                position = 0
                while position < len(watched.log.events) or not watched.log.is_closed:
                    await watched.log.wait_beyond(position)
                    position = len(watched.log.events)
            finally:
                watched.leave()

    async def _cancel(self) -> None:
        keep, everything = self.dice.random() < 0.5, self.dice.random() < 0.3
        await self.chat.cancel(self._pick_key(), keep_partial=keep, all_turns=everything)

    async def _force(self) -> None:
        await self.admin.evict(self._pick_key(), force=self.dice.random() < 0.8)

    async def _change(self) -> None:
        change = SessionChange(title=f"title {self.dice.random()}")
        if self.dice.random() < 0.2:
            change = SessionChange(status=self.dice.choice((SessionStatus.ARCHIVED, SessionStatus.ACTIVE)))
        await self.sessions.update(self._pick_key(), change)

    async def _delete(self) -> None:
        await self.sessions.delete(self._pick_key())

    def _pick_key(self) -> SessionKey:
        return SessionKey("", self.dice.choice(self.names))

    async def _operate(self) -> None:
        loop, dice = asyncio.get_running_loop(), self.dice
        while True:
            await asyncio.sleep(dice.choice((0.5, 1.5)))
            if self.stops_at is not None and loop.time() >= self.stops_at:
                await self._stop()
            if self.has_deletes and dice.random() < 0.2:
                await self._make_anew()
            match dice.randrange(3):
                case 0:
                    self.pool.sweep()
                    self.turns.sweep()
                case 1:
                    self.pool.cleanup_oldest(1)
                case 2:
                    self.pool.evict(self._pick_key())

    async def _make_anew(self) -> None:
        """Delete a session and make it again, behind the services' back as another process would."""
        key = self._pick_key()
        if await self.store.inner.delete_session(key):
            self.made += 1
            uid = str(uuid.UUID(int=self.made))
            await self.store.inner.create_session(make_session(key.session_id, uid=uid))

    async def _stop(self) -> None:
        """End everything as the runtime does."""
        self.pool.begin_drain()
        flights = self.turns.all()
        for flight in flights:
            flight.cancel(CancelReason.DRAIN, keep_partial=True)
        tasks = {flight.task for flight in flights if flight.task is not None}
        if tasks:
            await asyncio.wait(tasks, timeout=CANCEL_GRACE_S * 2)
        await self.conductor.close()
        await self.compactor.close()
        await self.pool.close()

    # -- what goes wrong

    def _fault(self, operation: str) -> Fault:
        delay_s = self.dice.choice((0, 0, 0, 0.01, 0.1, SLOWEST_CALL_S))
        outage = 0 <= asyncio.get_running_loop().time() - self.outage_from < self.outage_s
        if not outage and self.dice.random() >= self.failure_rate:
            return Fault(delay_s=delay_s)
        if operation not in WRITES:
            return Fault(delay_s=delay_s, error=StoreUnavailable())
        unknown = StoreUnavailable(outcome_unknown=True)
        match self.dice.randrange(3):
            case 0:
                return Fault(delay_s=delay_s, error=StoreUnavailable())
            case 1:
                return Fault(delay_s=delay_s, error=unknown)
            case _:
                return Fault(late_delay_s=delay_s, late_error=unknown)

    def _script(self, agent: FakeAgent, message: str) -> Script:
        try:
            self._check_context(agent, message)
        except AssertionError as error:  # for the services it is only an agent that failed
            self.broken = error
            raise
        return self._fate()

    def _check_context(self, agent: FakeAgent, message: str) -> None:
        key = SessionKey("", agent.session_id)
        assert key in self.table.owners, "runs without the lease"
        flight = self.turns.get(self.table.owners[key].turn_id)
        at_work = sum(each.is_running for each in self.factory.built)
        assert at_work <= self.limits.max_instances, "more agents work than there are places"
        assert flight is not None
        assert flight.turn is not None
        assert flight.turn.input == message, "runs with another turn's lease"
        record = self.store.inner._records[key]
        if record.session.uid == flight.uid:  # else made anew since it boarded: it cannot commit
            check_place(record, flight.turn, self.book.outcomes[flight.turn_id].request)
            possible = contexts_at(record, flight.turn.parent)
            assert tuple(agent.messages) in possible, f"{key} runs with another context than the stored one"
        self.book.body_begins(flight)

    def _fate(self) -> Script:
        fate, pause_s = self.dice.random(), self._moment()
        if fate < 0.1:
            return Script(pause_s=pause_s, error=self.dice.choice((ModelError(), ValueError("a bug"))))
        if fate < 0.15:
            return Script(deltas=("x",) * 9, pause_s=1.0)
        if fate < 0.3:
            holdout = Gate()
            asyncio.get_running_loop().call_later(self.dice.choice((0.5, 3, 30)), holdout.open)
            return Script(deltas=("x",) * self.dice.choice((3, 9)), pause_s=1.0, holdout=holdout)
        return Script(pause_s=pause_s)

    def _moment(self) -> float:
        return self.dice.choice((0, 0, 0.1, 0.5, 0.5, 1, 1.5))

    def _start(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(coroutine, name=name)

    # -- what must be true

    async def _track(self, outcome: Outcome) -> None:
        await follow(outcome, self._bound_s())
        self.book.check_end(outcome)

    def _bound_s(self) -> float:
        if self.has_deletes:  # a delete goes to the front
            return 1e9
        limits = self.limits
        waits = limits.queue_wait_s + limits.capacity_wait_s + limits.activation_timeout_s
        board_and_start = 5 * SLOWEST_CALL_S
        commit_and_record = COMMIT_RETRY_S + 3 * SLOWEST_CALL_S
        bound = waits + board_and_start + TURN_TIMEOUT_S + CANCEL_GRACE_S + commit_and_record + 1
        return bound + (waits if self.interrupt_rate or self.branch_rate else 0)  # the overtaken wait anew

    def _check_the_rest(self) -> None:
        assert all(slot.state is SlotState.IDLE for slot in self.pool._table.slots.values())
        assert len(self.conductor._tasks) == 0
        self.book.check_nothing_runs()

    def _check_nothing_is_left(self) -> None:
        assert len(self.turns) == 0
        assert not self.turns._by_session
        assert not self.turns._claims
        assert self.quota.under_way == 0
        assert len(self.conductor._tasks) == len(self.pool._tasks) == len(self.compactor._tasks) == 0
        assert not self.compactor._running
        assert not self.pool._futures
        assert not self.pool._table.slots
        assert self.pool.live_count() == 0
        self.turns.sweep()
        assert not self.turns._ended


class _NotedStore(MemoryStore):
    """Notes the incarnations that were deleted, and with which turns forks began."""

    def __init__(self, life: LifeSpan) -> None:
        super().__init__(life)
        self.deleted: set[str] = set()
        self.copied: dict[str, set[str]] = {}

    async def delete_session(self, key: SessionKey) -> bool:
        if record := self._records.get(key):
            self.deleted.add(record.session.uid)
        return await super().delete_session(key)

    async def fork_session(self, *args: Any) -> Session:
        made = await super().fork_session(*args)
        self.copied[made.uid] = set(self._records[made.key].turns)
        return made
