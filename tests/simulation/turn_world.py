"""Chats, cancels, deletes and a store that fails, over the real services and the real pool, from one seed."""

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from app.domain.chat import ChatRequest, OnBusy
from app.domain.errors import AgentPoolError, ModelError, StoreUnavailable
from app.domain.events import (
    MessageCompleted,
    TerminalEvent,
    TextDelta,
    TurnCancelled,
    TurnFailed,
    TurnFinished,
    TurnStarted,
)
from app.domain.ids import SessionKey
from app.domain.session import LifeSpan, SessionChange
from app.domain.turn import CancelReason, ContextMessage, Turn, TurnStatus
from app.pool.limits import PoolLimits
from app.pool.manager import AgentManager
from app.pool.slot import SlotState
from app.services.admission import Admission
from app.services.chat import ChatService
from app.services.conductor import Conductor
from app.services.landing import COMMIT_RETRY_S
from app.services.sessions import SessionManager
from app.services.turns import CANCEL_GRACE_S, Flight, FlightState, Turns
from app.stores.memory import MemoryStore
from tests.fakes import FakeAgent, FakeFactory, FakeStore, Fault, Gate, LoopClock, Script, new_ids
from tests.simulation.checked import CheckedTable

CLIENTS = 7
REQUESTS_PER_CLIENT = 4
TURN_TIMEOUT_S = 6.0
SLOWEST_CALL_S = 1.0
WRITES = {"create_session", "update_session", "delete_session", "start_turn", "commit_turn", "record_turn"}


@dataclass
class Outcome:
    """What the client of one turn was told; ``head`` is that which the terminal event named."""

    flight: Flight
    terminal: TerminalEvent | None = None
    refusal: AgentPoolError | None = None

    @property
    def is_on_path(self) -> bool | None:
        """Whether the turn must be on the path, ``None`` if the client was told that this is unknown."""
        if isinstance(self.terminal, TurnFailed) and self.terminal.error.outcome_unknown:
            return None
        if isinstance(self.terminal, TurnCancelled):
            return self.terminal.partial_kept
        return isinstance(self.terminal, TurnFinished)


class TurnWorld:
    """``play`` lets the clients at the services and then checks what is left."""

    def __init__(self, seed: int) -> None:
        self.dice = dice = random.Random(f"turns {seed}")
        self.names = [f"s{number}" for number in range(dice.randint(1, 4))]
        self.failure_rate = dice.choice((0, 0.05, 0.2, 0.6))
        self.outage_from = dice.uniform(0, 15) if dice.random() < 0.4 else 1e9
        self.outage_s = dice.choice((1, 5, 15))
        self.has_deletes = dice.random() < 0.3
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
        self.outcomes: list[Outcome] = []
        self.deleted: set[str] = set()
        self.trackers: list[asyncio.Task[None]] = []
        self.bodies = 0
        self._build()

    def _build(self) -> None:
        clock, new_id, life = LoopClock(), new_ids(), LifeSpan()
        self.store = store = FakeStore(_NotedDeletes(life, self.deleted), self._fault)
        self.factory = factory = FakeFactory(self._script)
        self.pool = AgentManager(store, factory, self.limits, clock)
        self.table = CheckedTable(self.limits)
        self.pool._table = self.table  # type: ignore[assignment]
        self.turns = Turns(clock, replay_s=30)
        admission = Admission(store, factory, clock, new_id, life)
        self.conductor = Conductor(
            store,
            factory,
            self.pool,
            self.turns,
            admission,
            clock,
            boot_id="boot-1",
            turn_timeout_s=TURN_TIMEOUT_S,
        )
        self.chat = ChatService(store, factory, admission, self.pool, self.turns, self.conductor, new_id)
        self.sessions = SessionManager(store, factory, self.pool, self.turns, admission)

    def after_step(self) -> None:
        self.table.check()
        for key, flights in self.turns._by_session.items():
            under_way = [f for f in flights if f.state in (FlightState.RUNNING, FlightState.COMMITTING)]
            assert len(under_way) <= 1, f"two turns at once in {key.session_id}"

    async def play(self) -> None:
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
        await self._check_history()
        await self._stop()
        self._check_nothing_is_left()

    # -- who does what

    async def _client(self) -> None:
        for _ in range(REQUESTS_PER_CLIENT):
            await asyncio.sleep(self._moment() * 2)
            task = self._start(self._bounded(self._pick_request()), "request")
            if self.dice.random() < 0.3:
                asyncio.get_running_loop().call_later(self._moment(), task.cancel)
            await asyncio.wait([task])
            if not task.cancelled():
                task.result()

    def _pick_request(self) -> Callable[[], Coroutine[Any, Any, None]]:
        kind = self.dice.random()
        if self.has_deletes and kind < 0.1:
            return self._delete
        if kind < 0.25:
            return self._cancel
        if kind < 0.35:
            return self._change
        return self._watch if kind < 0.6 else self._chat

    async def _bounded(self, request: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await request()
        except AgentPoolError:
            pass

    async def _begin(self) -> Flight:
        on_busy = self.dice.choice((OnBusy.QUEUE, OnBusy.QUEUE, OnBusy.REJECT))
        self.bodies += 1
        request = ChatRequest(
            session_id=self.dice.choice(self.names), message=f"message {self.bodies}", on_busy=on_busy
        )
        flight = await self.chat.begin(request)
        self.trackers.append(self._start(self._track(flight), f"tracker {flight.turn_id}"))
        return flight

    async def _chat(self) -> None:
        flight = await self._begin()
        try:
            await flight.wait_ended()
        finally:
            flight.leave()
        terminal = flight.log.terminal
        if isinstance(terminal, TurnFinished):
            assert self.chat.reply_of(flight).head == flight.turn_id == terminal.head

    async def _watch(self) -> None:
        flight = await self._begin()
        position = 0
        while position < len(flight.log.events) or not flight.log.is_closed:
            await flight.log.wait_beyond(position)
            position = len(flight.log.events)

    async def _cancel(self) -> None:
        keep, everything = self.dice.random() < 0.5, self.dice.random() < 0.3
        key = SessionKey("", self.dice.choice(self.names))
        await self.chat.cancel(key, keep_partial=keep, all_turns=everything)

    async def _change(self) -> None:
        change = SessionChange(title=f"title {self.dice.random()}")
        await self.sessions.update(SessionKey("", self.dice.choice(self.names)), change)

    async def _delete(self) -> None:
        await self.sessions.delete(SessionKey("", self.dice.choice(self.names)))

    async def _operate(self) -> None:
        loop, dice = asyncio.get_running_loop(), self.dice
        while True:
            await asyncio.sleep(dice.choice((0.5, 1.5)))
            if self.stops_at is not None and loop.time() >= self.stops_at:
                await self._stop()
            match dice.randrange(3):
                case 0:
                    self.pool.sweep()
                    self.turns.sweep()
                case 1:
                    self.pool.cleanup_oldest(1)
                case 2:
                    self.pool.evict(SessionKey("", dice.choice(self.names)))

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
        name = agent.session_id
        stored = self._committed(name)
        assert tuple(agent.messages) == stored, f"{name} runs with another context than the stored one"
        flight = self.turns.of_session(SessionKey("", name))[0]
        assert self.table.owners[flight.key].turn_id == flight.turn_id, "runs without the lease"
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

    # -- what clients were told

    async def _track(self, flight: Flight) -> None:
        outcome = Outcome(flight)
        self.outcomes.append(outcome)
        asked_at = asyncio.get_running_loop().time()
        try:
            outcome.terminal = await flight.wait_ended()
        except AgentPoolError as error:
            outcome.refusal = error
        if not self.has_deletes:  # a delete goes to the front
            took = asyncio.get_running_loop().time() - asked_at
            assert took <= self._bound_s(), f"{flight.turn_id} took {took} s of {self._bound_s()}"
        self._check_log(flight)
        self._check_told(outcome)

    def _bound_s(self) -> float:
        limits = self.limits
        waits = limits.queue_wait_s + limits.capacity_wait_s + limits.activation_timeout_s
        board_and_start = 5 * SLOWEST_CALL_S
        commit_and_record = COMMIT_RETRY_S + 3 * SLOWEST_CALL_S
        return waits + board_and_start + TURN_TIMEOUT_S + CANCEL_GRACE_S + commit_and_record + 1

    def _check_log(self, flight: Flight) -> None:
        events = flight.log.events
        if flight.refusal is not None:
            assert events == []
            return
        assert isinstance(events[0], TurnStarted), events
        assert isinstance(events[-1], TerminalEvent)
        assert not any(isinstance(event, TurnStarted | TerminalEvent) for event in events[1:-1])
        if isinstance(events[-1], TurnFinished):
            text = "".join(event.text for event in events if isinstance(event, TextDelta))
            assert [e.text for e in events if isinstance(e, MessageCompleted)] == [text]
            assert events[-1].reply == text

    def _check_told(self, outcome: Outcome) -> None:
        """In the moment in which the end is told, the store and the pool are as it says."""
        turn = self._find(outcome.flight)
        must = outcome.is_on_path
        if must is not None and outcome.flight.uid not in self.deleted:
            is_committed = turn is not None and turn.is_committed
            assert is_committed == must, f"told {outcome.terminal or outcome.refusal}, stored {turn}"

    # -- what is stored

    def _committed(self, name: str) -> tuple[ContextMessage, ...]:
        record = self.store.inner._records[SessionKey("", name)]
        return tuple(message for turn in _path(record) for message in turn.messages)

    def _find(self, flight: Flight) -> Turn | None:
        record = self.store.inner._records.get(flight.key)
        if record is None or record.session.uid != flight.uid:
            return None
        return record.turns.get(flight.turn_id)

    async def _check_history(self) -> None:
        told = {outcome.flight.turn_id: outcome for outcome in self.outcomes}
        order = [outcome.flight.turn_id for outcome in self.outcomes]
        assert len(order) == len(set(order))
        for record in self.store.inner._records.values():
            path = _path(record)
            on_path = {turn.turn_id for turn in path}
            assert record.session.depth == len(path)
            for turn in path:
                assert told[turn.turn_id].is_on_path in (True, None), f"{turn.turn_id} was not acknowledged"
            for turn_id, outcome in told.items():
                if outcome.is_on_path and outcome.flight.uid == record.session.uid:
                    assert turn_id in on_path, f"{turn_id} was acknowledged and is lost"
            finished = [turn.finished_at for turn in path]
            assert finished == sorted(finished)
        present = {record.session.uid for record in self.store.inner._records.values()}
        for outcome in self.outcomes:
            if outcome.is_on_path:
                assert outcome.flight.uid in present | self.deleted, "a session is lost"

    def _check_the_rest(self) -> None:
        assert all(slot.state is SlotState.IDLE for slot in self.pool._table.slots.values())
        assert len(self.conductor._tasks) == 0
        running = [
            turn.turn_id
            for record in self.store.inner._records.values()
            for turn in record.turns.values()
            if turn.status is TurnStatus.RUNNING
        ]
        assert not running, f"recorded as running for ever: {running}"

    def _check_nothing_is_left(self) -> None:
        assert len(self.turns) == 0
        assert not self.turns._by_session
        assert len(self.conductor._tasks) == len(self.pool._tasks) == 0
        assert not self.pool._futures
        assert not self.pool._table.slots
        assert self.pool.live_count() == 0
        self.turns.sweep()
        assert not self.turns._ended


class _NotedDeletes(MemoryStore):
    def __init__(self, life: LifeSpan, deleted: set[str]) -> None:
        super().__init__(life)
        self._deleted = deleted

    async def delete_session(self, key: SessionKey) -> bool:
        if record := self._records.get(key):
            self._deleted.add(record.session.uid)
        return await super().delete_session(key)


def _path(record: Any) -> list[Turn]:
    path: list[Turn] = []
    turn_id = record.session.head
    while turn_id is not None:
        path.append(record.turns[turn_id])
        turn_id = path[-1].parent
    return path[::-1]
