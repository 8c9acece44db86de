"""Purges the database given as the argument and kills itself in the middle, at a step of SQLite's machine."""

import asyncio
import os
import signal
import sys

from app.stores.sqlite import sweep as sqlite_sweep
from app.stores.sqlite.store import SqliteStore

from .builders import LIFE

ROWS_PER_STEP = 50  # so that a kill finds several sessions purged, one half, others not at all


async def _main(path: str, now: int, step: int) -> None:
    sqlite_sweep.ROWS_PER_STEP = ROWS_PER_STEP
    store = SqliteStore(path, LIFE)
    await store.open("purging")
    while (await store.expire_and_purge(now, 0))[0]:
        pass  # so that what follows is the purge alone
    remaining = iter(range(step))

    def count_down() -> bool:
        if next(remaining, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    await store._write("arm", lambda unit: unit.connection.set_progress_handler(count_down, 1))
    await store.expire_and_purge(now, 1_000)
    await store.close()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
