"""Tasks with an owner: named, kept alive, awaited at the end, their failures logged.

``asyncio.create_task`` alone may lose a task to the garbage collector and its
error to nobody. Everything that runs beside a request is spawned here.
"""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_log = logging.getLogger(__name__)


class TaskOwner:
    """Owns every task that it spawned until the task ends.

    ``close`` cancels what still runs and waits for it. A task that fails is logged
    with its name, unless somebody awaits it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        # Not a set: ended in the order in which they began, a run can be repeated.
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(
        self, coroutine: Coroutine[Any, Any, T], name: str, *, is_awaited: bool = False
    ) -> asyncio.Task[T]:
        """Start ``coroutine`` as a task called ``<owner>:<name>`` and keep it until it ends.

        ``is_awaited``: somebody takes its result, and with it the duty to report a failure.

        Raises:
            RuntimeError: the owner is closed; the coroutine is closed unstarted.
        """
        if self._is_closed:
            coroutine.close()
            raise RuntimeError(f"{self._name} is closed")
        task = asyncio.create_task(coroutine, name=f"{self._name}:{name}")  # noqa: TID251
        self._tasks[task] = None
        task.add_done_callback(self._forget if is_awaited else self._ended)
        return task

    async def close(self, grace_s: float = 5.0) -> None:
        """Cancel every task and wait until all have ended, ``grace_s`` at most.

        A task that ignores its cancellation is logged and left behind. Cancelling
        ``close`` itself leaves the rest cancelled but not waited for.
        """
        self._is_closed = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            _, pending = await asyncio.wait(set(self._tasks), timeout=grace_s)
            for task in pending:
                _log.error("task %s ignores its cancellation", task.get_name())

    def _forget(self, task: asyncio.Task[Any]) -> None:
        del self._tasks[task]

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._forget(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("task %s failed", task.get_name(), exc_info=error)
