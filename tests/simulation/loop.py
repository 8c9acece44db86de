"""An event loop without real time and, with a seed, without a fixed order.

* Time is virtual: when nothing is ready it jumps to the next timer, so an hour costs nothing.
* With a seed the callbacks that are ready, due timers included, run in a shuffled order in
  every iteration. asyncio promises first come, first served; code that is right only
  because of that order fails here. The same seed always gives the same order.
* When nothing is ready and no timer is set, nothing can ever happen again: ``Stuck`` says
  so at once, which is how a lost wake-up shows.

There is no input, no output and no thread in this world: a callback from a thread is only
seen if something else keeps the loop going.
"""

import asyncio
import functools
import heapq
import random
import selectors
from collections.abc import Callable, Coroutine, Mapping
from contextvars import Context
from typing import Any, TypeVar

T = TypeVar("T")


class Stuck(AssertionError):
    """Somebody waits, and nothing is left that could wake them."""


class _NoInput(selectors.SelectSelector):
    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return []


class _Timer(asyncio.TimerHandle):
    """Timers of one moment fire in the order in which they were set; asyncio's heap would not keep it."""

    __slots__ = ("number",)
    number: int

    def __lt__(self, other: "_Timer") -> bool:
        return (self.when(), self.number) < (other.when(), other.number)


class VirtualLoop(asyncio.SelectorEventLoop):
    """``after_step`` is called after every iteration; what it raises ends the run.

    ``failures`` collects what asyncio would only have logged.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._now_s = 0.0
        super().__init__(_NoInput())
        self._timers_set = 0
        self._random = None if seed is None else random.Random(seed)
        self.after_step: Callable[[], None] | None = None
        self.steps = 0
        self.failures: list[Mapping[str, Any]] = []
        self.set_exception_handler(lambda _, context: self.failures.append(context))

    def time(self) -> float:
        return self._now_s

    def call_at(
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        timer = _Timer(when, callback, args, self, context)
        timer.number = self._timers_set = self._timers_set + 1
        heapq.heappush(self._scheduled, timer)
        timer._scheduled = True
        return timer

    def _run_once(self) -> None:
        self._drop_cancelled_timers()
        if not self._ready and not self._stopping:
            if not self._scheduled:
                raise Stuck(
                    f"nothing can happen any more; waiting: {sorted(map(str, asyncio.all_tasks(self)))}"
                )
            self._now_s = max(self._now_s, self._scheduled[0].when())
        self._make_due_timers_ready()
        if self._random is not None and len(self._ready) > 1:
            ready = list(self._ready)
            self._random.shuffle(ready)
            self._ready.clear()
            self._ready.extend(ready)
        self.steps += 1
        super()._run_once()
        if self.after_step is not None:
            self.after_step()

    def _drop_cancelled_timers(self) -> None:
        while self._scheduled and self._scheduled[0].cancelled():
            self._pop_timer()

    def _make_due_timers_ready(self) -> None:
        while self._scheduled and self._scheduled[0].when() <= self._now_s:
            timer = self._pop_timer()
            if not timer.cancelled():
                self._ready.append(timer)

    def _pop_timer(self) -> asyncio.TimerHandle:
        timer = heapq.heappop(self._scheduled)
        timer._scheduled = False
        if timer.cancelled():
            self._timer_cancelled_count -= 1
        return timer


def run(
    main: Coroutine[Any, Any, T], seed: int | None = None, after_step: Callable[[], None] | None = None
) -> T:
    """Run ``main`` in a world of its own and return its result.

    Raises:
        Stuck: it waits for what can never happen.
        AssertionError: it left a task behind, or a callback failed.
    """
    loop = VirtualLoop(seed)
    loop.after_step = after_step
    try:
        result = loop.run_until_complete(main)
        left = sorted(task.get_name() for task in asyncio.all_tasks(loop))
        assert not left, f"tasks left behind: {left}"
        assert not loop.failures, f"failures that nobody saw: {loop.failures}"
        return result
    finally:
        _end(loop)


def _end(loop: VirtualLoop) -> None:
    loop.after_step = None
    loop.call_soon(loop.stop)  # a stop that is due from a main that had just ended is over with this one
    loop.run_forever()
    for task in asyncio.all_tasks(loop):
        task.cancel()
    if asyncio.all_tasks(loop):
        loop.run_until_complete(asyncio.sleep(60))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def virtual(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Let an async test run in virtual time, in asyncio's own order."""

    @functools.wraps(test)
    def in_virtual_time(*args: Any, **kwargs: Any) -> None:
        run(test(*args, **kwargs))

    return in_virtual_time


async def settle(steps: int = 30) -> None:
    """Let everything that can go on now go on; no time passes."""
    for _ in range(steps):
        await asyncio.sleep(0)
