"""Writes turns into the database given as the argument and prints each id once it is stored; is killed."""

import asyncio
import os
import sys

from app.stores.sqlite.store import SqliteStore

from .builders import LIFE, make_session, make_turn, running

CLIENTS = 8


async def _main(path: str, boot_id: str) -> None:
    store = SqliteStore(path, LIFE)
    await store.open(boot_id)

    async def write(number: int) -> None:
        session = make_session(f"{boot_id}-{number}", uid=_unique(number))
        await store.create_session(session)
        while True:
            turn = make_turn(session, turn_id=_unique(number), boot_id=boot_id)
            await store.start_turn(session, running(turn))
            session = await store.commit_turn(session, turn)
            os.write(1, f"{session.key.session_id} {turn.turn_id}\n".encode())

    async with asyncio.TaskGroup() as group:
        for number in range(CLIENTS):
            group.create_task(write(number))


def _unique(number: int) -> str:
    raw = os.urandom(15).hex() + f"{number:02x}"
    return f"{raw[:8]}-{raw[8:12]}-{raw[12:16]}-{raw[16:20]}-{raw[20:]}"


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], sys.argv[2]))
