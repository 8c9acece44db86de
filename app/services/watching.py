"""Turns in flight as others see them: watch one, list them, end them; also those of other nodes."""

from app.domain.chat import ActiveTurns
from app.domain.errors import NoActiveTurn, RunsElsewhere, TurnNotFound
from app.domain.ids import SessionKey
from app.domain.lease import Node
from app.domain.replay import Numbered, replay
from app.domain.session import Session
from app.domain.turn import CancelOrder, CancelReason, Turn, TurnStatus
from app.pool.manager import AgentManager
from app.ports import SessionStore
from app.services.admission import Admission
from app.services.ownership import Ownership
from app.services.turn_log import TurnLog
from app.services.turns import Flight, Turns


class TurnWatching:
    """The part of ``ChatService`` for those who did not begin the turn.

    A turn of another node cannot be watched here: ``RunsElsewhere`` names that node.
    """

    def __init__(
        self,
        store: SessionStore,
        admission: Admission,
        pool: AgentManager,
        turns: Turns,
        ownership: Ownership,
    ) -> None:
        self._store = store
        self._admission = admission
        self._pool = pool
        self._turns = turns
        self._ownership = ownership

    async def watch(
        self, key: SessionKey, turn_id: str, user_id: str | None = None, *, after: int = 0
    ) -> Flight | TurnLog | list[Numbered]:
        """Return the turn in flight, or the log of one that ended lately, or what is stored behind ``after``.

        The caller watches a flight until ``Flight.leave``.

        Raises:
            SessionNotFound, TurnNotFound; and what the turn was refused with while it waited.
            RunsElsewhere: another node has it in flight.
        """
        session = await self._admission.get(key, user_id)
        flight = self._turns.find(session, turn_id)
        if flight is not None:
            return await self._join(flight)
        log = self._turns.find_log(session, turn_id)
        if log is not None:
            return log
        return replay(await self._find_turn(session, turn_id), key.session_id, after)

    async def active(self, key: SessionKey, user_id: str | None = None) -> ActiveTurns:
        """Return the turns in flight.

        Raises:
            SessionNotFound, NoActiveTurn
        """
        session = await self._admission.get(key, user_id)
        running = self._turns.get(self._pool.owner_of(session.key))
        turn = running.turn if running is not None else None
        waiting = list(self._pool.waiting_of(session.key))
        if running is not None and turn is None:  # it has the lease, and is about to start
            waiting.insert(0, running.turn_id)
        accepted = (f.turn_id for f in self._turns.of_session(session.key) if f is not running)
        waiting += [turn_id for turn_id in accepted if turn_id not in waiting]  # about to stand in line
        if self._ownership.is_shared:
            running_id, others = await self._ownership.turns_elsewhere(session.key)
            waiting += others
            turn = turn or await self._find_running(session, running_id)
        if turn is None and not waiting:
            raise NoActiveTurn(session_id=key.session_id)
        return ActiveTurns(turn, tuple(waiting))

    async def cancel(
        self,
        key: SessionKey,
        *,
        turn_id: str | None = None,
        keep_partial: bool = True,
        all_turns: bool = False,
        user_id: str | None = None,
    ) -> str:
        """Cancel the running turn, a named one, or all; return the id of the (first) one concerned.

        Raises:
            SessionNotFound, NoActiveTurn
            TurnNotFound: ``turn_id`` names no turn of this session.
            NodeUnreachable: it is another node's, which does not answer.
        """
        session = await self._admission.get(key, user_id)
        order = CancelOrder(CancelReason.USER, keep_partial, turn_id, all_turns)
        asked: tuple[str, ...] = ()
        if turn_id is not None or all_turns or not self._may_run_elsewhere(session.key):
            asked = self._turns.cancel(session.key, order)
        if not asked or all_turns:
            asked += await self._ownership.cancel(session.key, order)
        asked = asked or self._turns.cancel(session.key, order)
        if asked:
            return asked[0]
        if turn_id is not None and not all_turns:
            await self._store.get_turn(session, turn_id)  # TurnNotFound if it never was
        raise NoActiveTurn(session_id=key.session_id)

    async def find_successor(self) -> Node | None:
        """Return the node that takes the turns that this one, which drains, takes no more."""
        return await self._ownership.find_successor()

    def turns_here(self, key: SessionKey) -> tuple[str, ...]:
        """Return the session's turns that this process has in flight, the running one first."""
        return tuple(flight.turn_id for flight in self._turns.of_session(key))

    def cancel_here(self, key: SessionKey, order: CancelOrder) -> tuple[str, ...]:
        """End turns that this process has in flight; return which were asked."""
        return self._turns.cancel(key, order)

    def _may_run_elsewhere(self, key: SessionKey) -> bool:
        """Say whether all that is in flight here may be waiting for another node's turn."""
        flights = self._turns.of_session(key)
        return self._ownership.is_shared and not any(
            self._ownership.has(key, flight.turn_id) for flight in flights
        )

    async def _join(self, flight: Flight) -> Flight:
        flight.join()
        try:
            await flight.wait_started()
        except BaseException:
            flight.leave()
            raise
        return flight

    async def _find_turn(self, session: Session, turn_id: str) -> Turn:
        """Return the turn as it is stored, once it has ended."""
        try:
            turn = await self._store.get_turn(session, turn_id)
            if turn.status is not TurnStatus.RUNNING:
                return turn
        except TurnNotFound:
            await self._refer(session, turn_id)
            raise
        await self._refer(session, turn_id)
        await self._ownership.end_abandoned()
        return await self._store.get_turn(session, turn_id)

    async def _refer(self, session: Session, turn_id: str) -> None:
        node = await self._ownership.locate(session.key, turn_id)
        if node is not None:
            raise RunsElsewhere(node, session_id=session.key.session_id, turn_id=turn_id)

    async def _find_running(self, session: Session, turn_id: str | None) -> Turn | None:
        if turn_id is None:
            return None
        try:
            turn = await self._store.get_turn(session, turn_id)
        except TurnNotFound:
            return None
        return turn if turn.status is TurnStatus.RUNNING else None
