"""Opens the PostgreSQL database given as the argument, makes a session, and says how many it sees."""

import asyncio
import sys

from app.domain.session import SessionQuery
from app.stores.postgres import PostgresStore

from .builders import LIFE, T0, stored_session


async def _main(url: str, name: str) -> None:
    store = PostgresStore(url, LIFE, accept_volatile=True)
    await store.open(name)
    await stored_session(store, name, user_id=name)
    page = await store.list_sessions(SessionQuery(owner="", now=T0, user_id=name))
    await store.close()
    sys.stdout.write(f"{page.total}\n")


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], sys.argv[2]))
