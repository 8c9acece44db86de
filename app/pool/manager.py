"""The asynchronous shell of the pool: it does what the table decided.

Only two things wait here: a caller for its ticket, and a task of the pool for
the load of an agent. Everything else is a plain call into the table and the
effects that it returned, carried out before anybody else runs.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar

from app.background import TaskOwner
from app.domain.errors import AgentPoolError, InternalError, LeaseReentered, StoreUnavailable
from app.domain.ids import SessionKey
from app.domain.stats import DiscardCause, EvictionCause, LiveSession, LiveStatus, PoolStats, SweepResult
from app.pool.effects import AwaitRoom, Dropped, Effect, Granted, Load, Refused
from app.pool.eviction import pick_expired, pick_idle_for, pick_oldest
from app.pool.lease import Lease
from app.pool.limits import PoolLimits
from app.pool.live import Activator
from app.pool.slot import Slot, SlotState, Ticket, TicketKind, TicketState
from app.pool.table import PoolTable
from app.ports import AgentFactory, Clock, PoolObserver, SessionStore

_entered: ContextVar[frozenset[Ticket]] = ContextVar("agentpool_entered", default=frozenset())
_QUEUE_WAIT_AGAIN_S = 1.0
_LIVE_STATUS = {
    SlotState.IDLE: LiveStatus.IDLE,
    SlotState.BUSY: LiveStatus.BUSY,
    SlotState.LOADING: LiveStatus.ACTIVATING,
}


class AgentManager:
    """Keeps one live agent per session, at most ``limits.max_instances`` of them.

    A session is used through ``lease`` (for a turn) or ``hold`` (without an agent);
    either is exclusive, and callers are served in the order in which they came.
    Belongs to the event loop that it is first used on.
    """

    def __init__(
        self,
        store: SessionStore,
        factory: AgentFactory,
        limits: PoolLimits,
        clock: Clock,
        observer: PoolObserver | None = None,
    ) -> None:
        self._activator = Activator(store, factory)
        self._table = PoolTable(limits)
        self._clock = clock
        self._observer = observer
        self._tasks = TaskOwner("pool")
        self._futures: dict[Ticket, asyncio.Future[None]] = {}

    @property
    def limits(self) -> PoolLimits:
        return self._table.limits

    @asynccontextmanager
    async def lease(
        self,
        key: SessionKey,
        *,
        user: str | None = None,
        turn_id: str | None = None,
        may_wait: bool = True,
        front: bool = False,
        on_entered: Callable[[], None] | None = None,
    ) -> AsyncIterator[Lease]:
        """Hold the session's live agent for one turn, activating it if need be.

        Waits for earlier turns of the session (``queue_wait_s``) and for a place
        (``capacity_wait_s``); with ``front`` before all turns that wait, unless a hold is next,
        after which nothing may be as it was. ``on_entered`` is called once it is in line, before
        anybody else runs. When cancelled while it waits, the claim is gone; leaving the block
        without ``give_back`` discards the agent.

        Raises:
            SessionBusy: a turn runs and ``may_wait`` is false.
            TurnQueueFull, PoolExhausted, Draining: no lease within the bounds.
            LeaseReentered: called from inside a turn or a hold of the same session.
            SessionNotFound, SnapshotUnreadable, StoreUnavailable, …: the activation failed.
        """
        ticket = Ticket(key, TicketKind.TURN, user=user, turn_id=turn_id)
        front = front and not self._is_hold_next(key)
        await self._claim(ticket, may_wait=may_wait, front=front, on_entered=on_entered)
        lease = self._to_lease(ticket)
        try:
            with _inside(ticket):
                yield lease
        finally:
            lease.discard(DiscardCause.ERROR)

    async def acquire(
        self, key: SessionKey, *, user: str | None = None, turn_id: str | None = None, may_wait: bool = True
    ) -> Lease:
        """Return a lease that the caller must end itself; ``lease`` says what is promised."""
        ticket = Ticket(key, TicketKind.TURN, user=user, turn_id=turn_id)
        await self._claim(ticket, may_wait=may_wait)
        return self._to_lease(ticket)

    @asynccontextmanager
    async def hold(
        self,
        key: SessionKey,
        *,
        may_wait: bool = True,
        front: bool = False,
        on_entered: Callable[[], None] | None = None,
    ) -> AsyncIterator[None]:
        """Have the session to oneself, without an agent; a live one that is idle is dropped.

        ``front``: before every turn that waits, and without ``queue_wait_s``: whoever asks for
        that has seen to it that the running turn ends. ``may_wait`` and ``on_entered`` are as for
        ``lease``, and it raises as that does.
        """
        ticket = Ticket(key, TicketKind.HOLD)
        await self._claim(ticket, may_wait=may_wait, front=front, on_entered=on_entered)
        try:
            with _inside(ticket):
                yield
        finally:
            self._release(ticket, None)

    def owner_of(self, key: SessionKey) -> str | None:
        """Return the id of the turn that has the session's lease now."""
        slot = self._table.slots.get(key)
        return slot.owner.turn_id if slot is not None and slot.owner is not None else None

    def waiting_of(self, key: SessionKey) -> tuple[str, ...]:
        """Return the ids of the turns that wait for the session, the next one first."""
        slot = self._table.slots.get(key)
        return tuple(t.turn_id for t in slot.waiters if t.turn_id is not None) if slot is not None else ()

    def is_live(self, key: SessionKey) -> bool:
        """Whether the session has a live agent now."""
        slot = self._table.slots.get(key)
        return slot is not None and slot.agent is not None

    def live_count(self) -> int:
        """How many places are taken, in O(1)."""
        return self._table.places

    def stats(self) -> PoolStats:
        """Return the counters, in O(1)."""
        return self._table.stats()

    def note_rejection(self, error: AgentPoolError) -> None:
        """Count a refusal of somebody who did not get as far as the pool."""
        self._table.reject(error)

    def live_sessions(self) -> list[LiveSession]:
        """Return every session that holds a place, in no order."""
        now = self._clock.monotonic()
        return [self._describe(s, now) for s in self._table.slots.values() if s.state in _LIVE_STATUS]

    def evict(self, key: SessionKey) -> bool:
        """Drop the session's agent if it is idle; say whether it was."""
        slot = self._table.idle.get(key)
        if slot is None:
            return False
        self._carry_out(self._table.evict([slot], EvictionCause.ADMIN))
        return True

    def sweep(self, *, dry_run: bool = False) -> SweepResult:
        """Evict every agent whose idle time is over, or only count them; costs O(those)."""
        return self._clean(self._pick_expired(), EvictionCause.TTL, dry_run=dry_run)

    def cleanup_idle(self, idle_s: float, *, dry_run: bool = False) -> SweepResult:
        """Evict what has been idle for ``idle_s`` or longer."""
        victims = pick_idle_for(self._table.idle, self._clock.monotonic(), idle_s)
        return self._clean(victims, EvictionCause.ADMIN, dry_run=dry_run)

    def cleanup_oldest(self, count: int, *, dry_run: bool = False) -> SweepResult:
        """Evict the ``count`` least recently used idle agents."""
        return self._clean(pick_oldest(self._table.idle, count), EvictionCause.ADMIN, dry_run=dry_run)

    def begin_drain(self) -> None:
        """Grant no more leases; running turns go on, waiting ones are refused."""
        self._carry_out(self._table.begin_drain())

    async def close(self) -> None:
        """Drain, drop every idle agent and end the loads. May be called twice."""
        self.begin_drain()
        await self._tasks.close()
        # A load that was cancelled before its first step, or ignores it, has not reported.
        for slot in [s for s in self._table.slots.values() if s.state is SlotState.LOADING]:
            self._carry_out(self._table.load_failed(slot, InternalError("the pool is closed")))
        self._carry_out(self._table.evict(list(self._table.idle.values()), EvictionCause.DRAIN))

    # -- waiting --------------------------------------------------------------------------

    async def _claim(
        self,
        ticket: Ticket,
        *,
        may_wait: bool = True,
        front: bool = False,
        on_entered: Callable[[], None] | None = None,
    ) -> None:
        if any(t.key == ticket.key and t.state is TicketState.GRANTED for t in _entered.get()):
            raise LeaseReentered(session_id=ticket.key.session_id)
        self._carry_out(self._table.enter(ticket, may_wait=may_wait, front=front))
        if on_entered is not None:
            on_entered()
        if ticket.state is TicketState.WAITING:
            await self._wait(ticket, has_limit=not front or ticket.kind is TicketKind.TURN)
        if ticket.error is not None:
            raise ticket.error.with_traceback(None)

    async def _wait(self, ticket: Ticket, *, has_limit: bool) -> None:
        # No await since the ticket was entered: nobody can have granted it in between.
        loop = asyncio.get_running_loop()
        future = self._futures[ticket] = loop.create_future()
        too_long = None
        if has_limit:
            too_long = loop.call_later(self.limits.queue_wait_s, self._queue_wait_over, ticket)
        try:
            await future
        except BaseException:
            # Also when it has been granted in the same tick: then it is passed on, not lost.
            self._carry_out(self._table.leave(ticket, self._clock.monotonic()))
            raise
        finally:
            if too_long is not None:
                too_long.cancel()
            del self._futures[ticket]

    def _is_hold_next(self, key: SessionKey) -> bool:
        slot = self._table.slots.get(key)
        return slot is not None and bool(slot.waiters) and slot.waiters[0].kind is TicketKind.HOLD

    def _to_lease(self, ticket: Ticket) -> Lease:
        assert ticket.slot is not None
        return Lease(ticket, ticket.slot, self._activator, self._release, self._abandon)

    # -- doing what the table decided --------------------------------------------------------

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Granted(ticket) | Refused(ticket):
                    future = self._futures.get(ticket)
                    if future is not None and not future.done():
                        future.set_result(None)
                case Load(slot):
                    self._start_load(slot)
                case AwaitRoom(slot, wait_number):
                    asyncio.get_running_loop().call_later(
                        self.limits.capacity_wait_s, self._room_wait_over, slot, wait_number
                    )
                case Dropped(key, cause):
                    self._report(key, cause)

    def _start_load(self, slot: Slot) -> None:
        try:
            self._tasks.spawn(self._load(slot), f"load {slot.key.session_id}")
        except RuntimeError:  # closed
            self._carry_out(self._table.load_failed(slot, InternalError("the pool is closed")))

    async def _load(self, slot: Slot) -> None:
        try:
            async with asyncio.timeout(self.limits.activation_timeout_s):
                agent, record = await self._activator.activate(slot.key)
                slot.choice = self._activator.choice_of(record)
        except AgentPoolError as error:
            self._carry_out(self._table.load_failed(slot, error))
        except TimeoutError:
            self._carry_out(
                self._table.load_failed(slot, StoreUnavailable("Loading the session took too long."))
            )
        except BaseException:
            self._carry_out(self._table.load_failed(slot, InternalError()))
            raise
        else:
            self._carry_out(self._table.loaded(slot, agent, record, self._clock.monotonic()))

    def _queue_wait_over(self, ticket: Ticket) -> None:
        self._carry_out(self._table.queue_wait_over(ticket))
        if ticket.state is TicketState.WAITING:
            # First in line for an agent on its way, it was spared; it may be overtaken yet.
            wait_s = max(self.limits.queue_wait_s, _QUEUE_WAIT_AGAIN_S)
            asyncio.get_running_loop().call_later(wait_s, self._queue_wait_over, ticket)

    def _room_wait_over(self, slot: Slot, wait_number: int) -> None:
        self._carry_out(self._table.room_wait_over(slot, wait_number))

    def _release(self, ticket: Ticket, cause: DiscardCause | None) -> None:
        self._carry_out(self._table.release(ticket, self._clock.monotonic(), cause))

    def _abandon(self, ticket: Ticket, cause: DiscardCause) -> Callable[[], None]:
        if self._observer is not None:
            self._observer.zombie_appeared(ticket.key)
        self._carry_out(self._table.abandon(ticket, cause))
        return lambda: self._carry_out(self._table.zombie_ended(ticket))

    def _report(self, key: SessionKey, cause: EvictionCause | DiscardCause) -> None:
        if self._observer is None:
            return
        if isinstance(cause, EvictionCause):
            self._observer.evicted(key, cause)
        else:
            self._observer.discarded(key, cause)

    def _pick_expired(self) -> list[Slot]:
        return pick_expired(self._table.idle, self._clock.monotonic(), self.limits.idle_ttl_s)

    def _clean(self, victims: Iterable[Slot], cause: EvictionCause, *, dry_run: bool) -> SweepResult:
        chosen = list(victims)
        stats = self._table.stats()
        if not dry_run:
            self._carry_out(self._table.evict(chosen, cause))
        return SweepResult(
            examined=stats.idle,
            removed=len(chosen),
            skipped_busy=stats.active + stats.activating,
            remaining=stats.total - len(chosen),
        )

    def _describe(self, slot: Slot, now: float) -> LiveSession:
        agent_id, provider, model = slot.choice or (None, None, None)
        return LiveSession(
            owner=slot.key.owner,
            session_id=slot.key.session_id,
            user_id=slot.user,
            agent_id=agent_id,
            status=_LIVE_STATUS[slot.state],
            idle_s=slot.idle_s(now),
            age_s=now - slot.agent_since if slot.agent else 0.0,
            turns=slot.turns,
            estimated_bytes=slot.agent_bytes,
            provider=provider,
            model=model,
        )


@contextmanager
def _inside(ticket: Ticket) -> Iterator[None]:
    """Mark what runs in the block, and every task that it starts, as inside this claim.

    Not undone with a token: a block may be left in another context than it was entered in.
    """
    _entered.set(_entered.get() | {ticket})
    try:
        yield
    finally:
        _entered.set(_entered.get() - {ticket})
