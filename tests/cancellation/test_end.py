"""Drain and close: whatever goes on at that moment, nobody waits for ever."""

import asyncio

from app.domain.errors import (
    Draining,
    SessionBusy,
)
from app.pool.slot import SlotState
from tests.cancellation.world import World, failure_of, key_of, start
from tests.fakes import Fault, Gate
from tests.simulation.loop import settle, virtual

# -- the end


@virtual
async def test_drain_refuses_those_who_wait():
    """Drain refuses turns that wait, for a session, for room, for a load; what runs goes on."""
    world, gate = await World.make(max_instances=2), Gate()
    world.store.plan("find_session", Fault(), Fault(gate=Gate()))
    running = start(world.turn("a", "running", gate))
    await settle()
    waiters = [start(world.turn(name)) for name in ("a", "b", "c")]
    await settle()
    assert {slot.state for slot in world.pool._table.slots.values()} == {
        SlotState.BUSY, SlotState.LOADING, SlotState.WAITING
    }  # fmt: skip
    world.pool.begin_drain()
    world.pool.begin_drain()
    assert [type(await failure_of(waiter)) for waiter in waiters] == [Draining] * 3
    assert isinstance(await failure_of(world.turn("d")), Draining)
    gate.open()
    await running
    await world.pool.close()
    assert not world.pool._table.slots


@virtual
async def test_drain_in_the_tick_of_a_grant_and_of_a_load():
    """A turn that was granted before the drain runs; one whose load ends in that tick is refused."""
    world, load, gate = await World.make(), Gate(), Gate()
    first = await world.pool.acquire(key_of("a"))
    granted = start(world.turn("a", "granted", gate))
    world.store.plan("find_session", Fault(gate=load))
    loading = start(world.turn("b", "loading"))
    await settle()
    first.give_back()
    load.open()
    world.pool.begin_drain()
    assert isinstance(await failure_of(loading), Draining)
    gate.open()
    await granted
    await world.pool.close()
    assert world.served == ["granted"]
    assert not world.pool._table.slots


@virtual
async def test_close_during_a_load():
    """Closing ends a load, refuses the turn that waits for it and grants the hold behind."""
    world = await World.make()
    world.store.plan("find_session", Fault(gate=Gate()))
    waiting, held = start(world.turn("a")), start(world.hold("a"))
    await settle()
    await world.pool.close()
    assert isinstance(await failure_of(waiting), Draining)
    await held
    assert not world.pool._table.slots


@virtual
async def test_close_in_the_tick_in_which_a_load_begins():
    """Closing ends also a load whose task has not taken its first step."""
    world = await World.make()
    waiting, held = start(world.turn("a")), start(world.hold("a"))
    await asyncio.sleep(0)
    assert world.pool.stats().activating == 1
    await world.pool.close()
    assert world.pool.live_count() == 0
    assert isinstance(await failure_of(waiting), Draining)
    await held
    assert not world.pool._table.slots


@virtual
async def test_a_load_that_ignores_the_close_comes_to_nothing():
    """An agent that arrives after the close is not kept."""
    world, load = await World.make(), Gate()

    async def deaf(key):
        while not load.is_open:
            try:
                await load.wait()
            except asyncio.CancelledError:
                continue
        return await world.store.inner.find_session(key)

    world.pool._activator.store.__dict__["find_session"] = deaf
    waiting = start(world.turn("a"))
    await settle()
    await world.pool.close()
    assert isinstance(await failure_of(waiting), Draining)
    load.open()
    await settle()
    assert not world.pool._table.slots
    assert world.pool.stats().total == 0


@virtual
async def test_close_twice_and_during_a_turn():
    """``close`` may be called twice; a turn that still runs ends later and leaves nothing."""
    world = await World.make()
    await world.warm("b")
    lease = await world.pool.acquire(key_of("a"))
    await world.pool.close()
    await world.pool.close()
    assert lease.agent is world.factory.built[-1]
    lease.give_back()
    assert not world.pool._table.slots
    assert isinstance(await failure_of(world.turn("b")), Draining)


@virtual
async def test_who_may_not_wait_is_refused_at_once():
    """``may_wait=False`` is refused while a turn runs, with that turn's id, and takes no time."""
    world = await World.make()
    lease = await world.pool.acquire(key_of("a"), turn_id="t7")
    error = await failure_of(world.turn("a", may_wait=False))
    assert isinstance(error, SessionBusy)
    assert error.turn_id == "t7"
    lease.give_back()
    await world.turn("a", may_wait=False)
    await world.check_quiet()
