"""What belongs to a user and to no session of theirs, in SQLite, and how it leaves the files.

Whatever is deleted is overwritten (``file.connect``), but a page is so only in the WAL at first, and what it
was before is in older frames there. So an erasure ends with moving the WAL into the database and cutting it
to nothing, which waits until no reader needs what was before.

That is not every byte: when SQLite splits or balances pages it leaves copies of rows in their free space,
which no deletion finds. Those stay until the page's space is used again or the file is rebuilt: by ``VACUUM``
or ``rotate-keys``. A backup by ``VACUUM INTO`` has none of them.
"""

import asyncio
from abc import ABC, abstractmethod
from functools import partial

import apsw

from app.domain.erasure import Erased
from app.domain.errors import StoreUnavailable
from app.domain.state import StateScope
from app.stores.sqlite.file import BUSY_TIMEOUT_MS
from app.stores.sqlite.keeper import Files
from app.stores.sqlite.unit import Unit
from app.stores.sqlite.writer import Writer

CUT_WAIT_S = 5.0
"""How long an erasure waits for readers of what was before, such as a backup."""
CUT_PAUSE_S = 0.2
"""Between tries, in which other writes have their turn."""
CUT_BUSY_MS = 20
"""How long a try keeps the writing thread, and every turn's end: enough for this process's own readers."""

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
        """Return when what was deleted, also before, is overwritten and not in the WAL any more."""
        writer, work = self._get_writer(), partial(_forget_user, owner=owner, user_id=user_id)
        erased, owes_cut = await writer.submit(work, "forget_user")
        if owes_cut:
            await _wait_cut(writer)
        return erased


def _list_scopes(connection: apsw.Connection, owner: str, user_id: str) -> tuple[StateScope, ...]:
    rows = connection.execute(_SCOPES, (owner, user_id))
    return tuple(StateScope(row[0], owner, user_id) for row in rows)


async def _wait_cut(writer: Writer) -> None:
    """Return when the WAL has been cut.

    Raises:
        StoreUnavailable: somebody still reads what was before.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + CUT_WAIT_S
    async with writer.cut_line:  # one tries for all who wait
        while not await writer.submit_alone(_cut_wal, "cut_wal"):
            if loop.time() >= until:
                raise StoreUnavailable("What was erased is still in use by who reads the database.")
            await asyncio.sleep(CUT_PAUSE_S)


def _forget_user(unit: Unit, owner: str, user_id: str) -> tuple[Erased, bool]:
    """Return what was removed, and whether the WAL is to be cut for that or what was deleted before."""
    user, connection = (owner, user_id), unit.connection
    before = connection.total_changes()
    scopes = _list_scopes(connection, owner, user_id)
    for scope in scopes:
        connection.execute(_FORGET_STATE, (scope.app_name, *user))
    connection.execute(_FORGET_USAGE.format(which="< 0"), user)
    connection.execute(_FORGET_USAGE.format(which=">= 0"), user)
    erased = Erased(states=len(scopes), usage_days=connection.changes())
    unit.owes_cut |= connection.total_changes() != before
    return erased, unit.owes_cut


def _cut_wal(unit: Unit) -> bool:
    """Cut the WAL unless that was done meanwhile; say whether no reader was in the way."""
    if not unit.owes_cut:
        return True
    unit.connection.set_busy_timeout(CUT_BUSY_MS)
    try:
        unit.connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    except apsw.BusyError:
        return False
    finally:
        unit.connection.set_busy_timeout(BUSY_TIMEOUT_MS)
    unit.owes_cut = False
    return True
