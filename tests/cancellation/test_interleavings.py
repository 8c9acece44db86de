"""The nasty moments: two things in the same tick, and the order that must not matter."""

import asyncio

import pytest

from app.domain.errors import (
    PoolExhausted,
    TurnQueueFull,
)
from app.domain.turn import Activation
from tests.cancellation.world import World, failure_of, key_of, start
from tests.fakes import Gate
from tests.simulation.loop import settle, virtual

# -- grants and cancellations in one tick


@virtual
async def test_a_waiter_cancelled_in_the_tick_of_its_grant_passes_the_grant_on():
    """A waiter that is granted and cancelled in one tick does not keep the session."""
    world, gate = await World.make(), Gate()
    first = await world.pool.acquire(key_of("a"))
    second, third = start(world.turn("a", "second")), start(world.turn("a", "third", gate))
    await settle()
    first.give_back()
    second.cancel()
    assert isinstance(await failure_of(second), asyncio.CancelledError)
    await settle()
    assert world.served == ["third"]
    gate.open()
    await third
    assert len(world.factory.built) == 1
    await world.check_quiet()


@virtual
async def test_a_waiter_cancelled_before_the_grant_in_the_same_tick_is_skipped():
    """A waiter that is cancelled first and then granted in one tick does not keep the session."""
    world = await World.make()
    first = await world.pool.acquire(key_of("a"))
    second, third = start(world.turn("a", "second")), start(world.turn("a", "third"))
    await settle()
    second.cancel()
    first.give_back()
    await failure_of(second)
    await third
    assert world.served == ["third"]
    await world.check_quiet()


@virtual
async def test_all_waiters_cancelled_in_the_tick_of_the_grant_leave_the_agent_idle():
    """If nobody is left to pass a grant on to, the agent is idle and still good."""
    world = await World.make()
    first = await world.pool.acquire(key_of("a"))
    waiters = [start(world.turn("a")) for _ in range(3)]
    await settle()
    first.give_back()
    for waiter in waiters:
        waiter.cancel()
    await asyncio.wait(waiters)
    assert world.pool.stats().idle == 1
    assert not any(world.pool.stats().discards.values())
    await world.check_quiet()


@virtual
async def test_a_middle_waiter_that_is_cancelled_takes_itself_out():
    """Cancelling a waiter in the middle does not push out the head of the queue."""
    world, gate = await World.make(), Gate()
    tasks = [start(world.turn("a", "0", gate))]
    for number in range(1, 5):
        await settle()
        tasks.append(start(world.turn("a", str(number))))
    await settle()
    tasks[2].cancel()
    await settle()
    gate.open()
    await asyncio.wait(tasks)
    assert world.served == ["0", "1", "3", "4"]
    await world.check_quiet()


# -- time limits


@virtual
async def test_a_turn_that_waits_too_long_for_the_session_is_refused():
    """After exactly ``queue_wait_s`` a turn behind others is refused; the queue goes on without it."""
    world, gate = await World.make(queue_wait_s=30.0), Gate()
    first = start(world.turn("a", "first", gate))
    await settle()
    second = start(world.turn("a", "second"))
    await asyncio.sleep(1)
    third = start(world.turn("a", "third"))
    assert isinstance(await failure_of(second), TurnQueueFull)
    assert asyncio.get_running_loop().time() == pytest.approx(30.0)
    gate.open()
    await first
    await third
    assert world.served == ["first", "third"]
    assert world.pool.stats().rejections == {"TURN_QUEUE_FULL": 1}
    await world.check_quiet()


@pytest.mark.parametrize("released_first", [True, False])
@virtual
async def test_the_queue_wait_ends_in_the_tick_of_the_grant(released_first):
    """A wait that ends in the tick of the grant either has the session or passes it on: never neither."""
    world = await World.make(queue_wait_s=30.0)
    first = await world.pool.acquire(key_of("a"))
    loop = asyncio.get_running_loop()
    if released_first:
        loop.call_at(loop.time() + 30.0, first.give_back)
    second = start(world.turn("a", "second"))
    await settle()
    if not released_first:
        loop.call_at(loop.time() + 30.0, first.give_back)
    third = start(world.turn("a", "third"))
    error = await failure_of(second)
    await failure_of(third)
    assert (error is None) == ("second" in world.served)
    assert error is None or isinstance(error, TurnQueueFull)
    await world.check_quiet()


@virtual
async def test_a_session_that_waits_too_long_for_room_is_refused():
    """After exactly ``capacity_wait_s`` without room every turn of the session is refused."""
    world, gate = await World.make(max_instances=1, capacity_wait_s=5.0), Gate()
    busy = start(world.turn("a", gate=gate))
    await settle()
    waiters = [start(world.turn("b")) for _ in range(2)]
    errors = [await failure_of(waiter) for waiter in waiters]
    assert [type(error) for error in errors] == [PoolExhausted] * 2
    assert asyncio.get_running_loop().time() == pytest.approx(5.0)
    gate.open()
    await busy
    await world.check_quiet()


@pytest.mark.parametrize("released_first", [True, False])
@virtual
async def test_the_wait_for_room_ends_in_the_tick_of_the_hand_off(released_first):
    """A wait for room that ends in the tick in which room comes loses neither the turn nor the room."""
    world = await World.make(max_instances=1, capacity_wait_s=5.0)
    first = await world.pool.acquire(key_of("a"))
    loop = asyncio.get_running_loop()
    if released_first:
        loop.call_at(loop.time() + 5.0, first.give_back)
    second = start(world.turn("b", "second"))
    await settle()
    if not released_first:
        loop.call_at(loop.time() + 5.0, first.give_back)
    error = await failure_of(second)
    assert (error is None) == released_first
    assert error is None or isinstance(error, PoolExhausted)
    await world.check_quiet()


@virtual
async def test_two_sessions_want_the_place_of_the_only_idle_agent_as_it_is_leased():
    """When the only idle agent is leased in the same tick, those who want its place wait for it."""
    world, gate = await World.make(max_instances=1), Gate()
    await world.warm("a")
    tasks = [start(world.turn("a", "a", gate)), start(world.turn("b", "b")), start(world.turn("c", "c"))]
    await settle()
    assert world.served == ["a"]
    gate.open()
    await asyncio.gather(*tasks)
    assert world.served == ["a", "b", "c"]
    await world.check_quiet()


@virtual
async def test_a_turn_comes_in_the_tick_of_the_sweep():
    """A turn in the tick in which its agent expires has it warm or afresh, never half."""
    world = await World.make(idle_ttl_s=60.0)
    await world.warm("a", "b")
    await asyncio.sleep(60)
    kept = start(world.turn("a", "kept"))
    await asyncio.sleep(0)
    assert world.pool.sweep().removed == 1
    late = start(world.turn("b", "late"))
    await asyncio.gather(kept, late)
    assert (await kept).activation is Activation.WARM
    assert (await late).activation is Activation.NEW
    await world.check_quiet()
