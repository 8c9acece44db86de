"""Every arrow of a slot's life, one at a time."""

import pytest

from app.domain.errors import SessionBusy, StoreUnavailable, TurnQueueFull
from app.domain.stats import DiscardCause, EvictionCause
from app.pool.effects import AwaitRoom, Dropped, Granted, Load, Refused
from app.pool.slot import SlotState, TicketState
from tests.unit.pool.bench import Pool, agent, hold, key_of, turn
from tests.unit.pool.invariants import check_table

# -- ABSENT and ACTIVATING


def test_first_turn_of_a_session_starts_a_load_in_a_place_of_its_own():
    """A turn of an absent session takes a place and has the agent loaded."""
    pool, ticket = Pool(), turn()
    effects = pool.enter(ticket)
    assert effects == [Load(pool.slot())]
    assert (pool.state(), pool.table.places, ticket.state) == (SlotState.LOADING, 1, TicketState.WAITING)


def test_one_load_however_many_wait():
    """Turns that come while the agent is loaded do not load it again."""
    pool = Pool()
    pool.enter(turn())
    assert pool.enter(turn()) == pool.enter(turn()) == []
    assert pool.table.stats().misses == 1


def test_sessions_load_side_by_side():
    """The load of one session does not wait for that of another."""
    pool = Pool()
    assert [type(e) for name in "abc" for e in pool.enter(turn(name))] == [Load, Load, Load]


def test_a_loaded_agent_goes_to_the_first_in_line():
    """Who came first is granted the agent; the others go on waiting."""
    pool, first, second = Pool(), turn(), turn()
    pool.enter(first)
    pool.enter(second)
    assert pool.load() == [Granted(first)]
    assert (pool.state(), pool.slot().owner) == (SlotState.BUSY, first)
    assert not first.is_warm
    assert second.state is TicketState.WAITING


def test_a_loaded_agent_nobody_waits_for_is_idle():
    """If all have left, the load ends all the same and its agent is there for the next turn."""
    pool, ticket = Pool(), turn()
    pool.enter(ticket)
    assert pool.table.leave(ticket, 0.0) == []
    assert pool.load() == []
    assert pool.state() is SlotState.IDLE


def test_a_failed_load_refuses_every_turn_that_waits_and_frees_the_place():
    """After a failed load every waiter has the typed error and the session is absent."""
    pool, tickets, error = Pool(), [turn() for _ in range(4)], StoreUnavailable()
    for ticket in tickets:
        pool.enter(ticket)
    assert pool.table.load_failed(pool.slot(), error) == [Refused(ticket) for ticket in tickets]
    check_table(pool.table)
    assert {ticket.error for ticket in tickets} == {error}
    assert (pool.state(), pool.table.places) == (None, 0)


def test_a_failed_load_hands_its_place_to_who_waits_for_room():
    """A place that a failed load gives back is not lost."""
    pool = Pool(max_instances=1)
    pool.enter(turn("a"))
    pool.enter(turn("b"))
    slot = pool.slot("b")
    assert pool.table.load_failed(pool.slot("a"), StoreUnavailable())[1:] == [Load(slot)]
    check_table(pool.table)


def test_a_hold_gets_a_session_whose_load_failed():
    """A session that cannot be read can still be had without an agent, to be deleted."""
    pool, first, second, third = Pool(), turn(), hold(), turn()
    for ticket in (first, second, third):
        pool.enter(ticket)
    effects = pool.table.load_failed(pool.slot(), StoreUnavailable())
    check_table(pool.table)
    assert effects == [Refused(first), Refused(third), Granted(second)]
    assert (pool.state(), pool.table.places) == (SlotState.HELD, 0)


# -- IDLE


def test_an_idle_agent_is_leased_in_the_same_call():
    """An idle agent leaves the idle list in the very call that leases it: eviction cannot see it."""
    pool, ticket = Pool(), turn()
    pool.idle()
    assert pool.enter(ticket) == [Granted(ticket)]
    assert (pool.state(), ticket.is_warm, len(pool.table.idle)) == (SlotState.BUSY, True, 0)
    assert pool.table.stats().hits == 1


@pytest.mark.parametrize("cause", list(EvictionCause))
def test_an_evicted_session_is_absent_and_the_cause_is_counted(cause):
    """Eviction removes the slot, gives its place back and counts why."""
    pool = Pool()
    pool.idle()
    assert pool.table.evict([pool.slot()], cause) == [Dropped(key_of("a"), cause)]
    check_table(pool.table)
    assert (pool.state(), pool.table.places) == (None, 0)
    assert pool.table.stats().evictions[cause] == 1


def test_only_idle_agents_can_be_evicted():
    """Evicting a slot that is busy, loading, held or waiting does nothing."""
    pool = Pool(max_instances=2)
    pool.busy("a")
    pool.enter(turn("b"))
    pool.enter(turn("c"))
    pool.enter(hold("d"))
    victims = list(pool.table.slots.values())
    assert len({slot.state for slot in victims}) == 4
    assert pool.table.evict(victims, EvictionCause.ADMIN) == []
    check_table(pool.table)


def test_evicting_a_slot_that_is_gone_spares_its_successor():
    """A victim is meant by identity: a new slot of the same session is left alone."""
    pool = Pool()
    pool.idle()
    old = pool.slot()
    pool.table.evict([old], EvictionCause.ADMIN)
    pool.idle()
    assert pool.table.evict([old], EvictionCause.ADMIN) == []
    check_table(pool.table)
    assert pool.enter(turn()) != []


def test_evicting_one_slot_twice_in_a_call_counts_once():
    """A sweep that names a victim twice drops it once."""
    pool = Pool()
    pool.idle()
    slot = pool.slot()
    assert len(pool.table.evict([slot, slot], EvictionCause.ADMIN)) == 1


# -- BUSY


def test_a_committed_turn_hands_over_to_the_next_in_line():
    """Release gives the session to the next waiter in the same call, first come, first served."""
    pool, waiting = Pool(), [turn() for _ in range(3)]
    owner = pool.busy()
    for ticket in waiting:
        pool.enter(ticket)
    for ticket in waiting:
        assert pool.release(owner) == [Granted(ticket)]
        owner = ticket
        assert owner.is_warm


def test_a_committed_turn_without_successor_leaves_an_idle_agent():
    """After the last turn the agent is idle, at the recently used end, from this moment on."""
    pool = Pool()
    pool.idle("a", now=1.0)
    pool.idle("b", now=2.0)
    again = turn("a")
    pool.enter(again)
    pool.release(again, 3.0)
    assert [slot.key.session_id for slot in pool.table.idle.values()] == ["b", "a"]
    assert (pool.slot().last_used, pool.slot().turns) == (3.0, 2)


@pytest.mark.parametrize("cause", list(DiscardCause))
def test_a_turn_that_went_wrong_discards_its_agent(cause):
    """After any other end than a commit the agent is gone and the cause is counted."""
    pool = Pool()
    owner = pool.busy()
    assert pool.release(owner, 0.0, cause) == [Dropped(key_of("a"), cause)]
    assert (pool.state(), pool.table.places) == (None, 0)
    assert pool.table.stats().discards[cause] == 1


def test_the_successor_of_a_discard_activates_afresh_in_the_same_place():
    """The next waiter after a discard gets a new agent without queueing for room."""
    pool, second = Pool(max_instances=1), turn()
    owner = pool.busy("a")
    pool.enter(second)
    pool.enter(turn("b"))
    assert pool.release(owner, 0.0, DiscardCause.ERROR)[1:] == [Load(pool.slot())]
    assert pool.load() == [Granted(second)]
    assert not second.is_warm


def test_a_busy_session_names_its_turn_when_it_refuses():
    """A turn that may not wait is refused with the id of the turn that runs."""
    pool = Pool()
    pool.busy()
    with pytest.raises(SessionBusy) as refused:
        pool.enter(turn(), may_wait=False)
    assert refused.value.turn_id == "turn-a"
    assert pool.table.stats().waiting == 0


def test_a_turn_that_may_not_wait_joins_a_load_that_nobody_waits_for():
    """A load that everybody has left is no running turn, so nobody is refused for it."""
    pool, ticket = Pool(), turn()
    pool.enter(ticket)
    pool.table.leave(ticket, 0.0)
    second = turn()
    assert pool.enter(second, may_wait=False) == []
    assert pool.load() == [Granted(second)]


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_queue_depth_is_exact(depth):
    """Exactly ``queue_depth`` turns wait behind a running one; the next is refused."""
    pool = Pool(queue_depth=depth)
    pool.busy()
    for _ in range(depth):
        pool.enter(turn())
    with pytest.raises(TurnQueueFull):
        pool.enter(turn())
    assert pool.table.stats().waiting == depth


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_the_first_in_line_for_a_load_does_not_count_as_waiting(depth):
    """While the agent is loaded one turn more may wait: the first one waits for no turn."""
    pool = Pool(queue_depth=depth)
    for _ in range(depth + 1):
        pool.enter(turn())
    with pytest.raises(TurnQueueFull):
        pool.enter(turn())


def test_turns_at_the_front_have_a_limit_of_their_own():
    """Turns at the front are taken up to twice the depth and one; a hold at the front always."""
    pool = Pool(queue_depth=2)
    pool.busy()
    for _ in range(5):
        pool.enter(turn(), front=True)
    with pytest.raises(TurnQueueFull):
        pool.enter(turn(), front=True)
    assert pool.enter(hold(), front=True) == []


def test_the_front_is_before_all_and_exempt_from_the_depth():
    """An interrupting turn is served before those that wait, also when the queue is full."""
    pool, waiting, urgent = Pool(queue_depth=1), turn(), turn()
    owner = pool.busy()
    pool.enter(waiting)
    pool.enter(urgent, front=True)
    assert pool.release(owner) == [Granted(urgent)]
    assert pool.release(urgent) == [Granted(waiting)]


# -- leaving


def test_a_waiter_that_leaves_takes_itself_out():
    """A waiter in the middle that leaves changes nothing for those before and after it."""
    pool, first, middle, last = Pool(), turn(), turn(), turn()
    owner = pool.busy()
    for ticket in (first, middle, last):
        pool.enter(ticket)
    assert pool.table.leave(middle, 0.0) == []
    check_table(pool.table)
    assert pool.release(owner) == [Granted(first)]
    assert pool.release(first) == [Granted(last)]


def test_a_granted_waiter_that_leaves_passes_the_grant_on():
    """A grant that its waiter cannot use any more goes to the next in line, the agent with it."""
    pool, second, third = Pool(), turn(), turn()
    owner = pool.busy()
    pool.enter(second)
    pool.enter(third)
    pool.release(owner)
    assert pool.table.leave(second, 0.0) == [Granted(third)]
    check_table(pool.table)
    assert pool.table.stats().discards[DiscardCause.CANCEL] == 0
    assert pool.slot().turns == 1


def test_leaving_twice_does_nothing():
    """A ticket that is done can leave again without effect."""
    pool, ticket = Pool(), turn()
    pool.busy()
    pool.enter(ticket)
    pool.table.leave(ticket, 0.0)
    assert pool.table.leave(ticket, 0.0) == []
    check_table(pool.table)
    assert pool.table.leave(turn("never-entered"), 0.0) == []


def test_a_second_release_does_nothing():
    """Releasing again, with or without a cause, frees nobody."""
    pool, second = Pool(), turn()
    owner = pool.busy()
    pool.enter(second)
    pool.release(owner)
    assert pool.release(owner) == pool.release(owner, 0.0, DiscardCause.ERROR) == []
    assert pool.slot().owner is second


def test_a_ticket_of_an_earlier_slot_frees_nobody():
    """A late release cannot end a turn in a new slot of the same session."""
    pool = Pool()
    first = pool.busy()
    pool.release(first, 0.0, DiscardCause.ERROR)
    second = pool.busy()
    assert pool.release(first) == []
    assert pool.slot().owner is second


# -- zombies


def test_a_zombie_keeps_its_place_and_leaves_the_map():
    """A body that ignores its cancellation is counted, off the map, and still in its place."""
    pool = Pool(max_instances=1)
    owner = pool.busy()
    assert pool.table.abandon(owner, DiscardCause.DEADLINE) == [Dropped(key_of("a"), DiscardCause.DEADLINE)]
    check_table(pool.table)
    assert (pool.state(), len(pool.table.zombies), pool.table.places) == (None, 1, 1)
    assert isinstance(pool.enter(turn("b"))[0], AwaitRoom)
    slot = pool.slot("b")
    assert pool.table.zombie_ended(owner) == [Load(slot)]
    check_table(pool.table)


def test_the_session_of_a_zombie_goes_on_in_another_place():
    """The next turn of the session does not wait for the zombie."""
    pool, second = Pool(max_instances=2), turn()
    owner = pool.busy()
    pool.enter(second)
    assert pool.table.abandon(owner, DiscardCause.CANCEL)[1:] == [Load(pool.slot())]
    check_table(pool.table)
    assert pool.table.places == 2
    assert pool.load() == [Granted(second)]
    assert pool.table.zombie_ended(owner) == []
    assert pool.release(owner) == []


def test_the_session_of_a_zombie_waits_for_room_where_there_is_none():
    """Where no other place is free, the next turn of the session queues for room."""
    pool, second = Pool(max_instances=1), turn()
    owner = pool.busy()
    pool.enter(second)
    assert pool.table.abandon(owner, DiscardCause.CANCEL)[1:] == [AwaitRoom(pool.slot(), 1)]
    check_table(pool.table)
    assert pool.table.zombie_ended(owner) == [Load(pool.slot())]


def test_abandoning_twice_makes_one_zombie():
    """A turn that is over cannot be abandoned."""
    pool = Pool()
    owner = pool.busy()
    pool.table.abandon(owner, DiscardCause.DEADLINE)
    assert pool.table.abandon(owner, DiscardCause.DEADLINE) == []
    assert pool.table.zombies == {owner}


def test_a_ticket_that_waits_too_long_for_others_is_refused():
    """When its time is over, a ticket behind others is refused and those behind it move up."""
    pool, second, third = Pool(), turn(), turn()
    owner = pool.busy()
    pool.enter(second)
    pool.enter(third)
    assert pool.table.queue_wait_over(second) == [Refused(second)]
    check_table(pool.table)
    assert isinstance(second.error, TurnQueueFull)
    assert pool.release(owner) == [Granted(third)]
    assert pool.table.queue_wait_over(third) == pool.table.queue_wait_over(second) == []


def test_the_first_in_line_for_an_agent_on_its_way_waits_for_nobody():
    """The wait for a load or for room has bounds of its own: the queue's bound does not end it."""
    pool, loading, homeless = Pool(max_instances=1), turn("a"), turn("b")
    pool.enter(loading)
    pool.enter(homeless)
    assert pool.table.queue_wait_over(loading) == pool.table.queue_wait_over(homeless) == []
    behind = turn("a")
    pool.enter(behind)
    assert pool.table.queue_wait_over(behind) == [Refused(behind)]


def test_an_answer_to_a_load_that_is_over_changes_nothing():
    """A load reports once: an agent or an error that comes later is thrown away."""
    pool = Pool()
    pool.enter(turn())
    slot = pool.slot()
    pool.table.load_failed(slot, StoreUnavailable())
    assert pool.table.loaded(slot, agent(), None, 0.0) == []
    assert pool.table.load_failed(slot, StoreUnavailable()) == []
    check_table(pool.table)
    assert pool.table.places == 0
