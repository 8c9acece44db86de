"""An event loop of the server's kind that a benchmark, which is a plain function, can run things on."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import pytest
import uvloop

T = TypeVar("T")

Run = Callable[[Awaitable[T]], T]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Run a coroutine to its end, always on the same loop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        # Not the runner's own ``run``: that sets a signal handler each time.
        yield runner.get_loop().run_until_complete
