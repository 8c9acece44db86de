"""Turns in flight: their logs, who watches them, and how they are cancelled.

A turn belongs to the server. Its log is a list of events; a watcher is a
position in it and a future that the plain ``append`` wakes, so a token costs
neither a lock nor a task, and a watcher that is behind costs nothing at all.
"""

import asyncio
from enum import StrEnum

from cachetools import TTLCache

from app.domain.errors import AgentPoolError, SessionNotFound, StoreUnavailable, TurnCancelled
from app.domain.events import (
    MessageCompleted,
    TerminalEvent,
    ToolCalled,
    ToolReturned,
    TurnEvent,
    TurnFailed,
)
from app.domain.ids import SessionKey
from app.domain.session import Session
from app.domain.turn import CancelReason, Turn, TurnError
from app.ports import Clock, LiveAgent

CANCEL_GRACE_S = 1.5  # a cancelled body that still runs then is a zombie
_EVENT_BYTES = 400  # measured: an event object, its text and its encoded frame, short tokens


class TurnLog:
    """The events of one turn; that at index ``i`` has the sequence number ``i + 1``.

    ``frames`` is where faces keep what they encoded, one list per face parallel
    to ``events``, so that watchers share it.
    """

    __slots__ = ("_closed", "_closing", "_waiters", "events", "frames", "turn_id")

    def __init__(self, turn_id: str) -> None:
        self.turn_id = turn_id
        self.events: list[TurnEvent] = []
        self.frames: dict[str, list[bytes]] = {}
        self._waiters: list[asyncio.Future[None]] = []
        self._closing: list[asyncio.Future[None]] = []
        self._closed = False

    @property
    def is_closed(self) -> bool:
        """Whether no event will come any more."""
        return self._closed

    @property
    def terminal(self) -> TerminalEvent | None:
        last = self.events[-1] if self.events else None
        return last if isinstance(last, TerminalEvent) else None

    @property
    def estimated_bytes(self) -> int:
        text = next((len(e.text) for e in reversed(self.events[-2:]) if isinstance(e, MessageCompleted)), 0)
        return _EVENT_BYTES * len(self.events) + 4 * text

    def tool_seqs(self) -> tuple[int, ...]:
        """Return the sequence numbers of the tool events."""
        return tuple(n for n, e in enumerate(self.events, 1) if isinstance(e, ToolCalled | ToolReturned))

    def append(self, event: TurnEvent) -> None:
        """Add an event and wake everyone who waits for it; nothing is added to a closed log."""
        if self._closed:
            return
        self.events.append(event)
        if self._waiters:
            _wake(self._waiters)

    def close(self, terminal: TerminalEvent | None = None) -> None:
        """Add the terminal event, if any, and let nothing follow."""
        if terminal is not None:
            self.append(terminal)
        self._closed = True
        _wake(self._waiters)
        _wake(self._closing)

    async def wait_beyond(self, count: int) -> None:
        """Return once there are more than ``count`` events, or none will come.

        May be cancelled at any time; the log is not changed by that.
        """
        while len(self.events) <= count and not self._closed:
            await _join(self._waiters)

    async def wait_closed(self) -> None:
        """Return once no event will come any more; may be cancelled at any time."""
        while not self._closed:
            await _join(self._closing)


class FlightState(StrEnum):
    ACCEPTED = "accepted"  # waits for its lease
    RUNNING = "running"
    COMMITTING = "committing"  # handed to the store: a cancel has lost
    ENDED = "ended"


class Flight:
    """One turn between its acceptance and its end.

    ``refusal`` is the error of a turn that never started. ``turn`` is its start
    record, once it runs, and ``body`` the task of its agent. ``cancel_reason`` is set
    when it is to end early.
    """

    __slots__ = (
        "_agent",
        "_settled",
        "accepted_at",
        "body",
        "cancel_reason",
        "has_timed_out",
        "is_partial_wanted",
        "key",
        "log",
        "refusal",
        "state",
        "task",
        "turn",
        "turn_id",
        "uid",
    )

    def __init__(self, turn_id: str, session: Session, accepted_at: float) -> None:
        self.turn_id = turn_id
        self.key = session.key
        self.uid = session.uid
        self.accepted_at = accepted_at
        self.log = TurnLog(turn_id)
        self.state = FlightState.ACCEPTED
        self.task: asyncio.Task[None] | None = None
        self.turn: Turn | None = None
        self.refusal: AgentPoolError | None = None
        self.cancel_reason: CancelReason | None = None
        self.is_partial_wanted = False
        self.has_timed_out = False
        self._agent: LiveAgent | None = None
        self.body: asyncio.Task[object] | None = None
        self._settled: asyncio.Future[None] | None = None

    def emit(self, event: TurnEvent) -> None:
        """Log an event of the body; one that goes on after its end is not heard any more."""
        if self.state is FlightState.RUNNING:
            self.log.append(event)

    async def wait_started(self) -> None:
        """Return once ``TurnStarted`` is in the log.

        Raises:
            AgentPoolError: the turn was refused before it started.
        """
        await self.log.wait_beyond(0)
        if self.refusal is not None:
            raise self.refusal.with_traceback(None)

    async def wait_ended(self) -> TerminalEvent:
        """Return the terminal event, which agrees with the store.

        Raises:
            AgentPoolError: the turn was refused before it started.
        """
        await self.log.wait_closed()
        if self.refusal is not None:
            raise self.refusal.with_traceback(None)
        terminal = self.log.terminal
        assert terminal is not None
        return terminal

    async def settle(self, agent: LiveAgent, body: asyncio.Task[object], timeout_s: float) -> bool:
        """Wait until the body has ended, or ignores that it was told to; say whether it has ended."""
        loop = asyncio.get_running_loop()
        self._agent, self.body, self._settled = agent, body, loop.create_future()
        body.add_done_callback(lambda _: self._give_up())
        deadline = loop.call_later(timeout_s, self._time_out)
        try:
            await self._settled
        finally:
            deadline.cancel()
            if not body.done():
                agent.cancel()
                body.cancel()
        return body.done()

    def cancel(self, reason: CancelReason, *, keep_partial: bool) -> bool:
        """Ask the turn to end early; say whether that can still have an effect."""
        if self.state in (FlightState.COMMITTING, FlightState.ENDED) or self.cancel_reason is not None:
            return False
        self.cancel_reason = reason
        self.is_partial_wanted = keep_partial
        if self.state is FlightState.RUNNING:
            self._stop()
        elif self.task is not None:
            self.task.cancel()
        return True

    def refuse(self, error: AgentPoolError) -> None:
        """End a turn that could not start, or whose conductor broke."""
        if self.cancel_reason is CancelReason.DELETED:
            error = SessionNotFound()
        elif self.cancel_reason not in (None, CancelReason.DRAIN):
            error = TurnCancelled()
        error.session_id = error.session_id or self.key.session_id
        if self.log.events:
            if self.state is FlightState.COMMITTING:  # cut off there: the store may have it or not
                error = StoreUnavailable("The server stopped meanwhile.", outcome_unknown=True)
            self.log.close(TurnFailed(to_turn_error(error)))
            return
        self.refusal = error
        self.log.close()

    def _time_out(self) -> None:
        self.has_timed_out = True
        self._stop()

    def _stop(self) -> None:
        # Both are needed: AutoGen's token alone hangs in a tool call (upstream #7956), and
        # the task's cancellation alone leaves the tool running.
        if self._agent is not None and self.body is not None:
            self._agent.cancel()
            self.body.cancel()
            asyncio.get_running_loop().call_later(CANCEL_GRACE_S, self._give_up)

    def _give_up(self) -> None:
        if self._settled is not None and not self._settled.done():
            self._settled.set_result(None)


class Turns:
    """Every turn in flight, and for a while the logs of those that ended.

    ``replay_s`` and ``replay_bytes`` bound the ended logs.
    """

    def __init__(self, clock: Clock, *, replay_s: float = 300.0, replay_bytes: int = 64 << 20) -> None:
        self._clock = clock
        self._flights: dict[str, Flight] = {}
        self._by_session: dict[SessionKey, list[Flight]] = {}
        self._ended: TTLCache[str, tuple[str, TurnLog]] = TTLCache(
            replay_bytes, replay_s, timer=clock.monotonic, getsizeof=lambda item: item[1].estimated_bytes
        )

    def __len__(self) -> int:
        return len(self._flights)

    def accept(self, turn_id: str, session: Session) -> Flight:
        """Register a new turn, behind those of its session that wait."""
        flight = Flight(turn_id, session, self._clock.monotonic())
        self._flights[turn_id] = flight
        self._by_session.setdefault(flight.key, []).append(flight)
        return flight

    def end(self, flight: Flight) -> None:
        """Take a turn that has ended out of flight, and keep its log for those who come late."""
        flight.state = FlightState.ENDED
        del self._flights[flight.turn_id]
        flights = self._by_session[flight.key]
        flights.remove(flight)
        if not flights:
            del self._by_session[flight.key]
        if flight.log.terminal is not None and flight.log.estimated_bytes <= self._ended.maxsize:
            self._ended[flight.turn_id] = (flight.uid, flight.log)

    def find(self, session: Session, turn_id: str) -> Flight | None:
        """Return the session's turn of that id if it is in flight."""
        flight = self._flights.get(turn_id)
        return flight if flight is not None and flight.uid == session.uid else None

    def find_log(self, session: Session, turn_id: str) -> TurnLog | None:
        """Return the log of a turn that ended a short while ago."""
        uid, log = self._ended.get(turn_id, (None, None))
        return log if uid == session.uid else None

    def of_session(self, key: SessionKey) -> list[Flight]:
        """Return the session's turns in flight, the running one first."""
        flights = self._by_session.get(key, [])
        return sorted(flights, key=lambda flight: flight.state is FlightState.ACCEPTED)

    def all(self) -> list[Flight]:
        return list(self._flights.values())

    def sweep(self) -> None:
        """Drop the ended logs whose time is over."""
        self._ended.expire()


def to_turn_error(error: AgentPoolError) -> TurnError:
    """Return ``error`` as a turn records it."""
    return TurnError(error.code, error.detail, error.retry_after_s, bool(error.extra.get("outcome")))


def _wake(waiters: list[asyncio.Future[None]]) -> None:
    woken = waiters.copy()
    waiters.clear()
    for waiter in woken:
        if not waiter.done():
            waiter.set_result(None)


async def _join(waiters: list[asyncio.Future[None]]) -> None:
    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiters.append(waiter)
    try:
        await waiter
    finally:
        if waiter in waiters:  # cancelled: nobody will take it out
            waiters.remove(waiter)
