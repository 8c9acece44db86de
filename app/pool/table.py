"""Who is live, who is leased, who must go: decided here, without waiting.

Every method is a plain ``def``. On one event loop that makes each call atomic:
no other task can see the table half-changed. A method never does the slow work
it decides on; it returns it as effects and leaves them to ``AgentManager``.

True between any two calls:

* a session owns at most one slot, and a slot has at most one owner;
* a slot is in ``idle`` if and only if it is IDLE, so a busy one is never a victim;
* slots LOADING, IDLE and BUSY and the zombies together are at most ``max_instances``;
* a ticket that waits is in the queue of exactly one slot;
* if slots wait for room, no place is free and no agent is idle;
* a slot that waits for room has a turn at the front of its queue.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable

from app.domain.errors import AgentPoolError, Draining, PoolExhausted, SessionBusy, TurnQueueFull
from app.domain.ids import SessionKey
from app.domain.session import Session
from app.domain.stats import DiscardCause, EvictionCause, PoolStats
from app.pool.effects import AwaitRoom, Dropped, Effect, Granted, Load, Refused
from app.pool.eviction import IdleList, pick_expired, pick_oldest
from app.pool.limits import PoolLimits
from app.pool.slot import Slot, SlotState, Ticket, TicketKind, TicketState
from app.ports import LiveAgent

_HOLDS_PLACE = (SlotState.LOADING, SlotState.IDLE, SlotState.BUSY)
_WORKS = (SlotState.LOADING, SlotState.BUSY)


class PoolTable:
    def __init__(self, limits: PoolLimits) -> None:
        self.limits = limits
        self.slots: dict[SessionKey, Slot] = {}
        self.idle: IdleList = OrderedDict()
        self.room_queue: deque[Slot] = deque()
        self.zombies: set[Ticket] = set()
        self.is_draining = False
        self._states: Counter[SlotState] = Counter()
        self._working_by_user: Counter[str] = Counter()
        self._waiting = 0
        self._bytes = 0
        self._hits = self._misses = self._restores = 0
        self._evictions = dict.fromkeys(map(str, EvictionCause), 0)
        self._discards = dict.fromkeys(map(str, DiscardCause), 0)
        self._rejections: dict[str, int] = {}

    # -- what callers do -------------------------------------------------------------

    def enter(self, ticket: Ticket, *, may_wait: bool = True, front: bool = False) -> list[Effect]:
        """Claim a session: the ticket is granted at once, or waits.

        ``front`` puts it before all that wait; a hold then enters however many those are.

        Raises:
            Draining, SessionBusy, TurnQueueFull, PoolExhausted: refused; nothing has changed.
        """
        if self.is_draining and ticket.kind is TicketKind.TURN:
            raise self.reject(Draining(retry_after_s=1))
        slot = self.slots.get(ticket.key)
        if slot is None:
            return self._enter_absent(ticket)
        if slot.state is SlotState.IDLE:
            self._enqueue(slot, ticket)
            del self.idle[slot.key]
            return self._serve_next(slot)
        return self._enter_taken(slot, ticket, may_wait, front)

    def leave(self, ticket: Ticket, now: float) -> list[Effect]:
        """Give up a claim: a waiter goes, and one that has just been granted passes it on unused."""
        slot = ticket.slot
        if ticket.state is TicketState.GRANTED:
            return self.release(ticket, now, was_used=False)
        if ticket.state is TicketState.DONE or slot is None:
            return []
        slot.waiters.remove(ticket)
        self._done(ticket)
        if slot.state is SlotState.WAITING:
            return self._reconsider_room(slot)
        return []  # a load goes on even if nobody waits for it: the next turn will be warm

    def release(
        self, ticket: Ticket, now: float, cause: DiscardCause | None = None, *, was_used: bool = True
    ) -> list[Effect]:
        """End a grant and hand the session to the next in line.

        ``cause`` says why the agent may be wrong and must go; without it the agent
        stays. A ticket that is not the owner (any more) frees nobody.
        """
        slot = ticket.slot
        if slot is None or slot.owner is not ticket:
            return []
        slot.owner = slot.loaded_for = slot.record = None
        ticket.state = TicketState.DONE
        if ticket.kind is TicketKind.HOLD:
            return self._serve_next(slot)
        if cause is not None:
            return [*self._drop_agent(slot, cause), *self._serve_next(slot)]
        if was_used:
            slot.turns += 1
        slot.last_used = now
        self._weigh(slot)
        return self._serve_next(slot)

    def abandon(self, ticket: Ticket, cause: DiscardCause) -> list[Effect]:
        """End the grant of a turn whose body ignores its cancellation.

        The body becomes a zombie, which keeps the place until ``zombie_ended``. The
        session goes on, with a fresh agent in another place.
        """
        slot = ticket.slot
        if slot is None or slot.owner is not ticket:
            return []
        slot.owner = None
        ticket.state = TicketState.DONE
        effects = self._drop_agent(slot, cause)
        self._set_state(slot, SlotState.HELD)  # without its place, until served below
        self.zombies.add(ticket)
        return [*effects, *self._serve_next(slot)]

    def zombie_ended(self, ticket: Ticket) -> list[Effect]:
        """Give back the place that a zombie kept; the second time does nothing."""
        self.zombies.discard(ticket)
        return self._fill_room()

    # -- what the pool's own tasks and timers report ---------------------------------------

    def loaded(self, slot: Slot, agent: LiveAgent, record: Session | None, now: float) -> list[Effect]:
        """Take the agent that was built for a LOADING slot and hand it to the first in line."""
        if not self._is_loading(slot):
            return []  # the pool was closed in the meantime
        slot.agent, slot.record, slot.agent_since, slot.last_used, slot.turns = agent, record, now, now, 0
        self._weigh(slot)
        if agent.stamp.head is not None:
            self._restores += 1
        return self._serve_next(slot)

    def load_failed(self, slot: Slot, error: AgentPoolError) -> list[Effect]:
        """Tell every turn that waited; holds go on, since a session that cannot be read can be deleted."""
        if not self._is_loading(slot):
            return []
        effects = self._refuse_turns(slot, error)
        return [*effects, *self._serve_next(slot)]

    def queue_wait_over(self, ticket: Ticket) -> list[Effect]:
        """Refuse a ticket that has waited for those before it long enough.

        The first in line for an agent that is on its way waits for nobody: that wait
        has bounds of its own (``capacity_wait_s``, ``activation_timeout_s``).
        """
        slot = ticket.slot
        if ticket.state is not TicketState.WAITING or slot is None:
            return []
        if slot.owner is None and slot.waiters[0] is ticket:
            return []
        return [self._refuse(slot, ticket, TurnQueueFull("This turn waited too long for the session."))]

    def room_wait_over(self, slot: Slot, wait_number: int) -> list[Effect]:
        """Refuse the turns of a slot that has waited for room long enough."""
        if slot.state is not SlotState.WAITING or slot.waits_for_room != wait_number:
            return []
        effects = self._refuse_turns(slot, PoolExhausted(retry_after_s=self.limits.capacity_wait_s or 1))
        return [*effects, *self._reconsider_room(slot)]

    # -- what sweeps, operators and shutdown do ----------------------------------------------

    def evict(self, victims: Iterable[Slot], cause: EvictionCause) -> list[Effect]:
        """Drop the agents of these slots; those that are not IDLE (any more) are left alone."""
        effects: list[Effect] = []
        for slot in victims:
            if self.idle.get(slot.key) is slot:
                del self.idle[slot.key]
                effects += self._drop_agent(slot, cause)
                self._remove(slot)
        return effects

    def sweep(self, now: float) -> list[Effect]:
        """Evict every agent whose idle time is over; costs O(those)."""
        return self.evict(pick_expired(self.idle, now, self.limits.idle_ttl_s), EvictionCause.TTL)

    def begin_drain(self) -> list[Effect]:
        """Refuse new turns and those that wait; running ones go on. May be called twice."""
        self.is_draining = True
        effects: list[Effect] = []
        for slot in list(self.slots.values()):
            effects += self._refuse_turns(slot, Draining(retry_after_s=1))
            if slot.state is SlotState.WAITING:
                effects += self._reconsider_room(slot)
        return effects

    def stats(self) -> PoolStats:
        return PoolStats(
            active=self._states[SlotState.BUSY],
            idle=len(self.idle),
            activating=self._states[SlotState.LOADING],
            zombies=len(self.zombies),
            waiting=self._waiting,
            max_instances=self.limits.max_instances,
            idle_ttl_s=self.limits.idle_ttl_s,
            hits=self._hits,
            misses=self._misses,
            restores=self._restores,
            estimated_bytes=self._bytes,
            draining=self.is_draining,
            evictions=dict(self._evictions),
            discards=dict(self._discards),
            rejections=dict(self._rejections),
        )

    @property
    def places(self) -> int:
        """Places taken: never more than ``max_instances``."""
        return sum(self._states[state] for state in _HOLDS_PLACE) + len(self.zombies)

    # -- entering ----------------------------------------------------------------------

    def _enter_absent(self, ticket: Ticket) -> list[Effect]:
        is_turn = ticket.kind is TicketKind.TURN
        room = is_turn and self._has_room()
        if is_turn and not room and len(self.room_queue) >= self.limits.capacity_queue:
            raise self.reject(PoolExhausted(retry_after_s=self.limits.capacity_wait_s or 1))
        slot = Slot(ticket.key, ticket.user, SlotState.HELD)
        self.slots[slot.key] = slot
        self._count(slot, +1)
        self._enqueue(slot, ticket)
        if not is_turn:
            return self._grant(slot, SlotState.HELD)
        return self._take_room(slot) if room else self._queue_for_room(slot)

    def _enter_taken(self, slot: Slot, ticket: Ticket, may_wait: bool, front: bool) -> list[Effect]:
        first = slot.owner or (slot.waiters[0] if slot.waiters else None)
        if first is not None and not may_wait:
            raise self.reject(SessionBusy(turn_id=first.turn_id))
        # The first in line for an agent that is on its way is not waiting for a turn to end.
        depth = len(slot.waiters) - (0 if slot.owner else 1)
        allowed = self.limits.front_depth if front else self.limits.queue_depth
        if depth >= allowed and not (front and ticket.kind is TicketKind.HOLD):
            raise self.reject(TurnQueueFull(retry_after_s=1))
        self._enqueue(slot, ticket, front)
        if slot.state is SlotState.WAITING and slot.waiters[0].kind is TicketKind.HOLD:
            self._leave_room_queue(slot)
            return self._grant(slot, SlotState.HELD)
        return []

    def _enqueue(self, slot: Slot, ticket: Ticket, front: bool = False) -> None:
        slot.waiters.insert(0 if front else len(slot.waiters), ticket)
        ticket.slot = slot
        self._waiting += 1
        if slot.user is None and slot.state not in _WORKS:
            slot.user = ticket.user  # a hold had made the slot

    def reject(self, error: AgentPoolError) -> AgentPoolError:
        """Count a refusal and return it."""
        self._rejections[error.code] = self._rejections.get(error.code, 0) + 1
        return error

    # -- serving the queue of one session ----------------------------------------------------

    def _serve_next(self, slot: Slot) -> list[Effect]:
        """Give a slot without owner to the first in line, or put it to rest."""
        if not slot.waiters:
            return self._rest(slot)
        if slot.waiters[0].kind is TicketKind.HOLD:
            # Whoever holds a session may move its head or delete it: the agent would be wrong.
            effects = self._drop_agent(slot, DiscardCause.CONFLICT)
            return [*effects, *self._grant(slot, SlotState.HELD), *self._fill_room()]
        if slot.agent is not None:
            if slot.state is not SlotState.LOADING:
                self._hits += 1
                slot.waiters[0].is_warm = True
            return self._grant(slot, SlotState.BUSY)
        if slot.state in _HOLDS_PLACE:
            return self._load(slot)
        return self._queue_for_room(slot) if not self._has_room() else self._take_room(slot)

    def _rest(self, slot: Slot) -> list[Effect]:
        if slot.agent is not None and not self.is_draining:
            self._set_state(slot, SlotState.IDLE)
            self.idle[slot.key] = slot
            return self._fill_room()
        self._remove(slot)
        return [*self._drop_agent(slot, EvictionCause.DRAIN), *self._fill_room()]

    def _grant(self, slot: Slot, state: SlotState) -> list[Effect]:
        ticket = slot.waiters.pop(0)
        self._waiting -= 1
        ticket.state = TicketState.GRANTED
        slot.owner = ticket
        self._set_state(slot, state)
        return [Granted(ticket)]

    def _refuse_turns(self, slot: Slot, error: AgentPoolError) -> list[Effect]:
        return [self._refuse(slot, t, error) for t in list(slot.waiters) if t.kind is TicketKind.TURN]

    def _refuse(self, slot: Slot, ticket: Ticket, error: AgentPoolError) -> Effect:
        slot.waiters.remove(ticket)
        self._done(ticket)
        ticket.error = error
        if isinstance(error, Draining | PoolExhausted | TurnQueueFull):
            self.reject(error)
        return Refused(ticket)

    def _done(self, ticket: Ticket) -> None:
        ticket.state = TicketState.DONE
        self._waiting -= 1

    # -- room ----------------------------------------------------------------------------

    def _has_room(self) -> bool:
        """Whether a newcomer may take a place at once; those who wait come first."""
        return not self.room_queue and (bool(self.idle) or self.places < self.limits.max_instances)

    def _take_room(self, slot: Slot) -> list[Effect]:
        """Move a slot without a place into one that is free or that an idle agent has."""
        effects: list[Effect] = []
        if self.places >= self.limits.max_instances:
            effects = self.evict(pick_oldest(self.idle, 1), EvictionCause.LRU)
        return [*effects, *self._load(slot)]

    def _load(self, slot: Slot) -> list[Effect]:
        self._misses += 1
        slot.loaded_for = slot.waiters[0]
        self._set_state(slot, SlotState.LOADING)
        return [Load(slot)]

    def _queue_for_room(self, slot: Slot) -> list[Effect]:
        if len(self.room_queue) >= self.limits.capacity_queue:
            effects = self._refuse_turns(slot, PoolExhausted(retry_after_s=self.limits.capacity_wait_s or 1))
            return [*effects, *self._serve_next(slot)]
        slot.waits_for_room += 1
        self._set_state(slot, SlotState.WAITING)
        self.room_queue.append(slot)
        return [AwaitRoom(slot, slot.waits_for_room)]

    def _leave_room_queue(self, slot: Slot) -> None:
        self.room_queue.remove(slot)
        self._set_state(slot, SlotState.HELD)

    def _reconsider_room(self, slot: Slot) -> list[Effect]:
        """Take a slot out of the wait for room if no turn is first in its line any more."""
        if slot.waiters and slot.waiters[0].kind is TicketKind.TURN:
            return []
        self._leave_room_queue(slot)
        return self._serve_next(slot)

    def _fill_room(self) -> list[Effect]:
        """Hand free places, and those of idle agents, to the slots that wait for room."""
        effects: list[Effect] = []
        while self.room_queue and (self.places < self.limits.max_instances or self.idle):
            slot = self._next_for_room()
            self._leave_room_queue(slot)
            effects += self._take_room(slot)
        return effects

    def _next_for_room(self) -> Slot:
        """FIFO, but users who hold their share of the places come after those who do not."""
        share = self.limits.places_per_user
        for slot in self.room_queue:
            if slot.user is None or self._working_by_user[slot.user] < share:
                return slot
        return self.room_queue[0]

    # -- bookkeeping -----------------------------------------------------------------------

    def _drop_agent(self, slot: Slot, cause: EvictionCause | DiscardCause) -> list[Effect]:
        if slot.agent is None:
            return []
        slot.agent = slot.record = None
        self._weigh(slot)
        counts = self._evictions if isinstance(cause, EvictionCause) else self._discards
        counts[cause] += 1
        return [Dropped(slot.key, cause)]

    def _weigh(self, slot: Slot) -> None:
        size = slot.agent.estimated_bytes if slot.agent is not None else 0
        self._bytes += size - slot.agent_bytes
        slot.agent_bytes = size

    def _is_loading(self, slot: Slot) -> bool:
        return slot.state is SlotState.LOADING and self.slots.get(slot.key) is slot

    def _remove(self, slot: Slot) -> None:
        if self.slots.get(slot.key) is slot:
            del self.slots[slot.key]
            self._count(slot, -1)

    def _set_state(self, slot: Slot, state: SlotState) -> None:
        self._count(slot, -1)
        slot.state = state
        self._count(slot, +1)

    def _count(self, slot: Slot, step: int) -> None:
        self._states[slot.state] += step
        if slot.user is not None and slot.state in _WORKS:
            self._working_by_user[slot.user] += step
            if not self._working_by_user[slot.user]:
                del self._working_by_user[slot.user]
