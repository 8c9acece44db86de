"""The token that ends a turn, and knows what of it cannot be ended."""

import asyncio
from asyncio import Future
from collections.abc import Callable
from typing import Any

from autogen_core import CancellationToken


class PruningToken(CancellationToken):
    """A token for one turn that forgets what has ended; the stock one keeps every chunk's future.

    For one event loop. Callbacks may ask the token anything.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ended = False
        self._times_asked = 0
        self._threads: set[Future[Any]] = set()
        self._running: set[Future[Any]] = set()
        self._calls: list[Callable[[], None]] = []

    def cancel(self) -> None:
        """Cancel what is linked and call the callbacks, once."""
        self._times_asked += 1
        if self._ended:
            return
        self._ended = True
        for future in tuple(self._running):
            future.cancel()
        calls, self._calls = self._calls, []
        for call in calls:
            call()

    def is_cancelled(self) -> bool:
        return self._ended

    def add_callback(self, callback: Callable[[], None]) -> None:
        if self._ended:
            callback()
        else:
            self._calls.append(callback)

    def link_future(self, future: Future[Any]) -> Future[Any]:
        if self._ended:
            future.cancel()
        else:
            self._running.add(future)
            future.add_done_callback(self._running.discard)
        return future

    def note_thread(self, ended: Future[Any]) -> None:
        """Note a thread that runs for this turn until ``ended`` is done."""
        self._threads.add(ended)
        ended.add_done_callback(self._threads.discard)

    async def wait_threads(self) -> None:
        """Return when every thread has ended, however often ``cancel`` asks meanwhile.

        A cancellation of the task alone, without ``cancel``, is the process's end, and ends it.
        """
        times = self._times_asked
        while self._threads:
            try:
                await asyncio.wait(self._threads)
            except asyncio.CancelledError:
                if self._times_asked == times:
                    raise
                times = self._times_asked
