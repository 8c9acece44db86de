"""How the load test's turns follow each other: which scenarios there are, closed and open loop.

True in both loops: a session never has two turns at once, and nothing is repeated. An error
ends its session. In the open loop, where turns come at times of their own whatever the server
does, a fresh session takes its place, so that the load stays what was asked for.
"""

import argparse
import asyncio
import random
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from load_client import Client, Timed, TurnError
from load_session import Filler, Session, SessionMaker, log_normal_filler, no_filler


@dataclass(frozen=True, slots=True)
class Scenario:
    """What a scenario means for options that are not given.

    ``in_order``: the session that has waited longest goes first, so that a pool with fewer
    places than there are sessions has always evicted it; else a random one.
    """

    summary: str
    sessions: int
    turns: int
    concurrency: int
    stream_share: float
    in_order: bool = False
    is_mixed: bool = False


OVERLOAD = "overload"
SCENARIOS = {
    "turns": Scenario("many sessions in random order, a tenth of the turns streamed", 200, 10, 32, 0.1),
    "streams": Scenario("streams side by side: first tokens, and the gaps between tokens", 100, 5, 100, 1.0),
    "long": Scenario("one session: its last turns against its first", 1, 200, 1, 0.0),
    "churn": Scenario("more sessions than the pool has places, one after the other", 2000, 3, 32, 0.0, True),
    OVERLOAD: Scenario("five times what the server carries, and whether it goes on", 2000, 10, 256, 1.0),
    "mixed": Scenario("English and Chinese messages of log-normal lengths", 200, 10, 32, 0.5, is_mixed=True),
}


@dataclass(slots=True)
class Tally:
    """What was measured. Times are in seconds; ``latencies`` are (turn number, time) by activation.

    ``deltas`` and ``characters`` are those of streamed turns. Only the second measures what was
    delivered: tokens that come together may travel as one delta.
    """

    latencies: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))
    first_tokens: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    deltas: int = 0
    characters: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    duration_s: float = 0.0

    @property
    def turns(self) -> int:
        return sum(map(len, self.latencies.values()))

    def note(self, turn: int, timed: Timed) -> None:
        self.latencies[timed.answer.activation].append((turn, timed.latency_s))
        if timed.first_token_s is not None:
            self.first_tokens.append(timed.first_token_s)
        self.gaps += timed.gaps_s
        self.deltas += timed.deltas
        if timed.deltas:
            self.characters += len(timed.answer.reply)


class Load:
    """One round: ``turns`` of each session, at most once."""

    def __init__(
        self,
        options: argparse.Namespace,
        client: Client,
        maker: SessionMaker,
        sessions: int,
        turns: int,
        advance: Callable[[], None],
    ) -> None:
        self.tally = Tally()
        self._options = options
        self._client = client
        self._maker = maker
        self._turns = turns
        self._advance = advance
        self._random = random.Random(options.seed)
        self._filler: Filler = no_filler
        if options.is_mixed:
            self._filler = log_normal_filler(self._random, options.length_median, options.length_sigma)
        self._ready = deque(maker.make(sessions))

    async def run_closed(self, concurrency: int) -> None:
        """Keep ``concurrency`` turns running: each begins when one before it has ended."""
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(concurrency):
                group.create_task(self._work(), name=f"client {number}")
        self.tally.duration_s = time.perf_counter() - began

    async def run_open(self, rate: float) -> None:
        """Begin ``rate`` turns per second, as strangers would (Poisson), however many still run.

        A turn that finds all sessions busy waits for one. That wait, too, counts as latency: it
        counts from when the turn should have begun.
        """
        self._free = asyncio.Semaphore(len(self._ready))
        due = began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(len(self._ready) * self._turns):
                due += self._random.expovariate(rate)
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                group.create_task(self._arrive(due), name=f"arrival {number}")
        self.tally.duration_s = time.perf_counter() - began

    async def _work(self) -> None:
        while self._ready:
            session = self._take_session()
            has_gone_on = await self._take_turn(session, time.perf_counter())
            if has_gone_on and session.turns < self._turns:
                self._ready.append(session)

    async def _arrive(self, due: float) -> None:
        await self._free.acquire()
        session = self._take_session()
        if not await self._take_turn(session, due):
            [session] = self._maker.make(1)
        if session.turns < self._turns:
            self._ready.append(session)
            self._free.release()

    def _take_session(self) -> Session:
        if self._options.in_order:
            return self._ready.popleft()
        chosen = self._random.randrange(len(self._ready))
        self._ready[chosen], self._ready[-1] = self._ready[-1], self._ready[chosen]
        return self._ready.pop()

    async def _take_turn(self, session: Session, began: float) -> bool:
        """Carry out one turn; say whether the session can go on."""
        body = {"session_id": session.session_id, "message": session.next_message(self._filler)}
        is_streamed = self._random.random() < self._options.stream_share
        try:
            timed = await self._client.ask(body, is_streamed, began)
        except TurnError as error:
            self.tally.errors[error.code] += 1
            return False
        finally:
            self._advance()
        if wrong := session.take(timed.answer, self._options.expect_echo):
            self.tally.wrong.append(wrong)
        self.tally.note(session.turns, timed)
        return True
