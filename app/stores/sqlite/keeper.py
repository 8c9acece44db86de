"""The lock and the connections of an open store, and the threads that read."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event
from typing import TypeVar

import apsw

from app.domain.session import LifeSpan
from app.stores.sealing import Sealer
from app.stores.sqlite import boot, file
from app.stores.sqlite.connection import Connection
from app.stores.sqlite.rows import Names
from app.stores.sqlite.unit import Unit

READERS = 2

T = TypeVar("T")


class Files:
    """The lock and the connections; opened and closed in the writer's thread."""

    def __init__(
        self, path: str, boot_id: str, life: LifeSpan, sealer: Sealer, *, wait_for_lock: bool
    ) -> None:
        self._life = life
        self._sealer = sealer
        self.boot_id = boot_id
        self.names = Names()
        self.directory = os.path.dirname(os.path.realpath(path))
        self._path = path
        self._wait_for_lock = wait_for_lock
        self._given_up = Event()
        self._lock = -1
        self._readers: SimpleQueue[Connection] = SimpleQueue()
        self.executor = ThreadPoolExecutor(READERS, "sqlite-reader")

    def open(self) -> Unit:
        path = file.resolve(self._path)
        self._lock = file.take_lock(path, wait=self._wait_for_lock, given_up=self._given_up)
        unit = None
        try:
            unit = Unit(self._sealed(file.connect(path)), self._life)
            file.migrate(unit.connection)
            boot.begin_boot(unit, self.boot_id)
            for _ in range(READERS):
                self._readers.put(self._sealed(file.connect_reader(path)))
        except BaseException as error:
            self.close(unit)
            if isinstance(error, apsw.Error | OSError):
                raise file.unavailable(error) from error
            raise
        return unit

    def close(self, unit: Unit | None) -> None:
        self.executor.shutdown()
        while not self._readers.empty():
            self._readers.get().close()
        # Last, so that its closing moves the whole WAL into the database.
        if unit is not None:
            unit.connection.close()
        os.close(self._lock)

    def give_up(self) -> None:
        self._given_up.set()

    def rebuild(self) -> None:
        """Leave nothing in the files of what was deleted; called in the executor, while nobody writes."""
        try:
            file.rebuild(file.resolve(self._path))
        except apsw.Error as error:
            raise file.unavailable(error) from error

    def _sealed(self, connection: Connection) -> Connection:
        connection.sealer = self._sealer
        return connection

    def read(self, work: Callable[[Connection], T]) -> T:
        """Run ``work`` in a read transaction; called in the executor, which has a connection per thread."""
        connection = self._readers.get()
        try:
            connection.execute("BEGIN")
            try:
                return work(connection)
            finally:
                connection.execute("ROLLBACK")
        except apsw.Error as error:
            raise file.unavailable(error) from error
        finally:
            self._readers.put(connection)
