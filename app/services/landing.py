"""How a turn ends: in the store, in the pool, and only then in its log.

Whoever has read the terminal event finds the store and the pool as it says. What
cannot be stored now is stored later; what may have been stored is never called lost.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from app.background import TaskOwner
from app.domain.checkpoint import AutoCheckpoint
from app.domain.errors import AgentPoolError, HeadMoved, SessionNotFound, StoreUnavailable, TurnNotFound
from app.domain.events import MessageCompleted, TurnCancelled, TurnFailed, TurnFinished
from app.domain.partial import keep_partial
from app.domain.session import Session
from app.domain.stats import DiscardCause
from app.domain.turn import Answer, CancelReason, Turn, TurnStatus, text_of
from app.pool.lease import Lease
from app.ports import Clock, NewId, SessionStore
from app.services.turns import Flight, FlightState, to_turn_error

COMMIT_RETRY_S = 10.0
_COMMIT_PAUSE_S = 0.1
_REFUSAL_WAIT_S = 0.1
_RECORD_PAUSES_S = (1.0, 2.0, 5.0, 10.0, 30.0)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Airborne:
    """A turn that has started: its flight, its lease, its session as of then, its start record.

    ``resets_state``: the session's state becomes what it was at the turn's parent.
    """

    flight: Flight
    lease: Lease
    session: Session
    turn: Turn
    resets_state: bool = False


@dataclass(frozen=True, slots=True)
class CheckpointPlan:
    """Automatic checkpoints: after each ``every`` turns of a branch; the newest ``keep`` stay."""

    every: int
    keep: int
    new_id: NewId

    def of_turn(self, turn: Turn) -> AutoCheckpoint | None:
        return AutoCheckpoint(self.new_id(), self.keep) if turn.depth % self.every == 0 else None


class Landing:
    """Ends turns. ``tasks`` owns what is left to be recorded while the store is away.

    ``note_commit`` is told how many seconds each commit took.
    """

    def __init__(
        self,
        store: SessionStore,
        clock: Clock,
        tasks: TaskOwner,
        checkpoints: CheckpointPlan | None = None,
        note_commit: Callable[[float], None] | None = None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._tasks = tasks
        self._checkpoints = checkpoints
        self._note_commit = note_commit

    async def finish(self, air: Airborne, answer: Answer) -> Session | None:
        """Commit a good turn, give its agent back, say so; return the session, ``None`` if it failed."""
        flight = air.flight
        flight.state = FlightState.COMMITTING
        reply = text_of(answer.messages)
        flight.log.append(MessageCompleted(reply))
        turn = self._ended(
            air,
            TurnStatus.FINISHED,
            messages=answer.messages,
            reply=reply,
            finish_reason=answer.finish_reason,
            usage=answer.usage,
        )
        committed = await self._commit(air, turn)
        if committed is None:
            return None
        # Commit, give the agent back, and only then say "finished": a client that has read
        # it may send its next turn anywhere, and must find this one stored.
        agent = air.lease.agent
        agent.stamp = replace(agent.stamp, head=turn.turn_id)
        air.lease.give_back()
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
        return committed

    async def cut_short(self, air: Airborne) -> None:
        """End a cancelled turn: keep what it produced if that is wanted, else leave no trace."""
        flight = air.flight
        kept = keep_partial(air.turn.input, flight.log.events) if flight.is_partial_wanted else ()
        flight.state = FlightState.COMMITTING
        if not kept:
            await self.record_dropped(air)
            self._let_go(air, DiscardCause.CANCEL)
            flight.log.close(_cancelled(air, None, air.session.message_count))
            return
        turn = self._ended(
            air,
            TurnStatus.CANCELLED,
            messages=kept,
            reply=text_of(kept),
            kept=True,
            cancel_reason=flight.cancel_reason,
        )
        committed = await self._commit(air, turn)
        if committed is not None:
            self._let_go(air, DiscardCause.CANCEL)
            flight.log.close(_cancelled(air, turn.turn_id, committed.message_count))

    async def fail(self, air: Airborne, error: AgentPoolError, cause: DiscardCause) -> None:
        """Record a turn that went wrong; its session is as it was before."""
        air.flight.state = FlightState.COMMITTING
        await self.record_failed(air, error)
        self._let_go(air, cause)
        air.flight.log.close(TurnFailed(to_turn_error(error)))

    async def record_dropped(self, air: Airborne) -> None:
        """Record a cancelled turn of which nothing is kept; later, if the store does not answer."""
        reason = air.flight.cancel_reason or CancelReason.DRAIN
        await self._record(air, self._ended(air, TurnStatus.CANCELLED, cancel_reason=reason))

    async def record_failed(self, air: Airborne, error: AgentPoolError) -> None:
        """Record a failed turn; later, if the store does not answer."""
        await self._record(air, self._ended(air, TurnStatus.FAILED, error=to_turn_error(error)))

    async def record_refused(self, air: Airborne, error: StoreUnavailable) -> None:
        """Record as failed a turn that may have been noted as running; later, if the store does not answer.

        It is given little time: it has just let the turn's client wait.
        """
        turn = self._ended(air, TurnStatus.FAILED, error=to_turn_error(error))
        recording = self._begin_recording(air, turn, at_once=True)
        if recording is not None:
            await asyncio.wait({recording}, timeout=_REFUSAL_WAIT_S)

    def _ended(self, air: Airborne, status: TurnStatus, **outcome: Any) -> Turn:
        now, log = max(self._clock.now_ms(), air.turn.started_at), air.flight.log
        return replace(
            air.turn,
            status=status,
            finished_at=now,
            duration_ms=now - air.turn.started_at,
            tool_seqs=log.tool_seqs(),
            last_seq=len(log.events) + 1,
            **outcome,
        )

    async def _commit(self, air: Airborne, turn: Turn) -> Session | None:
        """Commit the turn and return the session after it; or fail the turn and return ``None``."""
        began = self._clock.monotonic()
        try:
            committed = await self._commit_surely(air, turn)
            if self._note_commit is not None:
                self._note_commit(self._clock.monotonic() - began)
            return committed
        except AgentPoolError as error:
            conflict = isinstance(error, HeadMoved | SessionNotFound)
            await self.fail(air, error, DiscardCause.CONFLICT if conflict else DiscardCause.ERROR)
            return None

    async def _commit_surely(self, air: Airborne, turn: Turn) -> Session:
        """Commit; while the outcome is unknown repeat it, which is safe, for up to ``COMMIT_RETRY_S``."""
        checkpoint = self._checkpoints.of_turn(turn) if self._checkpoints is not None else None
        give_up_at = self._clock.monotonic() + COMMIT_RETRY_S
        is_unknown = False
        while True:
            try:
                return await self._store.commit_turn(
                    air.session, turn, resets_state=air.resets_state, checkpoint=checkpoint
                )
            except StoreUnavailable as error:
                # Once unknown it stays so, whatever a later attempt says, until one succeeds.
                is_unknown = error.outcome_unknown = is_unknown or error.outcome_unknown
                if not is_unknown or self._clock.monotonic() >= give_up_at:
                    raise
            await asyncio.sleep(_COMMIT_PAUSE_S)

    async def _record(self, air: Airborne, turn: Turn) -> None:
        # What it had produced is shown with it, but is never on a path.
        turn = replace(turn, messages=keep_partial(turn.input, air.flight.log.events))
        try:
            await self._store_record(air.session, turn)
        except AgentPoolError as error:
            _log.error("turn %s ended as %s but is not recorded yet: %s", turn.turn_id, turn.status, error)
            self._begin_recording(air, turn)

    def _begin_recording(
        self, air: Airborne, turn: Turn, *, at_once: bool = False
    ) -> asyncio.Task[None] | None:
        pauses = (0.0, *_RECORD_PAUSES_S) if at_once else _RECORD_PAUSES_S
        try:
            return self._tasks.spawn(self._record_later(air.session, turn, pauses), f"record {turn.turn_id}")
        except RuntimeError:
            return None  # the server stops: the next start records it

    async def _record_later(self, session: Session, turn: Turn, pauses_s: Sequence[float]) -> None:
        """Repeat until the store takes it. If the process ends first, the next start records it."""
        pauses = iter(pauses_s)
        while True:
            await asyncio.sleep(next(pauses, _RECORD_PAUSES_S[-1]))
            try:
                return await self._store_record(session, turn)
            except StoreUnavailable:
                continue

    async def _store_record(self, session: Session, turn: Turn) -> None:
        """Record the turn; beside the root, if a store that came back older has lost what it stood on."""
        if self._store.leases is not None and turn.parent is not None:
            try:
                await self._store.get_turn(session, turn.parent)
            except TurnNotFound:
                turn = replace(turn, parent=None, depth=1)
        await self._store.record_turn(session, turn)

    def _let_go(self, air: Airborne, cause: DiscardCause) -> None:
        """Give the session back without its agent. Only now: what the store gets is in order, too."""
        body = air.flight.body
        if body is None or body.done():
            air.lease.discard(cause)
        else:
            ended = air.lease.abandon(cause)
            body.add_done_callback(lambda _: ended())


def _cancelled(air: Airborne, kept_as: str | None, message_count: int) -> TurnCancelled:
    return TurnCancelled(
        reason=air.flight.cancel_reason or CancelReason.DRAIN,
        partial_kept=kept_as is not None,
        head=kept_as or air.session.head,
        message_count=message_count,
    )
