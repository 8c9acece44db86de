"""Turns in flight: who watches them, how they are cancelled, and which keys they hold.

A turn belongs to the server: it goes on when its clients leave, unless it was asked
to end with them. Every change of state here is a plain call.
"""

import asyncio
from collections.abc import Container
from enum import StrEnum

from cachetools import TTLCache

from app.domain.errors import (
    AgentPoolError,
    SessionNotFound,
    StoreUnavailable,
    TurnCancelled,
)
from app.domain.events import TerminalEvent, TurnEvent, TurnFailed, TurnFinished
from app.domain.idempotency import Binding
from app.domain.ids import SessionKey
from app.domain.quota import Quota, UserKey
from app.domain.session import Session
from app.domain.turn import CancelOrder, CancelReason, Turn, TurnError
from app.ports import Clock, LiveAgent
from app.services.quota import TurnQuota
from app.services.turn_log import TurnLog

CANCEL_GRACE_S = 1.5  # a cancelled body that still runs then is a zombie
UNWATCHED_S = 2.0  # how long a turn that ends with its watchers waits for one to come back


class FlightState(StrEnum):
    ACCEPTED = "accepted"  # waits for its lease
    BOARDING = "boarding"  # has its lease; its agent is made ready
    RUNNING = "running"
    COMMITTING = "committing"  # handed to the store: a cancel has lost
    ENDED = "ended"


class Flight:
    """One turn between its acceptance and its end.

    ``refusal`` is the error of a turn that never started. ``turn`` is its start
    record, once it runs, and ``body`` the task of its agent. ``cancel_reason`` is set
    when it is to end early. ``ends_unwatched``: it is to end when nobody watches any more.
    ``claim`` is its idempotency key, which it gives back when it ends.
    ``is_ousted``: another process has its session now, so it can only fail.
    ``user`` is whose it is, ``quotas`` what that one had left when it was accepted.
    """

    __slots__ = (
        "_agent",
        "_settled",
        "_unwatched",
        "_watchers",
        "accepted_at",
        "body",
        "cancel_reason",
        "claim",
        "ends_unwatched",
        "has_timed_out",
        "is_ousted",
        "is_partial_wanted",
        "key",
        "log",
        "quotas",
        "refusal",
        "state",
        "task",
        "turn",
        "turn_id",
        "uid",
        "user",
    )

    def __init__(
        self, turn_id: str, session: Session, accepted_at: float, *, ends_unwatched: bool = False
    ) -> None:
        self.turn_id = turn_id
        self.key = session.key
        self.uid = session.uid
        self.user = user_of(session)
        self.quotas: tuple[Quota, ...] = ()
        self.accepted_at = accepted_at
        self.log = TurnLog(turn_id)
        self.state = FlightState.ACCEPTED
        self.task: asyncio.Task[None] | None = None
        self.turn: Turn | None = None
        self.refusal: AgentPoolError | None = None
        self.cancel_reason: CancelReason | None = None
        self.is_partial_wanted = False
        self.has_timed_out = False
        self.is_ousted = False
        self.ends_unwatched = ends_unwatched
        self.claim: Claim | None = None
        self._watchers = 0
        self._unwatched: asyncio.TimerHandle | None = None
        self._agent: LiveAgent | None = None
        self.body: asyncio.Task[object] | None = None
        self._settled: asyncio.Future[None] | None = None

    @property
    def is_lost(self) -> bool:
        """Whether it cannot answer anybody any more: it has ended, or its clients left it in the queue."""
        is_dropped = self.state is FlightState.ACCEPTED and self.cancel_reason is CancelReason.DISCONNECT
        return is_dropped or self.state is FlightState.ENDED

    @property
    def is_shared(self) -> bool:
        """Whether more than one watches it."""
        return self._watchers > 1

    @property
    def estimated_tokens(self) -> int:
        """About how many the turn took; 0 where its model did not answer, which is nobody's fault here."""
        said = self.log.estimated_tokens
        is_silent = isinstance(self.log.terminal, TurnFailed) and not said and not self.has_timed_out
        return 0 if self._agent is None or is_silent else self._agent.estimated_tokens + said

    def emit(self, event: TurnEvent) -> None:
        """Log an event of the body; one that goes on after its end is not heard any more."""
        if self.state is FlightState.RUNNING:
            self.log.append(event)

    def join(self) -> None:
        """Note one more watcher."""
        self._watchers += 1
        if self._unwatched is not None:
            self._unwatched.cancel()
            self._unwatched = None

    def leave(self) -> None:
        """Note that a watcher has gone. Without any, a turn that only waits is dropped."""
        self._watchers -= 1
        if self._watchers:
            return
        if self.state is FlightState.ACCEPTED:
            self.cancel(CancelReason.DISCONNECT, keep_partial=False)
        elif self.ends_unwatched and self.state is not FlightState.ENDED:
            loop = asyncio.get_running_loop()
            self._unwatched = loop.call_later(UNWATCHED_S, self._end_unwatched)

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
        if self.is_ousted:
            self._stop()
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

    def stand_in_line(self) -> None:
        """Wait once more, as before it had its lease; dropped if nobody watches by now."""
        self.state = FlightState.ACCEPTED
        if not self._watchers:
            self.cancel(CancelReason.DISCONNECT, keep_partial=False)

    def oust(self) -> None:
        """End the turn, which can not be committed any more."""
        self.is_ousted = True
        if self.state is FlightState.RUNNING:
            self._stop()

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

    def _end_unwatched(self) -> None:
        self._unwatched = None
        self.cancel(CancelReason.DISCONNECT, keep_partial=True)

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


class Claim:
    """An idempotency key in use by a turn in flight, or by a request that is about to make one."""

    __slots__ = ("_decided", "binding", "flight")

    def __init__(self, binding: Binding) -> None:
        self.binding = binding
        self.flight: Flight | None = None
        self._decided: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def decide(self, flight: Flight | None) -> None:
        """Say which turn it became, ``None`` for none."""
        self.flight = flight
        if flight is not None:
            flight.claim = self
        if not self._decided.done():
            self._decided.set_result(None)

    async def wait(self) -> Flight | None:
        """Return the turn that the key's first request became; may be cancelled."""
        await asyncio.shield(self._decided)
        return self.flight


class Turns:
    """Every turn in flight, and for a while the logs of those that ended.

    ``replay_s`` and ``replay_bytes`` bound the ended logs, ``quota`` what each user may have.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        replay_s: float = 300.0,
        replay_bytes: int = 64 << 20,
        quota: TurnQuota | None = None,
    ) -> None:
        self._clock = clock
        self.quota = quota or TurnQuota(clock)
        self._flights: dict[str, Flight] = {}
        self._by_session: dict[SessionKey, list[Flight]] = {}
        self._claims: dict[tuple[str, str], Claim] = {}
        self._ended: TTLCache[str, tuple[str, SessionKey, TurnLog]] = TTLCache(
            replay_bytes, replay_s, timer=clock.monotonic, getsizeof=lambda item: item[2].estimated_bytes
        )

    def __len__(self) -> int:
        return len(self._flights)

    def accept(
        self, turn_id: str, session: Session, *, ends_unwatched: bool = False, spent: int = 0
    ) -> Flight:
        """Register a new turn, behind those of its session that wait.

        ``spent``: tokens that the session's user has had today.

        Raises:
            RateLimited: its user has as much as allowed.
        """
        flight = Flight(turn_id, session, self._clock.monotonic(), ends_unwatched=ends_unwatched)
        flight.quotas = self.quota.admit(flight.user, spent)
        self._flights[turn_id] = flight
        self._by_session.setdefault(flight.key, []).append(flight)
        return flight

    def get(self, turn_id: str | None) -> Flight | None:
        """Return the turn of that id if it is in flight."""
        return self._flights.get(turn_id) if turn_id is not None else None

    def end(self, flight: Flight) -> None:
        """Take a turn that has ended out of flight, and keep its log for those who come late.

        In the step in which its log was closed: whoever has read the end finds its key free.
        """
        flight.state = FlightState.ENDED
        terminal = flight.log.terminal
        tokens = terminal.usage.total_tokens if isinstance(terminal, TurnFinished) else 0
        self.quota.release(flight.user, tokens)
        if not tokens:
            self.quota.note_uncounted(flight.user, flight.estimated_tokens)
        if flight.claim is not None:
            self.release(flight.claim)
        del self._flights[flight.turn_id]
        flights = self._by_session[flight.key]
        flights.remove(flight)
        if not flights:
            del self._by_session[flight.key]
        if flight.cancel_reason is CancelReason.DELETED or terminal is None:
            return
        if flight.log.estimated_bytes <= self._ended.maxsize:
            self._ended[flight.turn_id] = (flight.uid, flight.key, flight.log)

    def find(self, session: Session, turn_id: str) -> Flight | None:
        """Return the session's turn of that id if it is in flight."""
        flight = self._flights.get(turn_id)
        return flight if flight is not None and flight.uid == session.uid else None

    def find_log(self, session: Session, turn_id: str) -> TurnLog | None:
        """Return the log of a turn that ended a short while ago."""
        uid, _, log = self._ended.get(turn_id, (None, None, None))
        return log if uid == session.uid else None

    def forget(self, keys: Container[SessionKey]) -> None:
        """Drop the ended logs of these sessions."""
        for turn_id in [turn_id for turn_id, (_, key, _) in self._ended.items() if key in keys]:
            self._ended.pop(turn_id, None)

    def of_session(self, key: SessionKey) -> list[Flight]:
        """Return the session's turns in flight, those that have or had the lease first."""
        flights = self._by_session.get(key, [])
        return sorted(flights, key=lambda flight: flight.state is FlightState.ACCEPTED)

    def cancel(self, key: SessionKey, order: CancelOrder) -> tuple[str, ...]:
        """Ask turns of the session in flight to end; return which were asked, the running one first."""
        flights = self.of_session(key)
        if not order.all:
            flights = [f for f in flights if order.turn_id in (None, f.turn_id)][:1]
        for flight in flights:
            flight.cancel(order.reason, keep_partial=order.keep_partial)
        return tuple(flight.turn_id for flight in flights)

    def all(self) -> list[Flight]:
        return list(self._flights.values())

    def find_claim(self, binding: Binding) -> Claim | None:
        """Return who uses the key now, for whatever request."""
        return self._claims.get((binding.owner, binding.key))

    def claim(self, binding: Binding) -> Claim:
        """Take a key that nobody uses, until ``release``."""
        claim = self._claims[binding.owner, binding.key] = Claim(binding)
        return claim

    def release(self, claim: Claim) -> None:
        """Give the key back; whoever waits for its turn and finds none may take it."""
        if self._claims.get((claim.binding.owner, claim.binding.key)) is claim:
            del self._claims[claim.binding.owner, claim.binding.key]
        claim.decide(claim.flight)

    def sweep(self) -> None:
        """Drop the ended logs whose time is over."""
        self._ended.expire()


def user_of(session: Session) -> UserKey | None:
    """Return whose turns those of the session are, ``None`` for nobody's."""
    return None if session.user_id is None else (session.key.owner, session.user_id)


def to_turn_error(error: AgentPoolError) -> TurnError:
    """Return ``error`` as a turn records it."""
    return TurnError(error.code, error.detail, error.retry_after_s, bool(error.extra.get("outcome")))
