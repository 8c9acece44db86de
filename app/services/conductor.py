"""One turn, from its acceptance to its end.

    make way -> lease -> take off (find the place, fit the agent, start record) -> run -> land

The conductor is a task of its own, and the agent's body another, so that a body
that ignores its cancellation cannot hold up the rest.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from app.background import TaskOwner
from app.domain.branch import ROOT
from app.domain.errors import (
    AgentPoolError,
    Draining,
    HeadMoved,
    InternalError,
    KeyTaken,
    LeasedElsewhere,
    SessionNotFound,
    SnapshotUnreadable,
    StoreUnavailable,
    TurnNotFound,
    TurnQueueFull,
    TurnTimeout,
)
from app.domain.events import TurnStarted
from app.domain.session import Session
from app.domain.stats import DiscardCause
from app.domain.turn import Answer, CancelReason, Turn, TurnStatus
from app.pool.lease import Lease
from app.pool.manager import AgentManager
from app.ports import AgentFactory, Clock, SessionStore
from app.services.admission import Admission
from app.services.compaction import Compactor
from app.services.departure import Boarding, Departure
from app.services.holds import Holds
from app.services.landing import Airborne, CheckpointPlan, Landing
from app.services.ownership import Manners, Ownership, Patience
from app.services.turns import Flight, FlightState, Turns

_log = logging.getLogger(__name__)


class Conductor:
    """Carries turns out. ``compactor`` is asked after each whether the session has become too long.

    ``note_commit`` is told how many seconds each commit took.
    """

    def __init__(
        self,
        store: SessionStore,
        factory: AgentFactory,
        pool: AgentManager,
        turns: Turns,
        admission: Admission,
        compactor: Compactor,
        clock: Clock,
        ownership: Ownership | None = None,
        *,
        boot_id: str,
        turn_timeout_s: float = 300.0,
        checkpoints: CheckpointPlan | None = None,
        note_commit: Callable[[float], None] | None = None,
    ) -> None:
        self._store = store
        self._factory = factory
        self._pool = pool
        self._turns = turns
        self._admission = admission
        self._ownership = ownership or Ownership()
        self._holds = Holds(pool, turns, self._ownership)
        self._compactor = compactor
        self._clock = clock
        self._boot_id = boot_id
        self._turn_timeout_s = turn_timeout_s
        self._tasks = TaskOwner("turns")
        self._waiting_elsewhere: dict[Flight, None] = {}
        self._landing = Landing(store, clock, self._tasks, checkpoints, note_commit)

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
            patience = self._ownership.patience()
            while not await self._try(flight, departure, patience):
                # In line again, behind whoever has come meanwhile; what was meant may be gone by now.
                departure = replace(departure, seek=None)
        except KeyTaken as error:
            flight.refuse(self._ownership.referral(error))
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
            self._ownership.forget(flight.key, flight.turn_id)
            self._turns.end(flight)

    async def _try(self, flight: Flight, departure: Departure, patience: Patience) -> bool:
        """Carry the turn out; or wait until another process gives its session back, and return ``False``."""
        interrupts = None if patience.has_interrupted else departure.interrupts
        try:
            async with self._pool.lease(
                flight.key,
                user=departure.user,
                turn_id=flight.turn_id,
                may_wait=departure.may_wait,
                front=departure.interrupts is not None,
                on_entered=partial(self._holds.make_way, flight.key, interrupts, flight.turn_id),
            ) as lease:
                flight.state = FlightState.BOARDING
                try:
                    air = await self._take_off(flight, lease, departure)
                except BaseException:
                    await self._ownership.give_back(flight.key, flight.turn_id)
                    raise
                await self._fly(air)
                return True
        except LeasedElsewhere as busy:
            await self._wait_elsewhere(busy, flight, departure, patience)
            return False

    async def _wait_elsewhere(
        self, busy: LeasedElsewhere, flight: Flight, departure: Departure, patience: Patience
    ) -> None:
        """Wait in no queue of this process, since nobody here has the session: no place is held meanwhile."""
        flight.stand_in_line()
        waiting = sum(f.state is FlightState.ACCEPTED for f in self._turns.of_session(flight.key))
        if self._pool.stats().draining:
            raise Draining(session_id=flight.key.session_id, retry_after_s=1)
        if waiting > self._pool.limits.queue_depth:
            raise TurnQueueFull(session_id=flight.key.session_id, retry_after_s=1)
        self._waiting_elsewhere[flight] = None
        try:
            manners = Manners(departure.may_wait, departure.interrupts)
            await self._ownership.wait_for(busy, flight.key, manners, patience)
        finally:
            del self._waiting_elsewhere[flight]

    def begin_drain(self) -> None:
        """Refuse the turns that wait for other processes; the pool refuses those that wait here."""
        for flight in self._waiting_elsewhere:
            flight.cancel(CancelReason.DRAIN, keep_partial=False)

    def _ensure_ended(self, flight: Flight) -> None:
        if flight.state is not FlightState.ENDED:
            flight.refuse(Draining(retry_after_s=1))
            self._turns.end(flight)

    async def _take_off(self, flight: Flight, lease: Lease, departure: Departure) -> Airborne:
        """Bring record and agent up to date, and note that the turn runs, once the session is ours.

        What this process saw of the session last will do, since the start of the turn compares it
        with what is stored. Whatever it would be refused for is looked at afresh.
        """
        session, is_fresh = await self._look_up(flight, lease)
        while True:
            try:
                boarding = await self._find_place(session, departure)
            except AgentPoolError:
                if is_fresh:
                    lease.give_back()  # the agent has not been touched
                    raise
                session, is_fresh = await self._find(flight, departure), True
                continue
            try:
                boarding = await self._choose(flight, boarding, departure)
                await lease.fit(boarding.place)
                air = self._to_airborne(flight, lease, boarding, departure)
                moved = await self._record_start(air)
            except LeasedElsewhere:
                lease.give_back()
                raise
            except SessionNotFound:
                if is_fresh or departure.seek is None:
                    raise
                session, is_fresh = await self._find(flight, departure), True
            except SnapshotUnreadable:
                if is_fresh:
                    raise
                stored = await self._find(flight, departure)
                await self._check_kept(session, stored)
                session, is_fresh = stored, True
            else:
                if moved is None:
                    return air
                await self._check_kept(boarding.session, moved)
                session, is_fresh = moved, True

    async def _look_up(self, flight: Flight, lease: Lease) -> tuple[Session, bool]:
        """Return the session, and whether that is how it is stored now."""
        known = self._store.recall_session(flight.key)
        if lease.record is None and known is not None and known.uid == flight.uid:
            return known, False
        session = lease.record or await self._store.find_session(flight.key)
        if session is None or session.uid != flight.uid:
            raise SessionNotFound(session_id=flight.key.session_id)
        seen = lease.agent.stamp
        if self._ownership.is_shared and seen.uid == session.uid and seen.head != session.head:
            await self._check_kept(replace(session, head=seen.head), session)
        return session, True

    async def _find(self, flight: Flight, departure: Departure) -> Session:
        """Return the session as it is stored now; if it was made anew meanwhile, that one."""
        session = await self._store.find_session(flight.key)
        if departure.seek is not None and (session is None or session.uid != flight.uid):
            session = await departure.seek()
            flight.uid = session.uid
        if session is None or session.uid != flight.uid:
            raise SessionNotFound(session_id=flight.key.session_id)
        return session

    async def _check_kept(self, seen: Session, stored: Session) -> None:
        """Refuse to go on where a turn is gone that was committed: the store has lost its last writes.

        Raises:
            HeadMoved
        """
        if seen.head is None or seen.head == stored.head:
            return
        try:
            await self._store.get_turn(stored, seen.head)
        except TurnNotFound:
            _log.error("session %r has lost turn %s", stored.key.session_id, seen.head)
            raise HeadMoved(
                "The store has lost the newest turns of this session.", session_id=stored.key.session_id
            ) from None

    async def _choose(self, flight: Flight, boarding: Boarding, departure: Departure) -> Boarding:
        """Store what the turn chooses, which sticks to the session."""
        session, chosen = boarding.session, departure.choices
        if (change := chosen.change_of(session)) is None:
            return boarding
        # What fitted when the turn came may not fit any more.
        self._admission.check(session, agent_id=chosen.agent_id, provider=chosen.provider, model=chosen.model)
        await self._ownership.take(flight.key, flight.turn_id, flight.oust)
        session = await self._store.update_session(flight.key, change, self._clock.now_ms())
        return await self._find_place(session, departure)

    async def _find_place(self, session: Session, departure: Departure) -> Boarding:
        """Return where the turn continues.

        Raises:
            SessionArchived, SessionExpired, HeadMoved: it may not.
            TurnNotFound: there is no such turn, or it was never committed.
        """
        self._admission.require_open(session)
        self._admission.require_head(session, departure.expected_head)
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

    async def _fly(self, air: Airborne) -> None:
        flight, turn = air.flight, air.turn
        flight.turn = turn
        flight.state = FlightState.RUNNING
        agent = air.lease.agent
        # Before the watchers are woken, so that the model is asked before they are answered. It
        # has not begun yet when "started" is logged.
        body = self._tasks.spawn(agent.run(turn.input, flight.emit), f"body {turn.turn_id}", is_awaited=True)
        flight.log.append(_started(turn, air.session))
        if not await flight.settle(agent, body, self._turn_timeout_s):
            _log.error("turn %s ignores its cancellation and keeps its place until it ends", turn.turn_id)
        if flight.is_ousted:
            await self._landing.fail(air, HeadMoved(), DiscardCause.CONFLICT)
        elif flight.cancel_reason is not None:
            await self._landing.cut_short(air)
        elif flight.has_timed_out:
            await self._landing.fail(air, TurnTimeout(), DiscardCause.DEADLINE)
        elif (error := _error_of(body)) is not None:
            await self._landing.fail(air, error, DiscardCause.ERROR)
        else:
            committed = await self._landing.finish(air, body.result())
            if committed is not None and self._compactor.is_automatic:
                self._compactor.consider(committed, agent.estimated_tokens)

    async def _record_start(self, air: Airborne) -> Session | None:
        """Store the start record; what may have been stored is ended before the turn is refused.

        If the session is not as it was thought to be, nothing is stored and it is returned.
        """
        flight = air.flight
        try:
            moved = await self._store.start_turn(air.session, air.turn)
            self._ownership.keep(flight.key, flight.turn_id, flight.oust)
            return moved
        except asyncio.CancelledError:
            await self._landing.record_dropped(air)
            raise
        except StoreUnavailable as refusal:
            if refusal.outcome_unknown:
                air.flight.state = FlightState.COMMITTING
                await self._landing.record_refused(air, refusal)
            raise

    def _to_airborne(
        self, flight: Flight, lease: Lease, boarding: Boarding, departure: Departure
    ) -> Airborne:
        session, place = boarding.session, boarding.place
        provider, model = self._factory.model_of(session)
        turn = Turn(
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
        return Airborne(flight, lease, session, turn, boarding.resets_state)


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
