"""Leases and holds: exclusive, ended once, and never from inside themselves."""

import asyncio

import pytest

from app.domain.errors import (
    InternalError,
    LeaseReentered,
    PoolExhausted,
    SnapshotUnreadable,
)
from app.domain.session import Stamp
from app.domain.stats import DiscardCause
from app.domain.turn import Activation
from tests.cancellation.world import World, failure_of, key_of, start
from tests.fakes import Fault, Gate
from tests.simulation.loop import settle, virtual

# -- holds


@pytest.mark.parametrize("front", [False, True])
@virtual
async def test_a_hold_of_an_idle_session_drops_its_agent(front):
    """Whoever holds a session has it without an agent; the next turn loads afresh."""
    world = await World.make()
    await world.warm("a")
    async with world.pool.hold(key_of("a"), front=front):
        assert not world.pool.is_live(key_of("a"))
        assert world.pool.live_count() == 0
    assert (await world.turn("a")).activation is Activation.NEW
    await world.check_quiet()


@virtual
async def test_a_hold_waits_for_the_running_turn():
    """A hold of a busy session is served in its turn, with nobody else inside."""
    world, gate, held = await World.make(), Gate(), Gate()
    tasks = [start(world.turn("a", "first", gate))]
    await settle()
    tasks += [start(world.hold("a", "hold", held)), start(world.turn("a", "last"))]
    await settle()
    assert world.served == ["first"]
    gate.open()
    await settle()
    assert world.served == ["first", "hold"]
    held.open()
    await asyncio.gather(*tasks)
    assert world.served == ["first", "hold", "last"]
    await world.check_quiet()


@virtual
async def test_a_front_hold_comes_before_the_turns_that_wait():
    """A hold at the front is served right after the running turn."""
    world, gate = await World.make(), Gate()
    tasks = [start(world.turn("a", "first", gate))]
    await settle()
    tasks += [start(world.turn("a", "second"))]
    await settle()
    tasks += [start(world.hold("a", "hold", front=True))]
    await settle()
    gate.open()
    await asyncio.gather(*tasks)
    assert world.served == ["first", "hold", "second"]
    await world.check_quiet()


@pytest.mark.parametrize("front", [False, True])
@virtual
async def test_a_hold_during_a_load(front):
    """A hold that comes during a load is served in its place: before or after the turn that waits."""
    world, load = await World.make(), Gate()
    world.store.plan("find_session", Fault(gate=load))
    waiting = start(world.turn("a", "turn"))
    await settle()
    held = start(world.hold("a", "hold", front=front))
    await settle()
    load.open()
    await asyncio.gather(waiting, held)
    assert world.served == (["hold", "turn"] if front else ["turn", "hold"])
    await world.check_quiet()


@virtual
async def test_a_session_that_cannot_be_read_can_be_held():
    """After a load that failed for good the session can be held, to be deleted."""
    world, load = await World.make(), Gate()
    world.store.plan("load_path", Fault(gate=load, error=SnapshotUnreadable()))
    waiting, held = start(world.turn("a")), start(world.hold("a"))
    await settle()
    load.open()
    assert isinstance(await failure_of(waiting), SnapshotUnreadable)
    await held
    assert world.served == ["hold"]
    await world.check_quiet()


@virtual
async def test_a_hold_that_raises_gives_the_session_back():
    """An error inside a hold does not keep the session."""
    world = await World.make()
    with pytest.raises(KeyError):
        async with world.pool.hold(key_of("a")):
            raise KeyError
    assert not world.pool._table.slots
    await world.check_quiet()


# -- from inside


@pytest.mark.parametrize("outer", ["lease", "hold"])
@pytest.mark.parametrize("inner", ["turn", "hold"])
@virtual
async def test_a_session_cannot_be_had_from_inside_itself(outer, inner):
    """Asking for a session from inside its own turn or hold is refused at once; it would wait for ever."""
    world = await World.make()
    async with getattr(world.pool, outer)(key_of("a")):
        error = await failure_of(getattr(world, inner)("a"))
        assert isinstance(error, LeaseReentered)
        assert error.session_id == "a"
        assert asyncio.get_running_loop().time() == 0
        await world.turn("b")
    await world.check_quiet()


@virtual
async def test_a_task_of_a_turn_is_inside_it_too():
    """A task that a turn started cannot have the turn's session while the turn runs."""
    world = await World.make()
    async with world.pool.lease(key_of("a")):
        assert isinstance(await failure_of(start(world.turn("a"))), LeaseReentered)
    await world.check_quiet()


@virtual
async def test_a_task_that_outlives_its_turn_may_have_the_session():
    """What a turn started and left behind is not inside it any more."""
    world, gate = await World.make(), Gate()

    async def later():
        await gate.wait()
        await world.turn("a", "later")

    async with world.pool.lease(key_of("a")) as lease:
        task = start(later())
        await settle()
        lease.give_back()
    gate.open()
    await task
    assert world.served == ["later"]
    await world.check_quiet()


# -- leases


@virtual
async def test_a_lease_that_is_left_without_giving_back_discards_its_agent():
    """Who forgets to give back, or raises, costs the agent, never the session."""
    world = await World.make()
    async with world.pool.lease(key_of("a")):
        pass
    with pytest.raises(KeyError):
        async with world.pool.lease(key_of("a")):
            raise KeyError
    assert world.pool.stats().discards[DiscardCause.ERROR] == 2
    await world.check_quiet()


@virtual
async def test_a_lease_ends_once():
    """Only the first end of a lease counts, whatever comes after it."""
    world = await World.make()
    first = await world.pool.acquire(key_of("a"))
    first.give_back()
    second = await world.pool.acquire(key_of("a"))
    first.give_back()
    first.discard(DiscardCause.ERROR)
    first.abandon(DiscardCause.DEADLINE)()
    assert second.agent is world.factory.built[0]
    assert world.pool.stats().active == 1
    second.give_back()
    await world.check_quiet()


@virtual
async def test_a_returned_lease_has_no_agent():
    """The agent cannot be reached through a lease that has ended."""
    world = await World.make()
    lease = await world.pool.acquire(key_of("a"))
    lease.give_back()
    with pytest.raises(InternalError):
        _ = lease.agent
    with pytest.raises(InternalError):
        await lease.fit(await world.store.find_session(key_of("a")))


@virtual
async def test_a_lease_that_ends_while_its_agent_is_rebuilt_leaves_its_successor_alone():
    """A rebuilt agent that comes after the end of its lease is thrown away."""
    world, load = await World.make(), Gate()
    lease = await world.pool.acquire(key_of("a"))
    session = await world.store.find_session(key_of("a"))
    world.factory.revision += 1
    lease.agent.stamp = Stamp("another head", None, 1, 1)
    world.store.plan("load_path", Fault(gate=load))
    fitting = start(lease.fit(session))
    await settle()
    lease.discard(DiscardCause.DEADLINE)
    successor = await world.pool.acquire(key_of("a"))
    agent = successor.agent
    load.open()
    assert isinstance(await failure_of(fitting), InternalError)
    assert successor.agent is agent
    assert world.pool._table.slots[key_of("a")].agent is agent
    successor.give_back()
    await world.check_quiet()


@virtual
async def test_a_lease_may_end_in_another_context():
    """The session is given back also when the lease is left from another task."""
    world = await World.make()
    context = world.pool.lease(key_of("a"))
    lease = await start(context.__aenter__())
    lease.give_back()
    await start(context.__aexit__(None, None, None))
    other = world.pool.lease(key_of("a"))
    await start(other.__aenter__())
    await start(other.__aexit__(None, None, None))
    await world.check_quiet()


@virtual
async def test_a_zombie_keeps_its_place_until_it_has_ended():
    """An abandoned body holds its place, its session goes on, and the place comes back once."""
    world = await World.make(max_instances=1, capacity_wait_s=5.0)
    lease = await world.pool.acquire(key_of("a"))
    ended = lease.abandon(DiscardCause.DEADLINE)
    assert (world.pool.stats().zombies, world.pool.live_count()) == (1, 1)
    assert isinstance(await failure_of(world.turn("b")), PoolExhausted)
    waiting = start(world.turn("a", "again"))
    await settle()
    ended()
    await waiting
    ended()
    assert world.pool.stats().zombies == 0
    await world.check_quiet()
