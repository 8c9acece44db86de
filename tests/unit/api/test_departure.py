"""Watching for the client's departure beside something else."""

import asyncio

import pytest

from app.api.departure import ClientLeft, client_watched
from tests.unit.api.wire import GONE, Wire, part


async def test_the_block_is_cancelled_when_the_client_leaves() -> None:
    """What was awaited sees a cancellation; the caller sees ``ClientLeft``."""
    wire, seen = Wire(part(b"")), []
    asyncio.get_running_loop().call_soon(wire.hang_up)
    with pytest.raises(ClientLeft):
        async with client_watched(wire.receive):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise
    assert seen == ["cancelled"]
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_client_that_has_left_before() -> None:
    """The block gets no further than its first real wait."""
    with pytest.raises(ClientLeft):
        async with client_watched(Wire(GONE).receive):
            await asyncio.Event().wait()


async def test_the_watch_ends_with_the_block() -> None:
    """No task is left when the block has ended by itself, and its errors come through as they are."""
    with pytest.raises(KeyError):
        async with client_watched(Wire().receive):
            await asyncio.sleep(0)
            raise KeyError
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_cancellation_from_outside_stays_one() -> None:
    """Who cancels the request gets a cancelled request, not a departed client."""

    async def request() -> None:
        async with client_watched(Wire().receive):
            await asyncio.Event().wait()

    task = asyncio.get_running_loop().create_task(request())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_timeout_inside_is_not_a_departure() -> None:
    """A ``TimeoutError`` of the block's own passes through."""
    with pytest.raises(TimeoutError):
        async with client_watched(Wire().receive):
            raise TimeoutError
