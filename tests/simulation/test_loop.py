"""The simulated world itself: repeatable, out of order, and without real time."""

import asyncio
import time

import pytest

from tests.simulation.loop import Stuck, VirtualLoop, run, settle, virtual


async def race(workers: int = 6) -> list[tuple[int, int, float]]:
    """Return who did which step when, for some workers that sleep and yield."""
    trace = []
    loop = asyncio.get_running_loop()

    async def work(number: int) -> None:
        for step in range(4):
            trace.append((number, step, loop.time()))
            await asyncio.sleep(step % 2 * 0.5)

    await asyncio.gather(*(work(number) for number in range(workers)))
    return trace


def test_the_same_seed_gives_the_same_trace():
    """Two runs with one seed do the same things at the same times in the same order."""
    assert all(run(race(), seed) == run(race(), seed) for seed in range(20))


def test_other_seeds_give_other_orders():
    """Seeds differ in the order of what is ready, never in when a timer fires."""
    traces = [run(race(), seed) for seed in range(20)]
    assert len({tuple(trace) for trace in traces}) == 20
    assert len({tuple(sorted(trace)) for trace in traces}) == 1


def test_without_a_seed_the_order_is_that_of_asyncio():
    """Without a seed callbacks run first come, first served, as in a real loop."""
    ours = [(number, step) for number, step, _ in run(race())]
    real = [(number, step) for number, step, _ in asyncio.run(race())]
    assert ours == real


def test_due_timers_are_shuffled_with_the_rest():
    """A timer may fire before or after what became ready in the same moment."""

    async def finish() -> str:
        loop, order = asyncio.get_running_loop(), []
        loop.call_later(1.0, order.append, "t")
        loop.call_later(1.0, order.append, "u")
        await asyncio.sleep(1.0)
        await asyncio.sleep(0)
        return "".join(order)

    assert {run(finish(), seed) for seed in range(20)} == {"tu", "ut"}


def test_an_hour_costs_nothing():
    """Virtual time jumps to the next timer."""

    async def wait_an_hour() -> float:
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    before = time.perf_counter()
    assert run(wait_an_hour()) == 3600
    assert time.perf_counter() - before < 1


def test_timeouts_work_in_virtual_time():
    """``asyncio.timeout`` ends a wait at exactly its time, and a cancelled timer never fires."""

    async def give_up() -> float:
        loop = asyncio.get_running_loop()
        loop.call_later(1.0, pytest.fail).cancel()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.sleep(100)
        return loop.time()

    assert run(give_up()) == 5


def test_a_wait_for_what_cannot_come_is_found_at_once():
    """When nothing is ready and no timer is set, the run ends with ``Stuck`` instead of hanging."""

    async def wait_for_ever() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Stuck, match="wait_for_ever"):
        run(wait_for_ever())


def test_a_task_left_behind_fails_the_run():
    """Who leaves a task running is told its name."""

    async def leave_one() -> None:
        asyncio.get_running_loop().create_task(asyncio.sleep(10), name="orphan")
        await settle()

    with pytest.raises(AssertionError, match="orphan"):
        run(leave_one())


def test_a_callback_that_fails_fails_the_run():
    """What asyncio would only log fails the run."""

    async def break_one() -> None:
        asyncio.get_running_loop().call_soon(lambda: 1 / 0)
        await settle()

    with pytest.raises(AssertionError, match="division by zero"):
        run(break_one())


def test_a_check_runs_after_every_step_and_ends_the_run():
    """``after_step`` sees every iteration, and what it raises comes out."""
    steps = []
    run(race(), 1, after_step=lambda: steps.append(1))
    assert len(steps) > 10

    def refuse() -> None:
        raise KeyError("seen")

    with pytest.raises(KeyError, match="seen"):
        run(race(), 1, after_step=refuse)


@virtual
async def test_the_decorator_gives_a_virtual_loop():
    """A ``virtual`` test runs in such a loop, without a seed."""
    assert isinstance(asyncio.get_running_loop(), VirtualLoop)
