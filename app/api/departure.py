"""Noticing that the client has left while something is awaited on its behalf."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

from starlette.types import Receive

from app.background import TaskOwner


class ClientLeft(Exception):
    """The client closed its connection before it had its answer."""


def client_watched(receive: Receive) -> AbstractAsyncContextManager[None]:
    """Run the block while the client is there; cancel it at once when the client leaves.

    What is left of the request's body is lost.

    Raises:
        ClientLeft: the client left, and the block was cancelled.
    """
    return ended_by(partial(_wait_departure, receive), ClientLeft())


@asynccontextmanager
async def ended_by(event: Callable[[], Awaitable[None]], error: Exception) -> AsyncIterator[None]:
    """Run the block until ``event`` returns; then cancel it at once, and raise ``error``.

    A cancellation from outside passes through. ``event`` ends with the block.
    """
    presence = asyncio.timeout(None)
    try:
        async with presence:
            watch = TaskOwner("watch").spawn(_end_with(event, presence), "event")
            try:
                yield
            finally:
                watch.cancel()
    except TimeoutError:
        if presence.expired():
            raise error from None
        raise


async def _end_with(event: Callable[[], Awaitable[None]], presence: asyncio.Timeout) -> None:
    await event()
    # An asyncio.Timeout that is due now cancels its block exactly once, and tells that
    # cancellation from one that comes from outside; a bare task.cancel() cannot.
    presence.reschedule(0.0)


async def _wait_departure(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
