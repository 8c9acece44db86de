"""Loads belong to the pool: whoever goes while one runs, the others get what it brings."""

import asyncio

import pytest

from app.domain.errors import (
    SessionNotFound,
    SnapshotUnreadable,
    StoreUnavailable,
)
from app.domain.turn import Activation
from tests.cancellation.world import World, failure_of, key_of, start
from tests.fakes import Fault, Gate
from tests.simulation.loop import settle, virtual

# -- loads


@virtual
async def test_the_first_caller_of_a_load_disconnects_and_the_others_get_the_agent():
    """The load belongs to the pool: who caused it may go."""
    world, load = await World.make(), Gate()
    world.store.plan("find_session", Fault(gate=load))
    first = start(world.turn("a", "first"))
    await settle()
    others = [start(world.turn("a", label)) for label in ("second", "third")]
    await settle()
    first.cancel()
    await failure_of(first)
    load.open()
    await asyncio.gather(*others)
    assert world.served == ["second", "third"]
    assert len(world.factory.built) == 1
    await world.check_quiet()


@virtual
async def test_a_load_that_everybody_left_ends_idle():
    """When all leave during a load, it ends all the same, and the next turn is warm."""
    world, load = await World.make(), Gate()
    world.store.plan("find_session", Fault(gate=load))
    callers = [start(world.turn("a")) for _ in range(3)]
    await settle()
    for caller in callers:
        caller.cancel()
    await asyncio.wait(callers)
    load.open()
    await settle()
    assert world.pool.stats().idle == 1
    lease = await world.turn("a")
    assert lease.activation is Activation.WARM
    await world.check_quiet()


@virtual
async def test_who_may_not_wait_joins_a_load_that_everybody_left():
    """A load nobody waits for is no running turn: ``may_wait=False`` is not refused for it."""
    world, load = await World.make(), Gate()
    world.store.plan("find_session", Fault(gate=load))
    gone = start(world.turn("a"))
    await settle()
    gone.cancel()
    await failure_of(gone)
    impatient = start(world.turn("a", "impatient", may_wait=False))
    await settle()
    load.open()
    await impatient
    await world.check_quiet()


@virtual
async def test_a_turn_that_joins_a_load_begun_before_reads_the_session_itself():
    """A record that was read before a turn came is not given to it: it may be older than the caller."""
    world, late = await World.make(), Gate()
    world.store.plan("find_session", Fault(late_gate=late))
    gone = start(world.turn("a"))
    await settle()
    gone.cancel()
    await failure_of(gone)
    joined = start(world.turn("a"))
    await settle()
    late.open()
    assert (await joined).record is None


@virtual
async def test_a_turn_that_caused_a_load_need_not_read_the_session_again():
    """Who was first in line when the load began gets the record that the load read."""
    world = await World.make()
    lease = await world.turn("a")
    assert lease.record == await world.store.find_session(key_of("a"))
    assert (await world.turn("a")).record is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (SnapshotUnreadable(), SnapshotUnreadable),
        (StoreUnavailable(), StoreUnavailable),
        (TimeoutError(), StoreUnavailable),
    ],
)
@virtual
async def test_a_load_that_fails_tells_all_who_wait(error, expected):
    """All four who wait for a load get its error, and the session can be tried again."""
    world, load = await World.make(), Gate()
    world.store.plan("load_path", Fault(gate=load, error=error))
    callers = [start(world.turn("a")) for _ in range(4)]
    await settle()
    load.open()
    assert [type(await failure_of(caller)) for caller in callers] == [expected] * 4
    assert world.pool.live_count() == 0
    await world.check_quiet()


@virtual
async def test_a_session_that_is_not_there_takes_no_place():
    """A turn of an unknown session is refused and leaves nothing behind."""
    world = await World.make()
    assert isinstance(await failure_of(world.turn("nobody")), SessionNotFound)
    assert world.pool.live_count() == 0
    assert not world.pool._table.slots


@virtual
async def test_a_load_that_hangs_is_ended_in_time():
    """A load that hangs fails after ``activation_timeout_s``, and its place is free again."""
    world = await World.make(activation_timeout_s=10.0)
    world.store.plan("load_path", Fault(gate=Gate()))
    error = await failure_of(world.turn("a"))
    assert isinstance(error, StoreUnavailable)
    assert asyncio.get_running_loop().time() == pytest.approx(10.0)
    await world.check_quiet()


@pytest.mark.parametrize("queue_wait_s", [0.0, 1.0, 30.0])
@virtual
async def test_a_slow_load_is_no_full_queue(queue_wait_s):
    """``queue_wait_s`` bounds the wait for other turns, not that for the store."""
    world = await World.make(queue_wait_s=queue_wait_s, activation_timeout_s=30.0)
    world.store.plan("load_path", Fault(delay_s=20.0))
    await world.turn("a")
    world.store.plan("load_path", Fault(gate=Gate()))
    assert isinstance(await failure_of(world.turn("b")), StoreUnavailable)
    await world.check_quiet()
