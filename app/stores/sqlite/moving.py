"""How what is in SQLite moves to another store, and from one.

A session goes as a whole, however many turns it has, and waits for others that do. So these calls
have more patience than those that serve somebody.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from app.domain.dump import RestDump, SessionDump
from app.domain.errors import StoreUnavailable
from app.domain.ids import SessionKey
from app.domain.session import Session
from app.ports.moving import Resealed
from app.stores.alone import Alone
from app.stores.sqlite import dumping, loading
from app.stores.sqlite.connection import Connection
from app.stores.sqlite.keeper import Files
from app.stores.sqlite.starts import Starts
from app.stores.sqlite.writer import Writer

PATIENCE_S = 600.0

T = TypeVar("T")


class SqliteMoving(Alone, ABC):
    """What makes a store in SQLite a ``MovableStore``."""

    @abstractmethod
    def _get_writer(self) -> Writer: ...
    @abstractmethod
    def _get_files(self) -> Files: ...
    @abstractmethod
    def _get_starts(self) -> Starts: ...

    async def list_after(self, key: SessionKey | None, limit: int) -> tuple[SessionKey, ...]:
        return await self._look(partial(dumping.list_after, key=key, limit=limit))

    async def dump_session(self, key: SessionKey) -> SessionDump | None:
        await self._get_starts().wait_written(key)
        names = self._get_files().names
        return await self._look(partial(dumping.dump_session, names=names, key=key))

    async def load_session(self, dump: SessionDump, *, over: Session | None = None) -> None:
        work = partial(loading.load_session, dump=dump.settled(), over=over)
        await _wait(self._get_writer().submit(work, "load_session"))

    async def dump_rest(self) -> RestDump:
        return await self._look(dumping.dump_rest)

    async def load_rest(self, rest: RestDump) -> None:
        work = partial(loading.load_rest, rest=rest)
        await _wait(self._get_writer().submit(work, "load_rest"))

    async def reseal_rest(self) -> Resealed:
        return await _wait(self._get_writer().submit(loading.reseal_rest, "reseal_rest"))

    async def scrub(self) -> None:
        files = self._get_files()
        await _wait(asyncio.get_running_loop().run_in_executor(files.executor, files.rebuild))

    async def _look(self, work: Callable[[Connection], T]) -> T:
        files = self._get_files()
        return await _wait(asyncio.get_running_loop().run_in_executor(files.executor, files.read, work))


async def _wait(done: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(PATIENCE_S):
            return await done
    except TimeoutError as error:
        raise StoreUnavailable("The database takes too long.", outcome_unknown=True) from error
