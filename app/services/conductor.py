"""One turn, from its acceptance to its end.

    make way -> lease -> board -> start record -> run -> land

The conductor is a task of its own, and the agent's body another, so that a body
that ignores its cancellation cannot hold up the rest.
"""

import asyncio
import logging
from dataclasses import dataclass, replace
from functools import partial

from app.background import TaskOwner
from app.domain.branch import ROOT
from app.domain.chat import Choices
from app.domain.errors import (
    AgentPoolError,
    Draining,
    InternalError,
    SessionNotFound,
    StoreUnavailable,
    TurnNotFound,
    TurnTimeout,
)
from app.domain.events import TurnStarted
from app.domain.idempotency import Binding
from app.domain.session import UNSET, Session, Unset
from app.domain.stats import DiscardCause
from app.domain.turn import Answer, CancelReason, Turn, TurnStatus
from app.pool.lease import Lease
from app.pool.manager import AgentManager
from app.ports import AgentFactory, Clock, SessionStore
from app.services.admission import Admission
from app.services.compaction import Compactor
from app.services.holds import Holds
from app.services.landing import Airborne, CheckpointPlan, Landing
from app.services.turns import Flight, FlightState, Turns

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """What a turn sets out with.

    ``message`` ``None``: the head turn's input once more, beside that turn.
    ``parent``: the committed turn that it continues, ``ROOT``, or ``None`` for the head as it is then.
    ``choices`` stick to the session as it is when the turn starts.
    ``user`` is whose share of the pool it takes.
    ``may_wait``: whether it waits for a turn of its session that runs.
    ``interrupts``: it cancels that turn for this reason instead, and goes before all that wait.
    ``expected_head``: it is refused if the session's head is another one by then.
    ``binding``: the idempotency key that is stored with it.
    """

    message: str | None
    choices: Choices
    parent: str | None = None
    user: str | None = None
    may_wait: bool = True
    interrupts: CancelReason | None = None
    expected_head: str | Unset | None = UNSET
    binding: Binding | None = None


@dataclass(frozen=True, slots=True)
class Boarding:
    """What a turn begins with: the session as stored, and as it would be at the place that it continues."""

    session: Session
    place: Session
    message: str
    resets_state: bool = False


class Conductor:
    """Carries turns out. ``compactor`` is asked after each whether the session has become too long."""

    def __init__(
        self,
        store: SessionStore,
        factory: AgentFactory,
        pool: AgentManager,
        turns: Turns,
        admission: Admission,
        compactor: Compactor,
        clock: Clock,
        *,
        boot_id: str,
        turn_timeout_s: float = 300.0,
        checkpoints: CheckpointPlan | None = None,
    ) -> None:
        self._store = store
        self._factory = factory
        self._pool = pool
        self._turns = turns
        self._admission = admission
        self._holds = Holds(pool, turns)
        self._compactor = compactor
        self._clock = clock
        self._boot_id = boot_id
        self._turn_timeout_s = turn_timeout_s
        self._tasks = TaskOwner("turns")
        self._landing = Landing(store, clock, self._tasks, checkpoints)

    def depart(self, flight: Flight, departure: Departure) -> None:
        """Start the turn's task; the flight tells how it goes.

        Raises:
            Draining: the server has stopped.
        """
        try:
            flight.task = self._tasks.spawn(self._conduct(flight, departure), f"turn {flight.turn_id}")
        except RuntimeError:
            self._turns.end(flight)
            raise Draining(retry_after_s=1) from None
        # A task that is cancelled before its first step never runs a line of its coroutine.
        flight.task.add_done_callback(lambda _: self._ensure_ended(flight))

    async def close(self) -> None:
        """End what still runs; a turn that does not end in time is found by the next start."""
        await self._tasks.close()

    async def _conduct(self, flight: Flight, departure: Departure) -> None:
        try:
            async with self._pool.lease(
                flight.key,
                user=departure.user,
                turn_id=flight.turn_id,
                may_wait=departure.may_wait,
                front=departure.interrupts is not None,
                on_entered=partial(self._holds.make_way, flight.key, departure.interrupts, flight.turn_id),
            ) as lease:
                flight.state = FlightState.BOARDING
                boarding = await self._board(flight, lease, departure)
                await self._fly(flight, lease, boarding, departure)
        except AgentPoolError as error:
            flight.refuse(error)
        except asyncio.CancelledError:
            flight.refuse(Draining(retry_after_s=1))
            if flight.cancel_reason is None:  # not asked for by a caller: the process stops
                raise
        except Exception:
            _log.exception("turn %s broke", flight.turn_id)
            flight.refuse(InternalError())
        finally:
            self._turns.end(flight)

    def _ensure_ended(self, flight: Flight) -> None:
        if flight.state is not FlightState.ENDED:
            flight.refuse(Draining(retry_after_s=1))
            self._turns.end(flight)

    async def _board(self, flight: Flight, lease: Lease, departure: Departure) -> Boarding:
        """Bring record and agent up to date, once the session is ours."""
        session = lease.record or await self._store.find_session(flight.key)
        if session is None or session.uid != flight.uid:
            raise SessionNotFound(session_id=flight.key.session_id)
        try:
            self._admission.require_open(session)
            self._admission.require_head(session, departure.expected_head)
            boarding = await self._find_place(session, departure)
        except AgentPoolError:
            lease.give_back()  # the agent has not been touched
            raise
        if (change := departure.choices.change_of(session)) is not None:
            chosen = departure.choices  # what fitted when the turn came may not fit any more
            self._admission.check(
                session, agent_id=chosen.agent_id, provider=chosen.provider, model=chosen.model
            )
            session = await self._store.update_session(flight.key, change, self._clock.now_ms())
            boarding = await self._find_place(session, departure)
        await lease.fit(boarding.place)
        return boarding

    async def _find_place(self, session: Session, departure: Departure) -> Boarding:
        """Return where the turn continues.

        Raises:
            TurnNotFound: there is no such turn, or it was never committed.
        """
        if departure.message is None:
            if session.head is None:
                raise TurnNotFound("The session has no turn yet.", session_id=session.key.session_id)
            turn = await self._store.get_turn(session, session.head)
            place = await self._store.at_turn(session, turn.parent)
            # Only the answer is asked for again: the state stays as it is.
            place = replace(place, state=session.state, state_rev=session.state_rev)
            return Boarding(session, place, turn.input)
        if departure.parent is None:
            return Boarding(session, session, departure.message)
        parent = None if departure.parent == ROOT else departure.parent
        place = await self._store.at_turn(session, parent)
        return Boarding(session, place, departure.message, resets_state=True)

    async def _fly(self, flight: Flight, lease: Lease, boarding: Boarding, departure: Departure) -> None:
        turn = self._start_record(flight, lease, boarding, departure)
        air = Airborne(flight, lease, boarding.session, turn, boarding.resets_state)
        await self._record_start(air)
        flight.turn = turn
        flight.state = FlightState.RUNNING
        agent = lease.agent
        # Before the watchers are woken, so that the model is asked before they are answered. It
        # has not begun yet when "started" is logged.
        body = self._tasks.spawn(agent.run(turn.input, flight.emit), f"body {turn.turn_id}", is_awaited=True)
        flight.log.append(_started(turn, boarding.session))
        if not await flight.settle(agent, body, self._turn_timeout_s):
            _log.error("turn %s ignores its cancellation and keeps its place until it ends", turn.turn_id)
        if flight.cancel_reason is not None:
            await self._landing.cut_short(air)
        elif flight.has_timed_out:
            await self._landing.fail(air, TurnTimeout(), DiscardCause.DEADLINE)
        elif (error := _error_of(body)) is not None:
            await self._landing.fail(air, error, DiscardCause.ERROR)
        else:
            committed = await self._landing.finish(air, body.result())
            if committed is not None and self._compactor.is_automatic:
                self._compactor.consider(committed, agent.estimated_tokens)

    async def _record_start(self, air: Airborne) -> None:
        """Store the start record; what may have been stored is ended before the turn is refused."""
        try:
            await self._store.start_turn(air.session, air.turn)
        except asyncio.CancelledError:
            await self._landing.record_dropped(air)
            raise
        except StoreUnavailable as refusal:
            if refusal.outcome_unknown:
                air.flight.state = FlightState.COMMITTING
                await self._landing.record_failed(air, refusal)
            raise

    def _start_record(self, flight: Flight, lease: Lease, boarding: Boarding, departure: Departure) -> Turn:
        session, place = boarding.session, boarding.place
        provider, model = self._factory.model_of(session)
        return Turn(
            turn_id=flight.turn_id,
            parent=place.head,
            depth=place.depth + 1,
            status=TurnStatus.RUNNING,
            input=boarding.message,
            agent_id=session.agent_id,
            provider=provider,
            model=model,
            activation=lease.activation,
            # A clock that was set back must not put a turn before what came before it.
            started_at=max(self._clock.now_ms(), session.last_accessed, session.updated_at),
            boot_id=self._boot_id,
            queued_ms=max(0, round((self._clock.monotonic() - flight.accepted_at) * 1000)),
            binding=departure.binding,
        )


def _started(turn: Turn, session: Session) -> TurnStarted:
    return TurnStarted(
        session_id=session.key.session_id,
        agent_id=turn.agent_id,
        provider=turn.provider,
        model=turn.model,
        activation=turn.activation,
        created_at=turn.started_at,
    )


def _error_of(body: asyncio.Task[Answer]) -> AgentPoolError | None:
    """Return why the body failed, ``None`` if it did not."""
    if body.cancelled():
        return InternalError("The agent was cancelled from inside.")
    error = body.exception()
    if error is None or isinstance(error, AgentPoolError):
        return error
    _log.error("the agent failed", exc_info=error)
    return InternalError()
