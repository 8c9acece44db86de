"""A lease may be cancelled at every await there is: nothing is lost, and nothing is held."""

import pytest

from app.domain.stats import DiscardCause
from tests.cancellation.driver import cut_everywhere
from tests.cancellation.world import World, key_of, start
from tests.fakes import Fault, Gate
from tests.simulation.loop import settle


def slow_store(world: World) -> None:
    world.store.fault_for = lambda _: Fault(delay_s=0.1, late_delay_s=0.1)


def test_activation_may_be_cut_anywhere():
    """The first turn of a session may be cut at any await; the load goes on for the others."""

    async def scene(victim):
        world = await World.make()
        slow_store(world)
        follower = start(world.turn("a", "follower"))
        was_cut = await victim(world.turn("a", "victim"))
        await follower
        assert world.served[:1] == ["follower"]
        assert was_cut or world.served == ["follower", "victim"]
        await world.check_quiet()

    assert cut_everywhere(scene) >= 2


def test_first_caller_may_be_cut_anywhere():
    """Whoever caused the load may be cut at any await: those behind get the agent, loaded once."""

    async def scene(victim):
        world = await World.make()
        slow_store(world)
        gate = Gate()

        async def first():
            start_follower()
            await world.turn("a", "victim")

        followers = []

        def start_follower():
            followers.append(start(world.turn("a", "follower", gate)))

        await victim(first())
        gate.open()
        await followers[0]
        assert world.served[-1] == "follower"
        assert len(world.factory.built) == 1
        await world.check_quiet()

    assert cut_everywhere(scene) >= 2


def test_waiting_for_a_turn_may_be_cut_anywhere():
    """A turn in the middle of the queue may be cut at any await; the others keep their order."""

    async def scene(victim):
        world = await World.make()
        gate = Gate()
        first = start(world.turn("a", "first", gate))
        await settle()
        second = start(world.turn("a", "second"))
        await settle()
        late: list = []

        async def arrange():
            await settle()
            late.append(start(world.turn("a", "last")))
            await settle()
            gate.open()

        opener = start(arrange())
        was_cut = await victim(world.turn("a", "victim"))
        await opener
        for task in (first, second, *late):
            await task
        middle = [] if was_cut and "victim" not in world.served else ["victim"]
        assert world.served == ["first", "second", *middle, "last"]
        await world.check_quiet()

    assert cut_everywhere(scene) >= 2


def test_waiting_for_room_may_be_cut_anywhere():
    """A session that waits for room may be cut at any await; the next one gets the room."""

    async def scene(victim):
        world = await World.make(max_instances=1)
        gate = Gate()
        busy = start(world.turn("a", "busy", gate))
        await settle()

        async def arrange():
            await settle()
            last = start(world.turn("c", "last"))
            await settle()
            gate.open()
            await last

        others = start(arrange())
        await victim(world.turn("b", "victim"))
        await others
        await busy
        assert world.served[-1] == "last"
        await world.check_quiet()

    assert cut_everywhere(scene) >= 2


@pytest.mark.parametrize("warm", [False, True])
def test_a_turn_body_may_be_cut_anywhere(warm):
    """A turn cut while it works loses its agent; the next turn has a fresh one."""

    async def scene(victim):
        world = await World.make()
        slow_store(world)
        if warm:
            await world.warm("a")
        before = world.pool.stats().discards[DiscardCause.ERROR]

        async def body():
            async with world.pool.lease(key_of("a")) as lease:
                session = lease.record or await world.store.find_session(key_of("a"))
                await lease.fit(session)
                await lease.agent.run("hello", lambda event: None)
                lease.give_back()

        was_cut = await victim(body())
        discards = world.pool.stats().discards[DiscardCause.ERROR] - before
        assert discards in ((0, 1) if was_cut else (0,))
        await world.check_quiet()
        assert not any(agent.is_running for agent in world.factory.built)

    assert cut_everywhere(scene) >= 4


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("state", ["absent", "idle", "busy", "loading", "waiting"])
def test_a_hold_may_be_cut_anywhere(state, front):
    """A hold may be cut at any await, whatever the session is doing."""

    async def scene(victim):
        world = await World.make(max_instances=1)
        gate, load = Gate(), Gate()
        others = []
        if state == "idle":
            await world.warm("a")
        elif state == "busy":
            others = [start(world.turn("a", "other", gate))]
        elif state == "loading":
            world.store.plan("load_path", Fault(gate=load))
            others = [start(world.turn("a", "other", gate))]
        elif state == "waiting":
            others = [start(world.turn("b", "busy", gate))]
            await settle()
            others.append(start(world.turn("a", "other")))
        await settle()

        async def arrange():
            await settle()
            load.open()
            await settle()
            gate.open()

        opener = start(arrange())
        inner = Gate()
        start_inner = start(open_later(inner))
        await victim(world.hold("a", "victim", inner, front=front))
        for task in (*others, opener, start_inner):
            await task
        await world.check_quiet()

    assert cut_everywhere(scene) >= 2


async def open_later(gate: Gate) -> None:
    await settle(100)
    gate.open()


def test_fitting_may_be_cut_anywhere():
    """A lease whose agent must be rebuilt may be cut meanwhile: the old agent is gone with it."""

    async def scene(victim):
        world = await World.make()
        await world.warm("a")
        slow_store(world)

        async def body():
            async with world.pool.lease(key_of("a")) as lease:
                session = await world.store.find_session(key_of("a"))
                world.factory.revision += 1
                await lease.fit(session)
                lease.agent.stamp = world.factory.stamp_of(session)
                lease.give_back()

        await victim(body())
        await world.check_quiet()

    assert cut_everywhere(scene) >= 2


def test_closing_may_be_cut_anywhere():
    """``close`` may be cut at any await and be called again."""

    async def scene(victim):
        world = await World.make()
        world.store.plan("load_path", Fault(gate=Gate()))
        loading = start(world.turn("a"))
        await settle()
        await victim(world.pool.close())
        await world.pool.close()
        await settle()
        assert loading.done()
        assert not world.pool._table.slots
        assert len(world.pool._tasks) == 0
        loading.exception()

    assert cut_everywhere(scene) >= 1
