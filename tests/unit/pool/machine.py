"""Random life of a ``PoolTable``, against a model that is too simple to be wrong.

The model is one list of waiting tickets per session, in the order in which they must be
served, and the set of what the shell still owes the table (loads, timers, zombies).
"""

from collections.abc import Iterable

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from app.domain.errors import (
    AgentPoolError,
    Draining,
    PoolExhausted,
    SessionBusy,
    StoreUnavailable,
    TurnQueueFull,
)
from app.domain.ids import SessionKey
from app.domain.session import Stamp
from app.domain.stats import DiscardCause, EvictionCause
from app.pool.effects import AwaitRoom, Dropped, Effect, Granted, Load, Refused
from app.pool.limits import PoolLimits
from app.pool.slot import Slot, SlotState, Ticket, TicketKind, TicketState
from app.pool.table import PoolTable
from tests.fakes import FakeAgent
from tests.unit.pool.invariants import check_table

KEYS = [SessionKey("", f"s{number}") for number in range(4)]
USERS = [None, "ann", "bob"]
IDLE_TTL_S = 10.0
pick = st.integers(0, 30)


class TableMachine(RuleBasedStateMachine):
    table_class: type[PoolTable] = PoolTable

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.line: dict[SessionKey, list[Ticket]] = {key: [] for key in KEYS}
        self.owners: dict[SessionKey, Ticket] = {}
        self.tickets: list[Ticket] = []
        self.slots: list[Slot] = []
        self.loads: list[Slot] = []
        self.timers: list[tuple[Slot, int]] = []
        self.fronts: set[Ticket] = set()
        self.zombies: list[Ticket] = []
        self.built = 0
        self.dropped = 0
        self.refused = 0

    @initialize(places=st.sampled_from((1, 1, 2, 3)), room=st.integers(0, 2), depth=st.integers(0, 3))
    def start(self, places: int, room: int, depth: int) -> None:
        self.table = self.table_class(
            PoolLimits(max_instances=places, capacity_queue=room, queue_depth=depth, idle_ttl_s=IDLE_TTL_S)
        )

    # -- what callers do

    @rule(
        key=st.sampled_from(KEYS),
        user=st.sampled_from(USERS),
        front=st.booleans(),
        may_wait=st.sampled_from((True, True, True, False)),
    )
    def enter(self, key: SessionKey, user: str | None, front: bool, may_wait: bool) -> None:
        self._enter(Ticket(key, TicketKind.TURN, user=user, turn_id=str(len(self.tickets))), front, may_wait)

    @rule(key=st.sampled_from(KEYS), front=st.booleans())
    def hold(self, key: SessionKey, front: bool) -> None:
        self._enter(Ticket(key, TicketKind.HOLD), front, True)

    def _enter(self, ticket: Ticket, front: bool, may_wait: bool) -> None:
        line = self.line[ticket.key]
        expected = list(line)
        line.insert(0, ticket) if front else line.append(ticket)
        try:
            effects = self.table.enter(ticket, may_wait=may_wait, front=front)
        except (Draining, SessionBusy, TurnQueueFull, PoolExhausted) as error:
            self.line[ticket.key] = expected
            self._check_refusal(ticket, error, front, may_wait)
            return
        self.tickets.append(ticket)
        if front:
            self.fronts.add(ticket)
        assert len([t for t in line if t not in self.fronts]) <= self.table.limits.queue_depth + 2
        self._apply(effects)

    def _check_refusal(self, ticket: Ticket, error: AgentPoolError, front: bool, may_wait: bool) -> None:
        self.refused += 1
        assert ticket.slot is None
        is_in_use = ticket.key in self.owners or bool(self.line[ticket.key])
        match error:
            case Draining():
                assert self.table.is_draining
                assert ticket.kind is TicketKind.TURN
            case SessionBusy():
                assert not may_wait
                assert is_in_use
            case TurnQueueFull():
                assert not front or ticket.kind is TicketKind.TURN
                assert is_in_use
            case PoolExhausted():
                assert not is_in_use
                assert len(self.table.room_queue) >= self.table.limits.capacity_queue

    @rule(key=st.sampled_from(KEYS), user=st.sampled_from(USERS), ends=st.booleans())
    def turn_begins(self, key: SessionKey, user: str | None, ends: bool) -> None:
        """A turn whose load takes no time, so that lives get somewhere; maybe it ends at once, too."""
        self.enter(key, user, front=False, may_wait=True)
        for slot in [slot for slot in self.loads if slot.key == key]:
            self.loaded(self.loads.index(slot), size=10, is_new=False)
        if ends and key in self.owners:
            self.release(list(self.owners).index(key), None)

    @precondition(lambda self: self.table.room_queue)
    @rule(index=pick)
    def a_wait_for_room_is_interrupted(self, index: int) -> None:
        """A hold at the front ends a wait for room; the turn behind it waits anew."""
        key = self.table.room_queue[index % len(self.table.room_queue)].key
        self.hold(key, front=True)
        self.release(list(self.owners).index(key), None)

    @precondition(lambda self: any(self.line.values()))
    @rule(index=pick)
    def leave(self, index: int) -> None:
        waiting = [ticket for line in self.line.values() for ticket in line]
        self._leave(waiting[index % len(waiting)])

    @precondition(lambda self: self.tickets)
    @rule(index=pick)
    def leave_any(self, index: int) -> None:
        """A ticket may leave at any time: in the moment of its grant, or long after its end."""
        self._leave(self.tickets[-1 - index % len(self.tickets)])

    def _leave(self, ticket: Ticket) -> None:
        self._forget(ticket)
        self._apply(self.table.leave(ticket, self.now))

    @precondition(lambda self: self.tickets)
    @rule(index=pick, cause=st.sampled_from((None, None, *DiscardCause)))
    def release_any(self, index: int, cause: DiscardCause | None) -> None:
        """Mostly a stale or a double release."""
        ticket = self.tickets[-1 - index % len(self.tickets)]
        was_owner = self.owners.get(ticket.key) is ticket
        if was_owner:
            self._forget(ticket)
        before = _photo(self.table)
        effects = self.table.release(ticket, self.now, cause)
        if not was_owner:
            assert effects == []
            assert _photo(self.table) == before, "a stale release changed something"
        self._apply(effects)

    @precondition(lambda self: self.owners)
    @rule(index=pick, cause=st.sampled_from((None, None, None, DiscardCause.ERROR)))
    def release(self, index: int, cause: DiscardCause | None) -> None:
        ticket = list(self.owners.values())[index % len(self.owners)]
        self._forget(ticket)
        effects = self.table.release(ticket, self.now, cause)
        if cause is not None and ticket.kind is TicketKind.TURN:
            assert effects[:1] == [Dropped(ticket.key, cause)], "an agent that may be wrong was kept"
        self._apply(effects)

    @precondition(lambda self: self._turns())
    @rule(index=pick)
    def abandon(self, index: int) -> None:
        turns = self._turns()
        ticket = turns[index % len(turns)]
        self._forget(ticket)
        self.zombies.append(ticket)
        self._apply(self.table.abandon(ticket, DiscardCause.DEADLINE))
        assert self.table.abandon(ticket, DiscardCause.DEADLINE) == []

    @precondition(lambda self: self.zombies)
    @rule(index=pick)
    def zombie_ended(self, index: int) -> None:
        zombie = self.zombies.pop(index % len(self.zombies))
        self._apply(self.table.zombie_ended(zombie))
        assert self.table.zombie_ended(zombie) == []

    def _turns(self) -> list[Ticket]:
        return [ticket for ticket in self.owners.values() if ticket.kind is TicketKind.TURN]

    # -- what the shell reports

    @precondition(lambda self: self.loads)
    @rule(index=pick, size=st.integers(1, 1000), is_new=st.booleans())
    def loaded(self, index: int, size: int, is_new: bool) -> None:
        slot = self.loads.pop(index % len(self.loads))
        agent = FakeAgent(Stamp(None if is_new else "t1", None, 1, 1), estimated_bytes=size)
        self.built += 1
        self._apply(self.table.loaded(slot, agent, None, self.now))

    @precondition(lambda self: self.loads)
    @rule(index=pick)
    def load_failed(self, index: int) -> None:
        slot = self.loads.pop(index % len(self.loads))
        error = StoreUnavailable()
        self._apply(self.table.load_failed(slot, error))
        assert not [ticket for ticket in slot.waiters if ticket.kind is TicketKind.TURN]

    @precondition(lambda self: self.timers)
    @rule(index=pick)
    def room_wait_over(self, index: int) -> None:
        """A timer fires once, maybe long after its slot has got room or is gone."""
        slot, number = self.timers.pop(index % len(self.timers))
        was_due = slot in self.table.room_queue and slot.waits_for_room == number
        effects = self.table.room_wait_over(slot, number)
        assert was_due or not effects
        self._apply(effects)
        assert not was_due or slot not in self.table.room_queue

    @precondition(lambda self: self.tickets)
    @rule(index=pick)
    def queue_wait_over(self, index: int) -> None:
        """A waiter is refused for it unless it is the first in line for an agent on its way."""
        ticket = self.tickets[-1 - index % len(self.tickets)]
        line = self.line[ticket.key]
        is_due = ticket in line and (ticket.key in self.owners or line[0] is not ticket)
        effects = self.table.queue_wait_over(ticket)
        assert effects == ([Refused(ticket)] if is_due else [])
        self._apply(effects)

    @rule(seconds=st.sampled_from((0.5, 1.0, IDLE_TTL_S)))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    # -- what sweeps, operators and shutdown do

    @rule()
    def sweep(self) -> None:
        self._apply(self.table.sweep(self.now))
        assert all(self.now - slot.last_used < IDLE_TTL_S for slot in self.table.idle.values())

    @precondition(lambda self: self.slots)
    @rule(indexes=st.lists(pick, max_size=3))
    def evict(self, indexes: list[int]) -> None:
        """An operator may name any slot that ever was."""
        victims = [self.slots[-1 - index % len(self.slots)] for index in indexes]
        due = {slot.key for slot in victims if any(slot is idle for idle in self.table.idle.values())}
        effects = self.table.evict(victims, EvictionCause.ADMIN)
        assert {e.key for e in effects if isinstance(e, Dropped)} == due
        self._apply(effects)

    @precondition(lambda self: len(self.tickets) > 12)
    @rule()
    def begin_drain(self) -> None:
        self._apply(self.table.begin_drain())
        assert self.table.begin_drain() == []

    # -- the model

    def _forget(self, ticket: Ticket) -> None:
        if self.owners.get(ticket.key) is ticket:
            del self.owners[ticket.key]
        elif ticket in self.line[ticket.key]:
            self.line[ticket.key].remove(ticket)

    def _apply(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Granted(ticket):
                    assert self.line[ticket.key][0] is ticket, "not the first in line"
                    assert ticket.key not in self.owners, "two owners"
                    self.owners[ticket.key] = self.line[ticket.key].pop(0)
                case Refused(ticket):
                    assert ticket.error is not None
                    assert ticket.state is TicketState.DONE
                    self.line[ticket.key].remove(ticket)
                    self.refused += not isinstance(ticket.error, StoreUnavailable)
                case Load(slot):
                    assert slot not in self.loads, "two loads of one slot"
                    assert slot.key not in {other.key for other in self.loads}, "two loads of one session"
                    self.loads.append(slot)
                case AwaitRoom(slot, number):
                    self.timers.append((slot, number))
                case Dropped():
                    self.dropped += 1

    @invariant()
    def everything_adds_up(self) -> None:
        table = self.table
        check_table(table)
        self.slots += [slot for slot in table.slots.values() if slot not in self.slots]
        assert {key: slot.owner for key, slot in table.slots.items() if slot.owner} == self.owners
        lines = {key: list(slot.waiters) for key, slot in table.slots.items() if slot.waiters}
        assert lines == {key: line for key, line in self.line.items() if line}
        loading = [slot for slot in table.slots.values() if slot.state is SlotState.LOADING]
        assert {id(slot) for slot in loading} == {id(slot) for slot in self.loads}
        due = {(id(slot), number) for slot, number in self.timers}
        assert all((id(slot), slot.waits_for_room) in due for slot in table.room_queue)
        assert table.zombies == set(self.zombies)
        self._statistics_balance()

    def _statistics_balance(self) -> None:
        stats = self.table.stats()
        live = sum(slot.agent is not None for slot in self.table.slots.values())
        assert sum(stats.evictions.values()) + sum(stats.discards.values()) == self.dropped
        assert self.built == self.dropped + live
        assert sum(stats.rejections.values()) == self.refused

    def teardown(self) -> None:
        """Whatever has happened, everything can come to its end."""
        if not hasattr(self, "table"):
            return
        self._apply(self.table.begin_drain())
        while self.owners or self.loads or self.zombies:
            for ticket in list(self.owners.values()):
                self._forget(ticket)
                self._apply(self.table.release(ticket, self.now))
            while self.loads:
                self.load_failed(0)
            if self.zombies:
                self.zombie_ended(0)
            self.everything_adds_up()
        self._apply(self.table.evict(list(self.table.idle.values()), EvictionCause.DRAIN))
        self.everything_adds_up()
        assert not self.table.slots
        assert not self.table.room_queue
        assert self.table.places == 0
        assert not any(self.line.values()), "a ticket was lost"


def _photo(table: PoolTable) -> tuple:
    slots = [(s.key, s.state, s.owner, tuple(s.waiters), s.agent, s.last_used) for s in table.slots.values()]
    return slots, list(table.idle), list(table.room_queue), table.stats()
