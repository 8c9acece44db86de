"""Tables with one mistake each. Every mistake is one that a known system made, or that this one had."""

from app.pool.slot import SlotState, TicketState
from app.pool.table import PoolTable


class PopsTheHead(PoolTable):
    """A waiter that leaves takes out the first in line instead of itself (Dapr's actor lock)."""

    def leave(self, ticket, now):
        slot = ticket.slot
        if ticket.state is TicketState.WAITING and slot is not None:
            self._done(slot.waiters.pop(0))
            return self._reconsider_room(slot) if slot.state is SlotState.WAITING else []
        return super().leave(ticket, now)


class DropsTheGrant(PoolTable):
    """A waiter that is cancelled after its grant goes without passing it on."""

    def leave(self, ticket, now):
        return [] if ticket.state is TicketState.GRANTED else super().leave(ticket, now)


class KeepsThePoisoned(PoolTable):
    """A turn that went wrong leaves its agent to the next one."""

    def release(self, ticket, now, cause=None, **how):
        return super().release(ticket, now, None, **how)


class GivesThePlaceBackEarly(PoolTable):
    """A zombie's place is given away while it still runs."""

    def abandon(self, ticket, cause):
        effects = super().abandon(ticket, cause)
        return [*effects, *self.zombie_ended(ticket)]


class LeavesTheBusyInTheIdleList(PoolTable):
    """A leased agent can still be chosen as a victim (Ray Serve's multiplexing)."""

    def enter(self, ticket, **how):
        idle = self.idle.get(ticket.key)
        effects = super().enter(ticket, **how)
        if idle is not None and idle.state is SlotState.BUSY:
            self.idle[ticket.key] = idle
        return effects


class FreesForAnybody(PoolTable):
    """A release does not look whose turn it is."""

    def release(self, ticket, now, cause=None, **how):
        slot = ticket.slot
        owner = slot.owner if slot is not None else None
        return super().release(owner or ticket, now, cause, **how)


class ForgetsWhoWaitsForRoom(PoolTable):
    """An agent that comes to rest does not make room for those who wait."""

    def _rest(self, slot):
        fill, self._fill_room = self._fill_room, list
        try:
            return super()._rest(slot)
        finally:
            self._fill_room = fill


class EvictsByKey(PoolTable):
    """A victim is looked up by its session: its successor goes in its stead."""

    def evict(self, victims, cause):
        here = [self.idle.get(slot.key, slot) for slot in victims]
        return super().evict(here, cause)


class HearsOldTimers(PoolTable):
    """The timer of an earlier wait for room ends the present one."""

    def room_wait_over(self, slot, wait_number):
        return super().room_wait_over(slot, slot.waits_for_room)


class LeavesWaitersBehind(PoolTable):
    """A failed load tells only the first in line."""

    def load_failed(self, slot, error):
        rest = list(slot.waiters)[1:]
        for ticket in rest:
            slot.waiters.remove(ticket)
        return super().load_failed(slot, error)


class TakesOneTooMany(PoolTable):
    """A newcomer takes a place when none is free and none is idle."""

    def _has_room(self):
        return not self.room_queue


MUTANTS = (
    PopsTheHead,
    DropsTheGrant,
    KeepsThePoisoned,
    GivesThePlaceBackEarly,
    LeavesTheBusyInTheIdleList,
    FreesForAnybody,
    ForgetsWhoWaitsForRoom,
    EvictsByKey,
    HearsOldTimers,
    LeavesWaitersBehind,
    TakesOneTooMany,
)
