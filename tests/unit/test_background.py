"""Tasks with an owner: kept, named, ended, and never silent about a failure."""

import asyncio
import gc
import logging

import pytest

from app.background import TaskOwner
from tests.fakes import Gate
from tests.simulation.loop import run, settle, virtual


async def fail() -> None:
    raise ValueError("what went wrong")


async def work(gate: Gate) -> str:
    await gate.wait()
    return "done"


@virtual
async def test_a_task_is_named_kept_and_forgotten():
    """A spawned task bears its owner's name and is kept exactly until it ends, also from the collector."""
    owner, gate = TaskOwner("pool"), Gate()
    task = owner.spawn(work(gate), "load s1")
    assert task.get_name() == "pool:load s1"
    await settle()
    gc.collect()
    assert len(owner) == 1
    gate.open()
    assert await task == "done"
    assert len(owner) == 0


@virtual
async def test_a_failure_that_nobody_awaits_is_logged_with_the_name(caplog):
    """A task that fails is logged once, with its name and its error."""
    owner = TaskOwner("pool")
    owner.spawn(fail(), "load s1")
    await settle()
    assert [record.getMessage() for record in caplog.records] == ["task pool:load s1 failed"]
    assert isinstance(caplog.records[0].exc_info[1], ValueError)
    assert len(owner) == 0


@virtual
async def test_a_failure_that_somebody_awaits_is_theirs_to_report(caplog):
    """An awaited task's error reaches who awaits it and is not logged beside."""
    owner = TaskOwner("turns")
    task = owner.spawn(fail(), "body", is_awaited=True)
    with pytest.raises(ValueError, match="what went wrong"):
        await task
    assert not caplog.records
    assert len(owner) == 0


@virtual
async def test_a_cancelled_task_is_no_failure(caplog):
    """Cancelling a task logs nothing."""
    owner = TaskOwner("pool")
    owner.spawn(work(Gate()), "load").cancel()
    await settle()
    assert not caplog.records
    assert len(owner) == 0


@virtual
async def test_close_cancels_what_runs_and_waits_for_its_cleanup():
    """After ``close`` every task has run its cleanup to the end."""
    owner, ended = TaskOwner("pool"), []

    async def slow_to_go(number: int) -> None:
        try:
            await Gate().wait()
        finally:
            await asyncio.sleep(1)
            ended.append(number)

    for number in range(3):
        owner.spawn(slow_to_go(number), str(number))
    await settle()
    await owner.close()
    assert sorted(ended) == [0, 1, 2]
    assert len(owner) == 0


@virtual
async def test_a_closed_owner_spawns_nothing():
    """After ``close`` a spawn is refused, and its coroutine is closed instead of forgotten."""
    owner = TaskOwner("pool")
    await owner.close()
    coroutine = work(Gate())
    with pytest.raises(RuntimeError, match="pool is closed"):
        owner.spawn(coroutine, "late")
    assert coroutine.cr_frame is None


@virtual
async def test_nothing_can_be_spawned_while_it_closes():
    """A task that spawns another one in its cleanup is refused."""
    owner, refusals = TaskOwner("pool"), []

    async def restless() -> None:
        try:
            await Gate().wait()
        finally:
            try:
                owner.spawn(work(Gate()), "again")
            except RuntimeError as error:
                refusals.append(error)

    owner.spawn(restless(), "restless")
    await settle()
    await owner.close()
    assert len(refusals) == 1


@virtual
async def test_a_task_that_ignores_its_cancellation_is_left_behind(caplog):
    """``close`` waits ``grace_s`` and not longer, and says which task it leaves."""
    owner, release = TaskOwner("pool"), Gate()

    async def deaf() -> None:
        while not release.is_open:
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    owner.spawn(deaf(), "deaf")
    await settle()
    await owner.close(grace_s=5.0)
    assert asyncio.get_running_loop().time() == pytest.approx(5.0)
    assert "pool:deaf" in caplog.text
    assert caplog.records[0].levelno == logging.ERROR
    release.open()
    await settle()
    assert len(owner) == 0


@virtual
async def test_close_may_be_called_twice_and_without_tasks():
    """Closing again, or with nothing to close, returns at once."""
    owner = TaskOwner("pool")
    await owner.close()
    owner = TaskOwner("pool")
    owner.spawn(work(Gate()), "load")
    await owner.close()
    await owner.close()
    assert asyncio.get_running_loop().time() == 0


def test_the_same_seed_ends_tasks_in_the_same_order():
    """Tasks are cancelled in the order in which they were spawned, not in that of their addresses."""

    async def order() -> list[int]:
        owner, ended = TaskOwner("pool"), []

        async def note(number: int) -> None:
            try:
                await Gate().wait()
            finally:
                ended.append(number)

        for number in range(50):
            owner.spawn(note(number), str(number))
        await settle()
        await owner.close()
        return ended

    assert run(order()) == list(range(50))
