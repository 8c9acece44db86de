"""One turn, from its lease to its end.

    lease -> start record -> run -> commit -> lease back -> say how it ended

The conductor is a task of its own, and the agent's body another, so that a body
that ignores its cancellation cannot hold up the rest. Whatever happens, the
terminal event is the last thing that does: who has read it finds the store and
the pool as it says.
"""

import asyncio
import logging
from dataclasses import dataclass, replace

from app.background import TaskOwner
from app.domain.errors import (
    AgentPoolError,
    Draining,
    HeadMoved,
    InternalError,
    SessionNotFound,
    StoreUnavailable,
    TurnTimeout,
)
from app.domain.events import MessageCompleted, TurnCancelled, TurnFailed, TurnFinished, TurnStarted
from app.domain.partial import keep_partial
from app.domain.session import UNSET, Session, SessionChange, Unset
from app.domain.stats import DiscardCause
from app.domain.turn import Answer, CancelReason, Turn, TurnStatus, text_of
from app.pool.lease import Lease
from app.pool.manager import AgentManager
from app.ports import AgentFactory, Clock, SessionStore
from app.services.admission import Admission
from app.services.turns import Flight, FlightState, Turns, to_turn_error

COMMIT_RETRY_S = 10.0
_COMMIT_PAUSE_S = 0.1
_RECORD_PAUSES_S = (1.0, 2.0, 5.0, 10.0, 30.0)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Departure:
    """What a turn sets out with: the words, the choices that stick, who it is for.

    ``expected_head``: the turn is refused if the session's head is another one by then.
    """

    message: str
    choices: SessionChange | None
    user: str | None
    may_wait: bool
    expected_head: str | Unset | None = UNSET


class Conductor:
    """Carries turns out."""

    def __init__(
        self,
        store: SessionStore,
        factory: AgentFactory,
        pool: AgentManager,
        turns: Turns,
        admission: Admission,
        clock: Clock,
        *,
        boot_id: str,
        turn_timeout_s: float = 300.0,
    ) -> None:
        self._store = store
        self._factory = factory
        self._pool = pool
        self._turns = turns
        self._admission = admission
        self._clock = clock
        self._boot_id = boot_id
        self._turn_timeout_s = turn_timeout_s
        self._tasks = TaskOwner("turns")

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

    # -- the turn ------------------------------------------------------------------------

    async def _conduct(self, flight: Flight, departure: Departure) -> None:
        try:
            async with self._pool.lease(
                flight.key, user=departure.user, turn_id=flight.turn_id, may_wait=departure.may_wait
            ) as lease:
                session = await self._board(flight, lease, departure)
                await self._fly(flight, lease, session, departure.message)
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

    async def _board(self, flight: Flight, lease: Lease, departure: Departure) -> Session:
        """Bring record and agent up to date, once the session is ours."""
        session = lease.record or await self._store.find_session(flight.key)
        if session is None or session.uid != flight.uid:
            raise SessionNotFound(session_id=flight.key.session_id)
        self._admission.require_open(session)
        if not isinstance(departure.expected_head, Unset) and session.head != departure.expected_head:
            raise HeadMoved(session_id=flight.key.session_id)
        if departure.choices is not None:
            session = await self._store.update_session(flight.key, departure.choices, self._clock.now_ms())
        await lease.fit(session)
        return session

    async def _fly(self, flight: Flight, lease: Lease, session: Session, message: str) -> None:
        agent = lease.agent
        turn = flight.turn = self._start_record(flight, lease, session, message)
        try:
            await self._store.start_turn(session, turn)
        except asyncio.CancelledError:
            # It may have been stored, but nobody has heard of this turn: refused, not ended.
            await self._record(session, self._dropped(flight, turn))
            raise
        except StoreUnavailable as refusal:
            if refusal.outcome_unknown:
                flight.state = FlightState.COMMITTING
                await self._record(session, self._failed(flight, turn, refusal))
            raise
        flight.state = FlightState.RUNNING
        flight.log.append(_started(turn, session))
        if flight.cancel_reason is not None:
            await self._cut_short(flight, lease, session, turn)
            return
        body = self._tasks.spawn(agent.run(message, flight.emit), f"body {turn.turn_id}", is_awaited=True)
        has_ended = await flight.settle(agent, body, self._turn_timeout_s)
        if not has_ended:
            _log.error("turn %s ignores its cancellation and keeps its place until it ends", turn.turn_id)
        if flight.cancel_reason is not None:
            await self._cut_short(flight, lease, session, turn)
        elif flight.has_timed_out:
            await self._fail(flight, lease, session, turn, TurnTimeout(), DiscardCause.DEADLINE)
        elif (error := _error_of(body)) is not None:
            await self._fail(flight, lease, session, turn, error, DiscardCause.ERROR)
        else:
            await self._finish(flight, lease, session, turn, body.result())

    def _start_record(self, flight: Flight, lease: Lease, session: Session, message: str) -> Turn:
        provider, model = self._factory.model_of(session)
        return Turn(
            turn_id=flight.turn_id,
            parent=session.head,
            depth=session.depth + 1,
            status=TurnStatus.RUNNING,
            input=message,
            agent_id=session.agent_id,
            provider=provider,
            model=model,
            activation=lease.activation,
            started_at=self._clock.now_ms(),
            boot_id=self._boot_id,
            queued_ms=max(0, round((self._clock.monotonic() - flight.accepted_at) * 1000)),
        )

    # -- how it ends ---------------------------------------------------------------------

    async def _finish(
        self, flight: Flight, lease: Lease, session: Session, turn: Turn, answer: Answer
    ) -> None:
        flight.state = FlightState.COMMITTING
        reply = text_of(answer.messages)
        flight.log.append(MessageCompleted(reply))
        turn = replace(
            self._ended(flight, turn, TurnStatus.FINISHED),
            messages=answer.messages,
            reply=reply,
            finish_reason=answer.finish_reason,
            usage=answer.usage,
        )
        committed = await self._commit(flight, lease, session, turn)
        if committed is None:
            return
        # Commit, give the agent back, and only then say "finished": a client that has read
        # it may send its next turn anywhere, and must find this one stored.
        agent = lease.agent
        agent.stamp = replace(agent.stamp, head=turn.turn_id)
        lease.give_back()
        flight.log.close(
            TurnFinished(
                reply=reply,
                finish_reason=answer.finish_reason,
                usage=answer.usage,
                head=turn.turn_id,
                message_count=committed.message_count,
                turn_count=committed.turn_count,
                queued_ms=turn.queued_ms,
                duration_ms=turn.duration_ms,
            )
        )

    async def _cut_short(self, flight: Flight, lease: Lease, session: Session, turn: Turn) -> None:
        """End a cancelled turn: keep what it produced if that is wanted, else leave no trace."""
        kept = keep_partial(turn.input, flight.log.events) if flight.is_partial_wanted else ()
        if not kept:
            await self._drop(flight, lease, session, turn)
            return
        flight.state = FlightState.COMMITTING
        turn = replace(
            self._ended(flight, turn, TurnStatus.CANCELLED),
            messages=kept,
            reply=text_of(kept),
            kept=True,
            cancel_reason=flight.cancel_reason,
        )
        committed = await self._commit(flight, lease, session, turn)
        if committed is not None:
            self._let_go(flight, lease, DiscardCause.CANCEL)
            flight.log.close(_cancelled(flight, turn.turn_id, committed.message_count))

    async def _drop(self, flight: Flight, lease: Lease, session: Session, turn: Turn) -> None:
        flight.state = FlightState.COMMITTING
        await self._record(session, self._dropped(flight, turn))
        self._let_go(flight, lease, DiscardCause.CANCEL)
        flight.log.close(_cancelled(flight, None, session.message_count, head=session.head))

    async def _fail(
        self,
        flight: Flight,
        lease: Lease,
        session: Session,
        turn: Turn,
        error: AgentPoolError,
        cause: DiscardCause,
    ) -> None:
        flight.state = FlightState.COMMITTING
        await self._record(session, self._failed(flight, turn, error))
        self._let_go(flight, lease, cause)
        flight.log.close(TurnFailed(to_turn_error(error)))

    def _dropped(self, flight: Flight, turn: Turn) -> Turn:
        reason = flight.cancel_reason or CancelReason.DRAIN
        ended = replace(self._ended(flight, turn, TurnStatus.CANCELLED), cancel_reason=reason)
        return self._with_trace(flight, ended)

    def _failed(self, flight: Flight, turn: Turn, error: AgentPoolError) -> Turn:
        shown = to_turn_error(error)
        ended = replace(self._ended(flight, turn, TurnStatus.FAILED), error=shown, reply=None)
        return self._with_trace(flight, ended)

    def _ended(self, flight: Flight, turn: Turn, status: TurnStatus) -> Turn:
        now = self._clock.now_ms()
        return replace(
            turn,
            status=status,
            finished_at=now,
            duration_ms=max(0, now - turn.started_at),
            tool_seqs=flight.log.tool_seqs(),
            last_seq=len(flight.log.events) + 1,
        )

    def _with_trace(self, flight: Flight, turn: Turn) -> Turn:
        """Add what the turn had produced; it is shown, but never on a path."""
        return replace(turn, messages=keep_partial(turn.input, flight.log.events))

    # -- the store ------------------------------------------------------------------------

    async def _commit(self, flight: Flight, lease: Lease, session: Session, turn: Turn) -> Session | None:
        """Commit the turn and return the session after it; or end the flight and return ``None``."""
        try:
            return await self._commit_surely(session, turn)
        except AgentPoolError as error:
            conflict = isinstance(error, HeadMoved | SessionNotFound)
            cause = DiscardCause.CONFLICT if conflict else DiscardCause.ERROR
            await self._fail(flight, lease, session, turn, error, cause)
            return None

    async def _commit_surely(self, session: Session, turn: Turn) -> Session:
        """Commit; while the outcome is unknown repeat it, which is safe, for up to ``COMMIT_RETRY_S``."""
        give_up_at = self._clock.monotonic() + COMMIT_RETRY_S
        is_unknown = False
        while True:
            try:
                return await self._store.commit_turn(session, turn)
            except StoreUnavailable as error:
                # Once unknown it stays so, whatever a later attempt says, until one succeeds.
                is_unknown = error.outcome_unknown = is_unknown or error.outcome_unknown
                if not is_unknown or self._clock.monotonic() >= give_up_at:
                    raise
            await asyncio.sleep(_COMMIT_PAUSE_S)

    async def _record(self, session: Session, turn: Turn) -> None:
        try:
            await self._store.record_turn(session, turn)
        except AgentPoolError as error:
            _log.error("turn %s ended as %s but is not recorded yet: %s", turn.turn_id, turn.status, error)
            self._tasks.spawn(self._record_later(session, turn), f"record {turn.turn_id}")

    async def _record_later(self, session: Session, turn: Turn) -> None:
        """Repeat until the store takes it. If the process ends first, the next start records it."""
        pauses = iter(_RECORD_PAUSES_S)
        while True:
            await asyncio.sleep(next(pauses, _RECORD_PAUSES_S[-1]))
            try:
                return await self._store.record_turn(session, turn)
            except StoreUnavailable:
                continue

    def _let_go(self, flight: Flight, lease: Lease, cause: DiscardCause) -> None:
        """Give the session back without its agent. Only now: what the store gets is in order, too."""
        body = flight.body
        if body is None or body.done():
            lease.discard(cause)
        else:
            ended = lease.abandon(cause)
            body.add_done_callback(lambda _: ended())


def _started(turn: Turn, session: Session) -> TurnStarted:
    return TurnStarted(
        session_id=session.key.session_id,
        agent_id=turn.agent_id,
        provider=turn.provider,
        model=turn.model,
        activation=turn.activation,
        created_at=turn.started_at,
    )


def _cancelled(
    flight: Flight, kept_as: str | None, message_count: int, head: str | None = None
) -> TurnCancelled:
    return TurnCancelled(
        reason=flight.cancel_reason or CancelReason.DRAIN,
        partial_kept=kept_as is not None,
        head=kept_as or head,
        message_count=message_count,
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
