"""Cancels a task at its k-th suspension, for every k.

A suspension can be cut in two ways, and both happen: while what it waits for is still
open, and in the very tick in which that has come (the result is there, but the task has
not seen it yet).
"""

import asyncio
from collections.abc import Callable, Coroutine, Generator
from enum import Enum
from typing import Any

from tests.simulation.loop import run


class Cut(Enum):
    BEFORE = "before what it waits for has come"
    TOGETHER = "in the tick in which it came"


class CutAt:
    """Awaits ``coroutine`` and cancels the task around it at suspension ``k``, counted from 0."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], k: int, cut: Cut) -> None:
        self._coroutine = coroutine
        self._k = k
        self._cut = cut
        self.was_cut = False

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self._coroutine.__await__()
        count = 0
        resume: Callable[[], Any] = lambda: next(steps)  # noqa: E731
        while True:
            try:
                waited_for = resume()
            except StopIteration as end:
                return end.value
            if count == self._k:
                self._arrange_cut(waited_for)
            count += 1
            try:
                yield waited_for
                resume = lambda: next(steps)  # noqa: E731
            except BaseException as error:
                resume = lambda error=error: steps.throw(error)  # noqa: E731

    def _arrange_cut(self, waited_for: Any) -> None:
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()

        def cut(*_: Any) -> None:
            self.was_cut = True
            task.cancel()

        if self._cut is Cut.TOGETHER and waited_for is not None:
            # Added before the task's own wake-up, so it runs first when the result has come.
            waited_for.add_done_callback(cut)
        else:
            loop.call_soon(cut)


Scene = Callable[[Callable[[Coroutine[Any, Any, Any]], Coroutine[Any, Any, bool]]], Coroutine[Any, Any, None]]


def cut_everywhere(scene: Scene) -> int:
    """Play ``scene`` again and again, cutting its victim at every suspension there is.

    The scene gets ``victim(coroutine)``: await it to have the coroutine carried out in a
    task of its own and cut; it says whether it was cut. Returns how many cuts were made.
    """
    cuts = 0
    for cut in Cut:
        for k in range(1000):
            if not _play(scene, k, cut):
                break
            cuts += 1
    return cuts


def _play(scene: Scene, k: int, cut: Cut) -> bool:
    was_cut = False

    async def victim(coroutine: Coroutine[Any, Any, Any]) -> bool:
        nonlocal was_cut
        cutter = CutAt(coroutine, k, cut)

        async def body() -> None:
            await cutter

        task = asyncio.get_running_loop().create_task(body(), name="victim")
        await asyncio.wait([task])
        was_cut = cutter.was_cut
        if not task.cancelled() and not was_cut:
            task.result()
        elif not task.cancelled():
            task.exception()
        return was_cut

    try:
        run(scene(victim))
    except Exception as error:
        error.add_note(f"cut at suspension {k}, {cut.value}")
        raise
    return was_cut
