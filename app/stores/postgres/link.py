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
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import asyncpg

from app.domain.errors import AgentPoolError, StoreUnavailable

CONNECT_S = 1.0
TOTAL_S = 1.2
"""How long a call may take in all: connection, statements, and the second try."""
STATEMENT_S = 1.0
"""How long the server works on a statement before it gives it up, should we be gone by then."""
STALE_S = 5
"""How long the server keeps a transaction open for a process that is cut off."""
CLOSE_S = 1.0
POOL_SIZE = 16

Connection = Any  # asyncpg's pool hands out proxies without a type of their own

T = TypeVar("T")
Work = Callable[[Connection], Awaitable[T]]

_BROKEN = (
    OSError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.IdleInTransactionSessionTimeoutError,
)
_ROLLED_BACK = (
    asyncpg.DeadlockDetectedError,
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
        self._writes: set[asyncio.Task[Any]] = set()  # under way, each for its limit at most
        self.is_open = False

    async def open(self) -> None:
        """Make the pool; nothing is connected yet.

        Raises:
            ValueError: the URL is none. The message never repeats it.
        """
        if self.is_open:
            return
        if isinstance(self._target, str):
            try:
                self._pool = await asyncpg.create_pool(
                    self._target,
                    min_size=0,
                    max_size=self._size,
                    timeout=CONNECT_S,
                    command_timeout=None,
                    reset=_leave_as_is,
                    server_settings={
                        "application_name": "agentpool",
                        "statement_timeout": str(int(STATEMENT_S * 1000)),
                        "idle_in_transaction_session_timeout": str(STALE_S * 1000),
                    },
                )
            except (ValueError, asyncpg.InterfaceError):
                # "from None": the error may quote the URL, and with it a password.
                raise ValueError("The PostgreSQL URL cannot be read.") from None
        else:
            self._pool = self._target
        self.is_open = True

    async def close(self, last: Work[None] | None = None) -> None:
        """Take no call any more, finish the writes under way, do ``last``, and close the pool if it is ours.

        Takes ``TOTAL_S`` for each of the three at most.
        """
        self.is_open = False
        if self._writes:
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
        self, work: Work[T], *, writes: bool = False, repeats: bool = True, limit_s: float = TOTAL_S
    ) -> T:
        """Have ``work`` done on a connection.

        Cancelled, it ends with its connection; but one that ``writes`` is done all the same, in a
        task that ``close`` waits for: so nobody need ask whether it was.

        Where the connection turns out to be broken it is done a second time on another one, if
        ``repeats``; in any case where the server undid it because of somebody else's.

        Raises:
            StoreUnavailable: with ``outcome_unknown`` if it ``writes`` and was under way.
        """
        if not self.is_open:
            raise StoreUnavailable("The store is not open.")
        if not writes:
            return await self._run(work, _Progress(writes), repeats, limit_s)
        running = self._run(work, _Progress(writes), repeats, limit_s)
        task = asyncio.get_running_loop().create_task(running, name="postgres:write")
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        return await asyncio.shield(task)

    async def _run(self, work: Work[T], progress: "_Progress", repeats: bool, limit_s: float) -> T:
        try:
            async with asyncio.timeout(limit_s):
                try:
                    return await self._try(work, progress)
                except (*_BROKEN, *_ROLLED_BACK) as error:
                    if isinstance(error, _BROKEN) and progress.is_under_way and not repeats:
                        raise
                    return await self._try(work, progress)
        except TimeoutError as error:
            raise StoreUnavailable(
                "The database does not answer.", outcome_unknown=progress.is_unknown
            ) from error
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise unavailable(error, outcome_unknown=progress.is_unknown) from error

    async def transact(
        self, work: Work[T], *, writes: bool = True, repeats: bool = False, limit_s: float = TOTAL_S
    ) -> T:
        """As ``run``, in one transaction; one that does not write sees one moment."""

        async def bound(connection: Connection) -> T:
            await connection.execute(
                "BEGIN" if writes else "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY"
            )
            try:
                result = await work(connection)
            except (AgentPoolError, ValueError):
                await connection.execute("ROLLBACK")
                raise
            await connection.execute("COMMIT")
            return result

        return await self.run(bound, writes=writes, repeats=repeats or not writes, limit_s=limit_s)

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

    async def _try(self, work: Work[T], progress: "_Progress") -> T:
        pool = self._pool
        assert pool is not None
        connection = await pool.acquire()
        try:
            progress.begin()
            result = await work(connection)
            progress.end()
        except (AgentPoolError, ValueError):
            # What we decide ourselves is decided between statements.
            progress.end()
            raise
        except asyncpg.PostgresError as error:
            # The server has answered; whether it goes on is told by the kind of error.
            if isinstance(error, _BROKEN) or connection.is_in_transaction():
                connection.terminate()
            if not isinstance(error, _BROKEN):
                progress.end()
            raise
        except BaseException:
            connection.terminate()
            raise
        finally:
            await pool.release(connection)  # which never waits: see ``_leave_as_is``
        return result


class _Progress:
    """How far a call has come."""

    def __init__(self, writes: bool) -> None:
        self._writes = writes
        self.is_under_way = False

    @property
    def is_unknown(self) -> bool:
        return self._writes and self.is_under_way

    def begin(self) -> None:
        self.is_under_way = True

    def end(self) -> None:
        self.is_under_way = False


def unavailable(error: BaseException, *, outcome_unknown: bool = False) -> StoreUnavailable:
    """Translate what asyncpg or the network raised; no message repeats the URL or the password."""
    match error:
        case asyncpg.DiskFullError():
            detail = "The database is full."
        case asyncpg.TooManyConnectionsError():
            detail = "The database has no connection left."
        case asyncpg.ReadOnlySQLTransactionError():
            detail = "The database takes no writes: it is a standby."
        case asyncpg.InvalidAuthorizationSpecificationError():
            detail = "The database refuses the user or the password."
        case asyncpg.InvalidCatalogNameError():
            detail = "The database of this name does not exist."
        case asyncpg.QueryCanceledError():
            detail = "The database takes too long."
        case asyncpg.InsufficientPrivilegeError():
            detail = "The database does not permit what the store needs."
        case OSError() | asyncpg.InterfaceError() | asyncpg.PostgresConnectionError() | ssl.SSLError():
            detail = "The database cannot be reached."
        case asyncpg.OperatorInterventionError():
            detail = "The database is being shut down or started."
        case _:
            _log.error("the database refused a statement: %s: %s", type(error).__name__, error)
            detail = f"The database failed ({type(error).__name__})."
    return StoreUnavailable(detail, outcome_unknown=outcome_unknown)


async def _leave_as_is(connection: Connection) -> None:
    """Save the statement by which asyncpg resets a connection: nothing here changes a session's settings."""


async def _close(pool: "asyncpg.Pool") -> None:
    try:
        async with asyncio.timeout(CLOSE_S):
            await pool.close()
    except TimeoutError:
        pool.terminate()
