"""Room: whose place a newcomer gets, who waits for one, and whose turn it is."""

import pytest

from app.domain.errors import PoolExhausted
from app.domain.stats import EvictionCause
from app.pool.effects import AwaitRoom, Dropped, Granted, Load, Refused
from app.pool.limits import PoolLimits
from app.pool.slot import SlotState
from tests.unit.pool.bench import Pool, fill_with, hold, key_of, turn
from tests.unit.pool.invariants import check_table

# -- room


def test_an_expired_or_oldest_idle_agent_makes_room():
    """The least recently used idle agent goes when a place is needed."""
    pool = Pool(max_instances=2)
    pool.idle("a", now=1.0)
    pool.idle("b", now=2.0)
    assert pool.enter(turn("c")) == [Dropped(key_of("a"), EvictionCause.LRU), Load(pool.slot("c"))]
    assert pool.state("b") is SlotState.IDLE


def test_a_busy_agent_makes_no_room():
    """When every agent is busy, a newcomer waits without a place and is told until when."""
    pool = Pool(max_instances=1)
    pool.busy("a")
    assert pool.enter(turn("b")) == [AwaitRoom(pool.slot("b"), 1)]
    assert (pool.state("b"), pool.table.places) == (SlotState.WAITING, 1)


def test_room_is_given_in_the_order_of_coming():
    """Sessions that wait for room get it first come, first served."""
    pool = Pool(max_instances=1)
    owner = pool.busy("a")
    for name in "bcd":
        pool.enter(turn(name))
    for name in "bcd":
        effects = pool.release(owner)
        assert effects[-1] == Load(pool.slot(name))
        pool.load(name)
        owner = pool.slot(name).owner


def test_an_agent_that_comes_to_rest_makes_room_at_once():
    """Somebody who waits for room gets the place of an agent in the call in which it becomes idle."""
    pool = Pool(max_instances=1)
    owner = pool.busy("a")
    pool.enter(turn("b"))
    assert pool.release(owner) == [Dropped(key_of("a"), EvictionCause.LRU), Load(pool.slot("b"))]


def test_the_queue_for_room_is_bounded_exactly():
    """Exactly ``capacity_queue`` sessions wait for room; the next is refused and leaves no trace."""
    pool = Pool(max_instances=1, capacity_queue=2)
    pool.busy("a")
    pool.enter(turn("b"))
    pool.enter(turn("c"))
    with pytest.raises(PoolExhausted):
        pool.enter(turn("d"))
    check_table(pool.table)
    assert pool.state("d") is None


def test_a_wait_for_room_that_is_over_refuses_its_turns():
    """After ``capacity_wait_s`` every turn of the session is refused, and the session is absent."""
    pool, first, second = Pool(max_instances=1), turn("b"), turn("b")
    pool.busy("a")
    pool.enter(first)
    pool.enter(second)
    assert pool.table.room_wait_over(pool.slot("b"), 1) == [Refused(first), Refused(second)]
    check_table(pool.table)
    assert isinstance(first.error, PoolExhausted)
    assert first.error.retry_after_s == 5.0
    assert pool.state("b") is None


def test_a_late_timer_of_an_earlier_wait_refuses_nobody():
    """The timer of a wait for room that has ended means nothing to the next one, or to a load."""
    pool = Pool(max_instances=1)
    owner = pool.busy("a")
    pool.enter(turn("b"))
    slot = pool.slot("b")
    held = hold("b")
    pool.enter(held, front=True)
    pool.release(held)
    assert pool.table.room_wait_over(slot, 1) == []
    pool.release(owner)
    assert pool.state("b") is SlotState.LOADING
    assert pool.table.room_wait_over(slot, 2) == []


def test_a_hold_survives_the_end_of_the_wait_for_room():
    """When the turns before a hold are refused for want of room, the hold is granted."""
    pool, waiting, held = Pool(max_instances=1), turn("b"), hold("b")
    pool.busy("a")
    pool.enter(waiting)
    pool.enter(held)
    assert pool.table.room_wait_over(pool.slot("b"), 1) == [Refused(waiting), Granted(held)]


def test_the_last_waiter_that_leaves_takes_its_session_out_of_the_queue_for_room():
    """A session that nobody wants any more does not wait for room."""
    pool, first, second = Pool(max_instances=1), turn("b"), turn("b")
    pool.busy("a")
    pool.enter(first)
    pool.enter(second)
    pool.table.leave(first, 0.0)
    assert pool.state("b") is SlotState.WAITING
    pool.table.leave(second, 0.0)
    check_table(pool.table)
    assert pool.state("b") is None


# -- fair share


def test_the_share_of_a_user_is_a_tenth_and_at_least_four():
    """A user's share is a tenth of the places, four in a small pool."""
    shares = {places: PoolLimits(max_instances=places).places_per_user for places in (1, 40, 49, 50, 1000)}
    assert shares == {1: 4, 40: 4, 49: 4, 50: 5, 1000: 100}


def test_a_user_with_a_full_share_comes_after_the_others():
    """Room goes to the first in line whose user holds less than a share."""
    pool = Pool(max_instances=5)
    owners = fill_with(pool, "ann", 4)
    other = pool.busy("x", "cid")
    pool.enter(turn("more", "ann"))
    pool.enter(turn("b", "bob"))
    assert pool.release(other)[-1] == Load(pool.slot("b"))
    assert pool.release(owners[0])[-1] == Load(pool.slot("more"))


def test_a_full_share_is_no_limit_while_nobody_else_waits():
    """Where nobody else waits one user may use every place."""
    pool = Pool(max_instances=6)
    owners = fill_with(pool, "ann", 6)
    pool.enter(turn("more", "ann"))
    assert pool.release(owners[0])[-1] == Load(pool.slot("more"))


def test_idle_agents_do_not_count_against_a_share():
    """Only places that work are counted: an idle agent is anybody's room."""
    pool = Pool(max_instances=5)
    owners = fill_with(pool, "ann", 4)
    pool.busy("x", "cid")
    pool.release(owners[0])
    assert pool.table._working_by_user == {"ann": 3, "cid": 1}


def test_a_session_that_began_with_a_hold_counts_for_its_user():
    """The share counts a session's user also when a hold made the slot."""
    pool, held = Pool(), hold("a")
    pool.enter(held)
    pool.enter(turn("a", "ann"))
    pool.release(held)
    assert pool.table._working_by_user == {"ann": 1}
