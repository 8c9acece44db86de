"""How what is in SQLite moves to another store, and from one."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import apsw

from app.domain.dump import RestDump, SessionDump
from app.domain.ids import SessionKey
from app.stores import sqlite_dumping, sqlite_loading
from app.stores.alone import Alone
from app.stores.sqlite_keeper import Files
from app.stores.sqlite_starts import Starts
from app.stores.sqlite_unit import Unit

P = ParamSpec("P")
T = TypeVar("T")


class SqliteMoving(Alone, ABC):
    """What makes a store in SQLite a ``MovableStore``, over how that store reads and writes anyway."""

    @abstractmethod
    async def _read(
        self, work: Callable[Concatenate[apsw.Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T: ...
    @abstractmethod
    async def _write(
        self, label: str, work: Callable[Concatenate[Unit, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T: ...
    @abstractmethod
    def _get_files(self) -> Files: ...
    @abstractmethod
    def _get_starts(self) -> Starts: ...

    async def list_after(self, key: SessionKey | None, limit: int) -> tuple[SessionKey, ...]:
        return await self._read(sqlite_dumping.list_after, key, limit)

    async def dump_session(self, key: SessionKey) -> SessionDump | None:
        await self._get_starts().wait_written(key)
        return await self._read(sqlite_dumping.dump_session, self._get_files().names, key)

    async def load_session(self, dump: SessionDump) -> None:
        await self._write("load_session", sqlite_loading.load_session, dump.settled())

    async def dump_rest(self) -> RestDump:
        return await self._read(sqlite_dumping.dump_rest)

    async def load_rest(self, rest: RestDump) -> None:
        await self._write("load_rest", sqlite_loading.load_rest, rest)
