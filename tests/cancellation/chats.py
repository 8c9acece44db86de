"""The real services over a pool and a store that the test controls."""

import asyncio
from typing import Any

from app.domain.chat import ChatRequest, PastTurn
from app.domain.errors import AgentPoolError
from app.domain.events import TerminalEvent, TurnCancelled, TurnFailed, TurnFinished, TurnStarted
from app.domain.ids import SessionKey
from app.domain.session import LifeSpan
from app.domain.stats import ProcessMemory
from app.domain.turn import Turn, TurnStatus
from app.pool.limits import PoolLimits
from app.pool.manager import AgentManager
from app.services.admin import AdminService
from app.services.admission import Admission
from app.services.chat import ChatService
from app.services.compaction import Compactor
from app.services.conductor import Conductor
from app.services.sessions import SessionManager
from app.services.turns import Flight, Turns
from tests.fakes import CountAll, FakeAgent, FakeFactory, FakeStore, Gate, LoopClock, Script, fill, new_ids

KEY = SessionKey("", "a")


class Chats:
    """Session ``a`` exists. ``scripts`` are what the next turns do, then each echoes."""

    def __init__(self, store: FakeStore, **limits: Any) -> None:
        self.store = store
        self.scripts: list[Script] = []
        clock, new_id = LoopClock(), new_ids()
        self.factory = FakeFactory(self._script_for)
        self.pool = AgentManager(store, self.factory, PoolLimits(**limits), clock)
        self.quota = CountAll(clock)
        self.turns = Turns(clock, quota=self.quota)
        admission = Admission(store, self.factory, clock, new_id, LifeSpan())
        self.compactor = Compactor(store, self.factory, clock, new_id)
        self.conductor = Conductor(
            store,
            self.factory,
            self.pool,
            self.turns,
            admission,
            self.compactor,
            clock,
            boot_id="boot-1",
            turn_timeout_s=20,
        )
        self.chat = ChatService(
            store, self.factory, admission, self.pool, self.turns, self.conductor, self.compactor, new_id
        )
        self.sessions = SessionManager(store, self.factory, self.pool, self.turns, admission)
        self.admin = AdminService(
            store, self.pool, self.turns, clock, self.sessions.cleanup, lambda: ProcessMemory(0, 0)
        )

    @classmethod
    async def make(cls, **limits: Any) -> "Chats":
        store = FakeStore()
        await fill(store, "a")
        return cls(store, **limits)

    def _script_for(self, agent: FakeAgent, message: str) -> Script:
        return self.scripts.pop(0) if self.scripts else Script()

    async def ask(self, message: str = "hello", **how: Any) -> Flight | PastTurn:
        return await self.chat.begin(ChatRequest(**{"session_id": "a", "message": message, **how}))

    async def begin(self, message: str = "hello", **how: Any) -> Flight:
        flight = await self.ask(message, **how)
        assert isinstance(flight, Flight)
        return flight

    def path(self) -> list[Turn]:
        """Return the committed turns, oldest first."""
        record = self.store.inner._records[KEY]
        path: list[Turn] = []
        turn_id = record.session.head
        while turn_id is not None:
            path.append(record.turns[turn_id])
            turn_id = path[-1].parent
        return path[::-1]

    def running(self) -> list[Turn]:
        """Return what the store believes to be running."""
        turns = self.store.inner._records[KEY].turns.values()
        return [turn for turn in turns if turn.status is TurnStatus.RUNNING]

    def check_told(self, flight: Flight) -> None:
        """The log has a proper form, and the path holds the turn if and only if the log says so."""
        events, is_on_path = flight.log.events, flight.turn_id in {turn.turn_id for turn in self.path()}
        if flight.refusal is not None:
            assert events == []
            assert not is_on_path
            return
        assert isinstance(events[0], TurnStarted), events
        assert sum(isinstance(event, TerminalEvent) for event in events) == 1
        match events[-1]:
            case TurnFinished():
                assert is_on_path
            case TurnCancelled(partial_kept=kept):
                assert is_on_path == kept
            case TurnFailed(error):
                assert not is_on_path or error.outcome_unknown, "told failed, and it is stored"

    async def check_quiet(self) -> None:
        """All is over, and the next turn sees exactly what is stored."""
        await asyncio.sleep(200)
        assert len(self.turns) == len(self.conductor._tasks) == len(self.pool._tasks) == 0
        assert not self.running()
        assert self.quota.under_way == 0
        expected = tuple(message for turn in self.path() for message in turn.messages)
        seen: list[tuple[Any, ...]] = []
        self._script_for = lambda agent, _: seen.append(tuple(agent.messages)) or Script()
        self.factory.script_for = self._script_for
        for agent in self.factory.built:
            agent._script_for = self._script_for
        await self.chat.chat("a", "the next one")
        assert seen == [expected]


async def end_of(flight: Flight) -> TerminalEvent | AgentPoolError:
    """Return how the turn ended."""
    try:
        return await flight.wait_ended()
    except AgentPoolError as refusal:
        return refusal


def open_after(seconds: float) -> Gate:
    """Return a gate that opens by itself."""
    gate = Gate()
    asyncio.get_running_loop().call_later(seconds, gate.open)
    return gate
