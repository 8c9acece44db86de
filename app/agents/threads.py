"""Plain functions as tools: each call in a thread that its turn cannot outlive unseen.

AutoGen runs them in the event loop's default executor. That has a handful of threads,
which also look up host names, and the process does not end before they do: a few calls
that block would take every model, and the shutdown, with them.
"""

import asyncio
import contextlib
import inspect
import threading
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import Any, Final

from autogen_core import CancellationToken
from autogen_core.tools import FunctionTool
from pydantic import BaseModel

from app.agents.token import PruningToken

THREADS_PER_TOOL: Final = 64  # a tool that blocks for ever stops itself, not the others


class ThreadTool(FunctionTool):
    """A function that is not async, as a tool.

    A cancelled call returns at once; its thread cannot be stopped, and the turn's token
    knows of it until it ends. Call ``THREADS_PER_TOOL`` + 1 waits for a thread. A thread
    never keeps the process from ending.
    """

    def __init__(self, function: Callable[..., Any], description: str) -> None:
        super().__init__(function, description)
        self._function = function
        self._wants_token = "cancellation_token" in inspect.signature(function).parameters
        self._free = asyncio.Semaphore(THREADS_PER_TOOL)

    async def run(self, args: BaseModel, cancellation_token: CancellationToken) -> Any:
        """Call the function and return what it returns, or raise what it raises."""
        arguments = {name: getattr(args, name) for name in type(args).model_fields}
        if self._wants_token:
            arguments["cancellation_token"] = cancellation_token
        await self._free.acquire()
        try:
            ended = _start(partial(copy_context().run, self._function, **arguments), f"tool {self.name}")
        except BaseException:
            self._free.release()
            raise
        ended.add_done_callback(lambda _: self._free.release())
        if isinstance(cancellation_token, PruningToken):
            cancellation_token.note_thread(ended)
        return await asyncio.shield(ended)


def _start(call: Callable[[], Any], name: str) -> asyncio.Future[Any]:
    """Start a thread for ``call`` and return the future of its end, which nobody can cancel from here."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[Any] = loop.create_future()

    def tell(settle: Callable[[Any], None], outcome: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, outcome)

    def work() -> None:
        try:
            result = call()
        except StopIteration as error:  # a future does not take it
            tell(ended.set_exception, RuntimeError(repr(error)))
        except BaseException as error:  # SystemExit, too: it is the call's, not the thread's
            tell(ended.set_exception, error)
        else:
            tell(ended.set_result, result)

    threading.Thread(target=work, name=name, daemon=True).start()
    return ended
