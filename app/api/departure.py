"""Noticing that the client has left while something is awaited on its behalf."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Receive

from app.background import TaskOwner


class ClientLeft(Exception):
    """The client closed its connection before it had its answer."""


@asynccontextmanager
async def client_watched(receive: Receive) -> AsyncIterator[None]:
    """Run the block while the client is there; cancel it at once when the client leaves.

    What is left of the request's body is lost. A cancellation from outside passes through.
    The watching task ends with the block.

    Raises:
        ClientLeft: the client left, and the block was cancelled.
    """
    presence = asyncio.timeout(None)
    try:
        async with presence:
            watch = TaskOwner("client").spawn(_end_with_client(receive, presence), "departure")
            try:
                yield
            finally:
                watch.cancel()
    except TimeoutError:
        if presence.expired():
            raise ClientLeft from None
        raise


async def _end_with_client(receive: Receive, presence: asyncio.Timeout) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    # An asyncio.Timeout that is due now cancels its block exactly once, and tells that
    # cancellation from one that comes from outside; a bare task.cancel() cannot.
    presence.reschedule(0.0)
