"""What is true of a ``PoolTable`` between any two calls, recounted from scratch."""

from collections import Counter

from app.pool.slot import Slot, SlotState, TicketKind, TicketState
from app.pool.table import PoolTable

_PLACES = (SlotState.LOADING, SlotState.IDLE, SlotState.BUSY)


def check_table(table: PoolTable) -> None:
    """Raise ``AssertionError`` for the first thing that is not as it must be."""
    for key, slot in table.slots.items():
        assert slot.key == key
        _check_slot(slot)
    _check_containers(table)
    _check_tickets(table)
    _check_counters(table)


def _check_slot(slot: Slot) -> None:
    assert (slot.agent is not None) == (slot.state in (SlotState.IDLE, SlotState.BUSY)), slot
    assert (slot.owner is not None) == (slot.state in (SlotState.BUSY, SlotState.HELD)), slot
    if slot.owner is not None:
        kind = TicketKind.TURN if slot.state is SlotState.BUSY else TicketKind.HOLD
        assert slot.owner.kind is kind, slot
        assert slot.owner.state is TicketState.GRANTED, slot
        assert slot.owner.slot is slot, slot
    if slot.state is SlotState.IDLE:
        assert not slot.waiters, f"somebody waits for an idle agent: {slot}"
    if slot.state is SlotState.WAITING:
        assert slot.waiters, slot
        assert slot.waiters[0].kind is TicketKind.TURN, slot


def _check_containers(table: PoolTable) -> None:
    slots = table.slots.values()
    assert {id(s) for s in table.idle.values()} == {id(s) for s in slots if s.state is SlotState.IDLE}
    assert all(slot.key == key for key, slot in table.idle.items())
    used = [slot.last_used for slot in table.idle.values()]
    assert used == sorted(used), "the idle list is not in the order of use"
    waiting = Counter(id(s) for s in table.room_queue)
    assert waiting == Counter(id(s) for s in slots if s.state is SlotState.WAITING)
    if table.room_queue:
        assert table.places == table.limits.max_instances, "a place is free and somebody waits for room"
        assert not table.idle, "an agent is idle and somebody waits for room"
    assert len(table.room_queue) <= table.limits.capacity_queue


def _check_tickets(table: PoolTable) -> None:
    seen = set()
    for slot in table.slots.values():
        for ticket in slot.waiters:
            assert ticket not in seen, f"{ticket} waits twice"
            seen.add(ticket)
            assert ticket.state is TicketState.WAITING, slot
            assert ticket.slot is slot, slot
            assert ticket.key == slot.key, slot
    assert table.stats().waiting == len(seen)


def _check_counters(table: PoolTable) -> None:
    stats = table.stats()
    slots = list(table.slots.values())
    states = Counter(slot.state for slot in slots)
    assert stats.active == states[SlotState.BUSY]
    assert stats.idle == states[SlotState.IDLE]
    assert stats.activating == states[SlotState.LOADING]
    assert stats.zombies == len(table.zombies)
    places = sum(states[state] for state in _PLACES) + len(table.zombies)
    assert table.places == stats.total == places <= table.limits.max_instances
    assert +table._states == states
    assert stats.estimated_bytes == sum(slot.agent_bytes for slot in slots)
    for slot in slots:
        if slot.state is not SlotState.BUSY:  # the turn makes it grow; it is weighed at the end
            assert slot.agent_bytes == (slot.agent.estimated_bytes if slot.agent else 0), slot
    works = [slot.user for slot in slots if slot.state in (SlotState.LOADING, SlotState.BUSY)]
    assert table._working_by_user == Counter(user for user in works if user is not None)
