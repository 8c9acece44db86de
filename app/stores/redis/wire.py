"""One connection for all: commands go out as they come, replies come back in the order of the commands.

A pool takes a connection, and the event loop a wake-up, for each command; here whatever is asked for
in one round of the event loop goes out in one write. Always true:

* a command is queued when ``call`` is first awaited, before anything else may run: from then on it
  goes out, whatever becomes of the caller;
* each command has its place among the replies, so a caller that is cancelled leaves nothing unread;
* a reply that takes longer than ``SOCKET_S`` is the end of the connection, and of all that wait on it;
* the next command makes a new one; all that come meanwhile wait for the same. Once Redis has kept
  somebody waiting in vain they do so for ``GRACE_S`` only: a request may ask more than once.
"""

import asyncio
import logging
import math
from collections import deque
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hiredis import pack_command
from redis import exceptions
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import NoScriptError, ReadOnlyError, RedisError, ResponseError

from app.domain.errors import StoreUnavailable
from app.stores.redis.address import Connect
from app.stores.redis.scripts import load_scripts

CALL_S = 1.2
"""How long a call takes at most, connecting and repeating included."""
GRACE_S = 0.2
"""How long a call waits for a connection to a server that has not answered."""
CLOSE_S = 2.0
_CANCEL_S = 0.05

Word = str | bytes | int | float


def pack(*words: Word) -> bytes:
    """Return a command as it goes over the wire."""
    packed: bytes = pack_command(words)  # type: ignore[arg-type]  # any number of words
    return packed


_log = logging.getLogger(__name__)


class _Lost(Exception):
    """The connection ended before the reply came. ``may_repeat``: it is worth trying another one."""

    def __init__(self, *, may_repeat: bool) -> None:
        self.may_repeat = may_repeat


class _Line:
    """One connection that is up, until it is lost."""

    def __init__(self, connection: AbstractConnection) -> None:
        self._connection = connection
        self._outbox: list[bytes] = []
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._has_words = asyncio.Event()
        self._has_waiting = asyncio.Event()
        self.is_lost = False
        # A store may not know TaskOwner: these two belong to the line, which ends them.
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._work(self._write()), name="redis:write"),
            loop.create_task(self._work(self._read()), name="redis:read"),
        ]

    def send(self, words: tuple[Word, ...]) -> "asyncio.Future[Any]":
        """Queue a command; the future has its reply."""
        future = asyncio.get_running_loop().create_future()
        if self.is_lost:  # since the caller was given the line
            future.set_exception(_Lost(may_repeat=True))
            return future
        self._outbox.append(pack(*words))
        self._waiting.append(future)
        self._has_words.set()
        self._has_waiting.set()
        return future

    async def wait_idle(self) -> None:
        """Return when every reply has come, or none comes any more."""
        while self._waiting and not self.is_lost:
            await asyncio.wait([self._waiting[-1]])

    async def close(self) -> None:
        await end_tasks(self._tasks)
        self._lose(may_repeat=False)
        await self._connection.disconnect(nowait=True)

    async def _write(self) -> None:
        while True:
            await self._has_words.wait()
            self._has_words.clear()
            outbox, self._outbox = self._outbox, []
            await send(self._connection, outbox)

    async def _read(self) -> None:
        while True:
            if not self._waiting:
                self._has_waiting.clear()
                await self._has_waiting.wait()
            try:
                reply = await receive(self._connection)
            except ReadOnlyError as error:
                # This was the primary once; the next connection may be to what is now.
                raise exceptions.ConnectionError from error
            except ResponseError as error:
                reply = error
            future = self._waiting.popleft()
            if future.done():
                continue
            if isinstance(reply, ResponseError):
                future.set_exception(reply)
            else:
                future.set_result(reply)

    async def _work(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:
            if not isinstance(error, RedisError | OSError):
                _log.error("a connection to Redis failed in a way that is not known", exc_info=error)
            self._lose(may_repeat=not isinstance(error, exceptions.TimeoutError))
            for task in self._tasks:
                if task is not asyncio.current_task():
                    task.cancel()
            await self._connection.disconnect(nowait=True)

    def _lose(self, *, may_repeat: bool) -> None:
        self.is_lost = True
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_exception(_Lost(may_repeat=may_repeat))


class Wire:
    """Calls commands and scripts, on whatever connection is up."""

    def __init__(self, connect: Connect, prefix: str) -> None:
        self._connect = connect
        self._prefix = prefix
        self._line: _Line | None = None
        self._connecting: asyncio.Task[_Line] | None = None
        self._is_silent = False
        self._is_closed = False
        self.repeated = 0
        """How many calls were sent again because their connection was lost."""

    async def call(self, *words: Word, repeats: bool = True, writes: bool = False) -> Any:
        """Return the reply to a command.

        ``repeats``: it may be sent again when the connection is lost, once. ``writes``: it may have
        happened if no reply comes.

        Raises:
            StoreUnavailable: no reply came in time, or Redis cannot do it now.
            NoScriptError: it names a script that Redis does not have.
        """
        try:
            async with asyncio.timeout(CALL_S):
                return await self._call(words, repeats)
        except TimeoutError:
            raise StoreUnavailable("Redis does not answer.", outcome_unknown=writes) from None
        except _Lost as error:
            raise StoreUnavailable("The connection to Redis is lost.", outcome_unknown=writes) from error
        except NoScriptError:
            raise
        except ResponseError as error:
            _log.error("Redis refused %s: %s", words[0], error)
            raise StoreUnavailable("Redis refused a command.") from error
        except (RedisError, OSError) as error:
            raise StoreUnavailable("Redis cannot be reached.") from error

    async def run(self, name: str, *words: Word, repeats: bool = True, writes: bool = False) -> Any:
        """Return what a script returns; a server that does not know it is told it first."""
        script = load_scripts()[name]
        call = script.sha, 0, self._prefix, *words
        try:
            return await self.call("EVALSHA", *call, repeats=repeats, writes=writes)
        except NoScriptError:
            await self.call("SCRIPT", "LOAD", script.text)
        return await self.call("EVALSHA", *call, repeats=repeats, writes=writes)

    async def open(self) -> None:
        """Connect.

        Raises:
            StoreUnavailable
        """
        try:
            async with asyncio.timeout(CALL_S):
                await self._get_line()
        except (exceptions.AuthenticationError, exceptions.NoPermissionError) as error:
            raise StoreUnavailable("Redis refuses the user or the password.") from error
        except (RedisError, OSError, TimeoutError) as error:
            raise StoreUnavailable("Redis cannot be reached.") from error

    async def close(self) -> None:
        """Wait for the replies that are due, then close."""
        self._is_closed = True
        if self._connecting is not None:
            await end_tasks([self._connecting])
        if self._line is not None:
            try:
                async with asyncio.timeout(CLOSE_S):
                    await self._line.wait_idle()
            except TimeoutError:
                _log.warning("closed while Redis owed replies")
            await self._line.close()

    async def _call(self, words: tuple[Word, ...], repeats: bool) -> Any:
        line = self._line
        if line is None or line.is_lost:
            line = await self._get_line()
        try:
            return await line.send(words)
        except _Lost as lost:
            self._is_silent = self._is_silent or not lost.may_repeat
            if not repeats or not lost.may_repeat:
                raise
            try:
                line = await self._get_line()
            except (RedisError, OSError) as error:
                raise lost from error  # it has been sent once, and may have been carried out
        self.repeated += 1
        return await line.send(words)

    async def _get_line(self) -> _Line:
        if self._is_closed:
            raise StoreUnavailable("The store is closed.")
        if self._line is not None and not self._line.is_lost:
            return self._line
        if self._connecting is None:
            self._connecting = asyncio.get_running_loop().create_task(self._make_line(), name="redis:connect")
            self._connecting.add_done_callback(self._connected)
        # One attempt for all who wait: a caller that goes takes nobody's connection away.
        try:
            async with asyncio.timeout(GRACE_S if self._is_silent else None):
                return await asyncio.shield(self._connecting)
        except TimeoutError:
            raise StoreUnavailable("Redis does not answer.") from None

    def _connected(self, task: "asyncio.Task[_Line]") -> None:
        self._connecting = None
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._line, self._is_silent = task.result(), False
        elif isinstance(error, exceptions.TimeoutError):
            self._is_silent = True

    async def _make_line(self) -> _Line:
        connection = self._connect()
        try:
            await connect(connection)
            await _load_missing(connection)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return _Line(connection)


async def connect(connection: AbstractConnection) -> None:
    """Connect.

    Raises:
        RedisError, OSError
    """
    with _told_as_lost():
        await connection.connect()  # type: ignore[no-untyped-call]


async def send(connection: AbstractConnection, packed: bytes | list[bytes]) -> None:
    """Send commands over a connection that is up, and never over another one.

    Raises:
        RedisError, OSError: it is up no more.
    """
    with _told_as_lost(connection):
        # redis-py would connect anew, and what is sent then had a place among the old one's replies.
        if not connection.is_connected:
            raise exceptions.ConnectionError("The connection is closed.")
        await connection.send_packed_command(packed, check_health=False)
    _check_cancelled()


async def receive(connection: AbstractConnection, *, for_ever: bool = False) -> Any:
    """Return the next reply, waiting for ``SOCKET_S``, or without a limit.

    Raises:
        ResponseError: it is an error.
        RedisError, OSError: the connection is up no more.
    """
    with _told_as_lost(connection):
        reply = await connection.read_response(disable_decoding=True, timeout=math.inf if for_ever else None)
    _check_cancelled()
    return reply


@contextmanager
def _told_as_lost(connection: AbstractConnection | None = None) -> Iterator[None]:
    """Raise as a lost connection what uvloop and redis-py say of one that has closed meanwhile."""
    try:
        yield
    except RuntimeError as error:
        raise exceptions.ConnectionError("The connection is closed.") from error
    except AttributeError as error:
        # A task that finds the connection ended takes its streams from under the others.
        if connection is None or connection.is_connected:
            raise
        raise exceptions.ConnectionError("The connection is closed.") from error


def _check_cancelled() -> None:
    # redis-py uses asyncio.wait_for, which may swallow a cancellation, and the task would work on for ever.
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def end_tasks(tasks: Sequence["asyncio.Task[Any]"]) -> None:
    """Cancel tasks, and wait until they have ended.

    More than once: redis-py uses ``asyncio.wait_for``, which may swallow a cancellation.
    """
    while running := [task for task in tasks if not task.done()]:
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=_CANCEL_S)


async def _load_missing(connection: AbstractConnection) -> None:
    scripts = list(load_scripts().values())
    await send(connection, pack("SCRIPT", "EXISTS", *(script.sha for script in scripts)))
    known = await receive(connection)
    missing = [script for script, is_known in zip(scripts, known, strict=True) if not is_known]
    loads = [pack("SCRIPT", "LOAD", script.text) for script in missing]
    if loads:
        await send(connection, loads)
        for _ in loads:
            await receive(connection)
