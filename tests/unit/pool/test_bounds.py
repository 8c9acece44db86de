"""What ends by itself: idle time, a drain, counters and everything that could grow."""

from collections import OrderedDict

import pytest

from app.domain.errors import Draining
from app.domain.stats import EvictionCause
from app.pool.effects import Dropped, Granted, Refused
from app.pool.eviction import pick_expired, pick_idle_for
from app.pool.limits import PoolLimits
from tests.unit.pool.bench import Pool, hold, key_of, turn
from tests.unit.pool.invariants import check_table

# -- time


def test_the_idle_ttl_is_exact():
    """An agent is evicted at exactly ``idle_ttl_s`` after its last turn, not a moment before."""
    pool = Pool(idle_ttl_s=60.0)
    pool.idle("a", now=100.0)
    assert pool.table.sweep(159.999) == []
    assert pool.table.sweep(160.0) == [Dropped(key_of("a"), EvictionCause.TTL)]


def test_the_idle_ttl_slides_from_the_end_of_the_last_turn():
    """A turn starts the idle time again, however long it took."""
    pool = Pool(idle_ttl_s=60.0)
    pool.idle("a", now=0.0)
    again = turn("a")
    pool.enter(again)
    assert pool.table.sweep(1000.0) == []
    pool.release(again, 1000.0)
    assert pool.table.sweep(1059.0) == []
    assert len(pool.table.sweep(1060.0)) == 1


def test_an_agent_nobody_came_for_is_idle_since_its_load():
    """An agent that was loaded for nobody expires too."""
    pool, ticket = Pool(idle_ttl_s=60.0), turn()
    pool.enter(ticket)
    pool.table.leave(ticket, 0.0)
    pool.load(now=10.0)
    assert pool.table.sweep(69.0) == []
    assert len(pool.table.sweep(70.0)) == 1


def test_an_idle_ttl_of_zero_means_no_limit():
    """With ``idle_ttl_s=0`` nothing expires."""
    pool = Pool(idle_ttl_s=0)
    pool.idle()
    assert pool.table.sweep(1e12) == []


def test_a_sweep_looks_only_at_what_is_due():
    """A sweep costs as much as it removes: it stops at the first agent that is not due."""

    class Counted(OrderedDict):
        seen = 0

        def values(self):
            for slot in super().values():
                self.seen += 1
                yield slot

    pool = Pool(max_instances=100, idle_ttl_s=60.0)
    for number in range(50):
        pool.idle(f"s{number}", now=float(number))
    idle = Counted(pool.table.idle)
    assert len(pick_expired(idle, 62.0, 60.0)) == 3
    assert idle.seen == 4


def test_idle_for_includes_the_boundary():
    """``pick_idle_for`` takes who has been idle for exactly that long, the oldest first."""
    pool = Pool()
    pool.idle("a", now=0.0)
    pool.idle("b", now=1.0)
    pool.idle("c", now=2.0)
    assert [slot.key.session_id for slot in pick_idle_for(pool.table.idle, 11.0, 10.0)] == ["a", "b"]


# -- drain


def test_drain_refuses_those_who_wait_and_lets_the_rest_go_on():
    """Drain refuses new and waiting turns; a running turn, and a hold, go on."""
    pool, behind, homeless, loading, held = Pool(max_instances=2), turn("a"), turn("c"), turn("b"), hold("a")
    owner = pool.busy("a")
    pool.enter(behind)
    pool.enter(held)
    pool.enter(loading)
    pool.enter(homeless)
    effects = pool.table.begin_drain()
    check_table(pool.table)
    assert effects == [Refused(behind), Refused(loading), Refused(homeless)]
    assert isinstance(behind.error, Draining)
    with pytest.raises(Draining):
        pool.enter(turn("d"))
    assert pool.release(owner)[-1] == Granted(held)


def test_drain_may_begin_twice():
    """The second drain changes nothing."""
    pool = Pool()
    pool.busy()
    pool.enter(turn())
    assert len(pool.table.begin_drain()) == 1
    assert pool.table.begin_drain() == []


def test_a_hold_is_granted_while_the_pool_drains():
    """A drain does not keep anybody from rewinding or deleting a session."""
    pool, held = Pool(), hold()
    pool.table.begin_drain()
    assert pool.enter(held) == [Granted(held)]


def test_an_agent_that_comes_to_rest_during_a_drain_is_dropped():
    """Nobody can use an agent after the drain has begun, so none is kept."""
    pool = Pool()
    owner = pool.busy()
    pool.table.begin_drain()
    assert pool.release(owner) == [Dropped(key_of("a"), EvictionCause.DRAIN)]
    assert not pool.table.slots


# -- counting


def test_bytes_are_weighed_after_each_load_and_turn():
    """The estimate follows the agents: grown by a turn, gone with an eviction."""
    pool = Pool()
    pool.enter(turn("a"))
    pool.load("a", size=100)
    assert pool.table.stats().estimated_bytes == 100
    pool.slot("a").agent._fixed_bytes = 250
    pool.release(pool.slot("a").owner)
    assert pool.table.stats().estimated_bytes == 250
    pool.table.evict([pool.slot("a")], EvictionCause.MEMORY)
    assert pool.table.stats().estimated_bytes == 0


def test_only_loads_of_sessions_with_a_past_are_restores():
    """``restores`` counts loads that found turns; ``misses`` all loads."""
    pool = Pool()
    pool.enter(turn("a"))
    pool.load("a", head=None)
    pool.enter(turn("b"))
    pool.load("b", head="t1")
    assert (pool.table.stats().misses, pool.table.stats().restores) == (2, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_instances": 0},
        {"queue_depth": -1},
        {"capacity_queue": -1},
        {"idle_ttl_s": float("inf")},
        {"queue_wait_s": -0.1},
        {"capacity_wait_s": float("nan")},
        {"activation_timeout_s": -1},
    ],
)
def test_limits_refuse_nonsense_by_name(wrong):
    """A limit out of its range is refused with its name."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PoolLimits(**wrong)
