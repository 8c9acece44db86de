"""What belongs to a user and to no session of theirs, in SQLite, and how it leaves the files.

Whatever is deleted is overwritten (``file.connect``), but a page is so only in the WAL at first, and what it
was before is in older frames there. So an erasure ends with moving the WAL into the database and cutting it
to nothing, which waits until no reader needs what was before.
"""

import asyncio
from abc import ABC, abstractmethod
from functools import partial

import apsw

from app.domain.erasure import Erased
from app.domain.errors import StoreUnavailable
from app.domain.state import StateScope
from app.stores.sqlite.keeper import Files
from app.stores.sqlite.unit import Unit
from app.stores.sqlite.writer import Writer

CUT_TRIES = 5
"""Each waits ``file.BUSY_TIMEOUT_MS`` for readers; between them other writes have their turn."""

# From one application to the next by the index: there are few, and maybe millions of users' states.
_SCOPES = (
    "WITH RECURSIVE apps (name) AS (SELECT min(app_name) FROM shared_state UNION ALL"
    " SELECT (SELECT min(app_name) FROM shared_state WHERE app_name > name) FROM apps WHERE name IS NOT NULL)"
    " SELECT app_name FROM apps CROSS JOIN shared_state ON app_name = name AND owner = ? AND user_id = ?"
)
_FORGET_STATE = "DELETE FROM shared_state WHERE app_name = ? AND owner = ? AND user_id = ?"
_FORGET_USAGE = "DELETE FROM usage_days WHERE owner = ? AND user_id = ? AND day {which}"


class SqliteUsers(ABC):
    """The part of ``SqliteStore`` that forgets users."""

    @abstractmethod
    def _get_writer(self) -> Writer: ...
    @abstractmethod
    def _get_files(self) -> Files: ...

    async def list_scopes(self, owner: str, user_id: str) -> tuple[StateScope, ...]:
        files, work = self._get_files(), partial(_list_scopes, owner=owner, user_id=user_id)
        return await asyncio.get_running_loop().run_in_executor(files.executor, files.read, work)

    async def forget_user(self, owner: str, user_id: str) -> Erased:
        """Return when no byte of what was deleted is in the database or its WAL any more."""
        writer, work = self._get_writer(), partial(_forget_user, owner=owner, user_id=user_id)
        erased = await writer.submit(work, "forget_user")
        for left in reversed(range(CUT_TRIES)):
            try:
                await writer.submit_alone(_cut_wal, "cut_wal")
                break
            except StoreUnavailable as error:
                if not left or not isinstance(error.__cause__, apsw.BusyError):
                    raise
        return erased


def _list_scopes(connection: apsw.Connection, owner: str, user_id: str) -> tuple[StateScope, ...]:
    rows = connection.execute(_SCOPES, (owner, user_id))
    return tuple(StateScope(row[0], owner, user_id) for row in rows)


def _forget_user(unit: Unit, owner: str, user_id: str) -> Erased:
    user, connection = (owner, user_id), unit.connection
    scopes = _list_scopes(connection, owner, user_id)
    for scope in scopes:
        connection.execute(_FORGET_STATE, (scope.app_name, *user))
    connection.execute(_FORGET_USAGE.format(which="< 0"), user)
    connection.execute(_FORGET_USAGE.format(which=">= 0"), user)
    return Erased(states=len(scopes), usage_days=connection.changes())


def _cut_wal(unit: Unit) -> None:
    unit.connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
