"""Connections to the server, with time limits of our own: no call waits for it longer than ``TOTAL_S``.

asyncpg's limits do not bound a server that is frozen: it cancels a statement over a second
connection, and waits for that one. Here whatever a statement did not answer to ends with its
connection, at once and without a word to the server, and the next call makes a new one.
Always true: a connection goes back into the pool only if the server has answered everything
that it was asked, and no transaction is open on it.

What was under way on a connection that ended is either done as a whole or not at all: a
single statement may yet be carried out, an open transaction is rolled back by the server.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from secrets import randbelow
from typing import Any, TypeVar

import asyncpg

from app.domain.errors import AgentPoolError, StoreUnavailable
from app.stores.postgres.refusal import unavailable

CONNECT_S = 1.0
TOTAL_S = 1.0
"""How long a call may take in all: connection, statements, and the second try."""
SILENT_S = 0.25
"""How long one may take after another went without an answer, until there is one again: a request makes
several calls, and is not to wait for each in turn. Connecting may take longer: a probe does it for all."""
STATEMENT_S = 0.9
"""How long the server works on a statement before it gives it up: less than ``TOTAL_S``, so that one that is
only slow is not mistaken for a silent server."""
LOCK_S = 0.3
"""How long a statement waits for another one's rows. Two that wait for each other end by it: PostgreSQL
looks for such pairs after ``deadlock_timeout``, a second, when no call is there any more to be done again."""
STALE_S = 5
"""How long the server keeps a transaction open for a process that is cut off."""
CLOSE_S = 1.0
POOL_SIZE = 16
SHARDS = 64
"""As many as the schema has rows of counters."""

Connection = Any  # asyncpg's pool hands out proxies without a type of their own

T = TypeVar("T")
Work = Callable[[Connection], Awaitable[T]]

_BROKEN = (
    OSError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # what a statement finds on a connection that is just being ended
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.IdleInTransactionSessionTimeoutError,
)
_ROLLED_BACK = (
    asyncpg.DeadlockDetectedError,
    asyncpg.LockNotAvailableError,
    asyncpg.SerializationError,
    asyncpg.UniqueViolationError,
)
"""The server undid the statement because of another one, so it may be tried again."""

_log = logging.getLogger(__name__)


class Link:
    """The pool; ``target`` is a URL, or a pool of somebody else's, which stays open."""

    def __init__(self, target: "str | asyncpg.Pool", size: int = POOL_SIZE) -> None:
        self._target = target
        self._size = size
        self._pool: asyncpg.Pool | None = None
        self._shards = count(randbelow(SHARDS))
        self._writes: set[asyncio.Task[Any]] = set()  # under way, each for its limit at most
        self._is_silent = False  # the last call that ended had no answer
        self._probing: asyncio.Task[None] | None = None
        self._places = asyncio.Semaphore(size)
        self.is_open = False

    async def open(self) -> None:
        """Make the pool, and see whether it can connect.

        Raises:
            StoreUnavailable: it cannot. The message never repeats the URL.
        """
        if self.is_open:
            return
        self._is_silent = False
        self._pool = await self._make_pool() if isinstance(self._target, str) else self._target
        self._places = asyncio.Semaphore(self._pool.get_max_size())
        self.is_open = True
        try:
            await self.run(_look, repeats=False)
        except ValueError:
            # "from None": the error may quote the URL, and with it a password.
            await self.close()
            raise StoreUnavailable("The PostgreSQL URL cannot be read.") from None
        except BaseException:
            await self.close()
            raise

    async def close(self, last: Work[None] | None = None) -> None:
        """Take no call any more, finish the writes under way, do ``last``, and close the pool if it is ours.

        Takes ``TOTAL_S`` for each of the three at most.
        """
        self.is_open = False
        if self._probing is not None:
            self._probing.cancel()
        while self._writes:
            await asyncio.wait(self._writes)
        try:
            if last is not None:
                await self._run(last, _Progress(writes=True), repeats=True, limit_s=TOTAL_S)
        finally:
            pool, self._pool = self._pool, None
            if pool is not None and pool is not self._target:
                await _close(pool)

    def wait_written(self) -> "asyncio.Future[Any]":
        """Return what is done when all writes that are under way now have ended, well or not."""
        return asyncio.gather(*map(asyncio.shield, self._writes), return_exceptions=True)

    async def run(
        self,
        work: Work[T],
        *,
        writes: bool = False,
        repeats: bool = True,
        undo: Work[None] | None = None,
    ) -> T:
        """Have ``work`` done on a connection.

        Cancelled, it ends with its connection; but one that ``writes`` is done all the same, in a
        task that ``close`` waits for: so nobody need ask whether it was. With ``undo`` that is done
        after it then.

        Where the connection turns out to be broken it is done again on another one if it ``repeats``,
        and once more in any case where the server undid it because of somebody else's.

        Raises:
            StoreUnavailable: with ``outcome_unknown`` if it ``writes`` and was under way.
        """
        return await self._start(work, _Progress(writes), repeats, TOTAL_S, undo)

    async def transact(
        self, work: Work[T], *, writes: bool = True, repeats: bool = False, limit_s: float = TOTAL_S
    ) -> T:
        """As ``run``, in one transaction; one that does not write sees one moment.

        Only its end is not repeated unless it ``repeats``: what was not ended never was.
        """
        progress = _Progress(writes)

        async def bound(connection: Connection) -> T:
            progress.is_under_way = False
            await connection.execute(
                "BEGIN" if writes else "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY"
            )
            try:
                result = await work(connection)
            except (AgentPoolError, ValueError):
                await connection.execute("ROLLBACK")
                raise
            progress.is_under_way = True
            await connection.execute("COMMIT")
            return result

        return await self._start(bound, progress, repeats or not writes, limit_s)

    async def _start(
        self,
        work: Work[T],
        progress: "_Progress",
        repeats: bool,
        limit_s: float,
        undo: Work[None] | None = None,
    ) -> T:
        if not self.is_open:
            raise StoreUnavailable("The store is not open.")
        if not progress.writes:
            return await self._run(work, progress, repeats, limit_s)
        task = self._spawn(self._run(work, progress, repeats, limit_s))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_hear)
            if undo is not None:
                self._spawn(self._undo(task, undo))
            raise

    def _spawn(self, coroutine: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        task = asyncio.get_running_loop().create_task(coroutine, name="postgres:write")
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        return task

    async def _undo(self, task: "asyncio.Task[Any]", undo: Work[None]) -> None:
        await asyncio.wait([task])
        try:
            await self._run(undo, _Progress(writes=True), repeats=True, limit_s=TOTAL_S)
        except StoreUnavailable as error:
            _log.warning("what nobody waited for is not undone: %s", error.detail)

    async def _run(self, work: Work[T], progress: "_Progress", repeats: bool, limit_s: float) -> T:
        is_hurried = self._is_silent and limit_s == TOTAL_S
        if is_hurried:
            limit_s = SILENT_S
            self._probe()
        try:
            async with asyncio.timeout(limit_s):
                # A server that was restarted has broken every connection of the pool.
                for _ in range(self._size):
                    try:
                        return await self._try(work, progress)
                    except ValueError:
                        raise  # asyncpg's complaint about the URL is one, and an InterfaceError
                    except _ROLLED_BACK:
                        break
                    except _BROKEN:
                        progress.was_lost |= progress.is_under_way
                        if not progress.was_connected or (progress.is_under_way and not repeats):
                            raise
                return await self._try(work, progress)
        except TimeoutError as error:
            if progress.has_place and not is_hurried:
                self._is_silent = True
            raise StoreUnavailable(
                "The database does not answer.", outcome_unknown=progress.is_unknown
            ) from error
        except (*_BROKEN, asyncpg.PostgresError) as error:
            raise unavailable(error, outcome_unknown=progress.is_unknown) from error

    def _probe(self) -> None:
        """See to it that one, and only one, asks the server with all the time that connecting takes."""
        if self._probing is None or self._probing.done():
            self._probing = asyncio.get_running_loop().create_task(self._ask(), name="postgres:probe")

    async def _ask(self) -> None:
        try:
            connection = await self.connect_alone()
            try:
                async with asyncio.timeout(TOTAL_S):
                    await _look(connection)
            finally:
                connection.terminate()
        except asyncpg.PostgresError:
            pass  # an answer, too
        except (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError):
            return
        self._is_silent = False

    async def connect_alone(self) -> "asyncpg.Connection":
        """Return a connection for as long as the caller likes, who ends it by ``terminate``.

        It is one of the pool's where that is somebody else's.

        Raises:
            OSError, asyncpg.PostgresError, asyncpg.InterfaceError
        """
        async with asyncio.timeout(CONNECT_S):
            if isinstance(self._target, str):
                return await asyncpg.connect(self._target, timeout=CONNECT_S)
            return await self._target.acquire()

    async def _make_pool(self) -> "asyncpg.Pool":
        return await asyncpg.create_pool(
            self._target,
            min_size=0,
            max_size=self._size,
            timeout=CONNECT_S,
            command_timeout=None,
            init=self._give_shard,
            reset=_leave_as_is,
            server_settings={
                "application_name": "agentpool",
                "statement_timeout": str(int(STATEMENT_S * 1000)),
                "lock_timeout": str(int(LOCK_S * 1000)),
                "idle_in_transaction_session_timeout": str(STALE_S * 1000),
            },
        )

    async def _give_shard(self, connection: Connection) -> None:
        # In turn, from anywhere: so those of one process differ, and mostly those of all.
        await connection.execute(f"SET agentpool.shard = {next(self._shards) % SHARDS}")

    async def _try(self, work: Work[T], progress: "_Progress") -> T:
        pool = self._pool
        assert pool is not None
        progress.was_connected = progress.has_place = False
        async with self._places:
            progress.has_place = True
            return await self._try_on(await pool.acquire(), pool, work, progress)

    async def _try_on(
        self, connection: Connection, pool: "asyncpg.Pool", work: Work[T], progress: "_Progress"
    ) -> T:
        try:
            progress.was_connected = progress.is_under_way = True
            result = await work(connection)
            # It stays under way: time may run out before the caller has the result.
            self._is_silent = False
        except (AgentPoolError, ValueError):
            # What we decide ourselves is decided between statements.
            progress.is_under_way = False
            raise
        except asyncpg.PostgresError as error:
            # The server has answered; whether it goes on is told by the kind of error.
            if isinstance(error, _BROKEN):
                _end(connection)
            else:
                progress.is_under_way = self._is_silent = False
                if connection.is_in_transaction():
                    _end(connection)
            raise
        except BaseException:
            _end(connection)
            raise
        finally:
            await pool.release(connection)  # which never waits: see ``_leave_as_is``
        return result


@dataclass(slots=True)
class _Progress:
    """How far a call has come: ``is_under_way`` while what it asked may be carried out, answered or not.

    ``was_lost``: an earlier try ended like that, whatever becomes of the next. ``has_place``: it does not
    wait for others of this process, but for the server.
    """

    writes: bool
    has_place: bool = False
    was_connected: bool = False
    is_under_way: bool = False
    was_lost: bool = False

    @property
    def is_unknown(self) -> bool:
        return self.writes and (self.is_under_way or self.was_lost)


def _hear(task: "asyncio.Task[Any]") -> None:
    """Take note of how a write ended that nobody waits for: that it was refused concerns nobody any more."""
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, AgentPoolError):
        _log.error("a write that nobody waits for failed", exc_info=error)


def _end(connection: Connection) -> None:
    # The pool takes back at once what asyncpg itself finds broken.
    with suppress(asyncpg.InterfaceError):
        connection.terminate()


async def _look(connection: Connection) -> None:
    await connection.execute("SELECT 1")


async def _leave_as_is(connection: Connection) -> None:
    """Save the statement by which asyncpg resets a connection: nothing here changes a session's settings."""


async def _close(pool: "asyncpg.Pool") -> None:
    try:
        async with asyncio.timeout(CLOSE_S):
            await pool.close()
    except TimeoutError:
        pool.terminate()
