"""The leases in Redis, by the server's clock; ``lua/common.lua`` has how they are taken and dropped."""

import asyncio
from collections.abc import Sequence
from secrets import token_urlsafe

from app.domain.errors import LeasedElsewhere, SnapshotUnreadable, StoreUnavailable
from app.domain.ids import SessionKey
from app.domain.lease import Holder, Node
from app.stores.codec import to_body
from app.stores.redis.database import Database
from app.stores.redis.keys import tag_of
from app.stores.redis.turns import to_holder
from app.stores.redis.wakeups import LOOK_S, Wakeups
from app.stores.sealing import NO_KEYS

READY_S = 0.2
"""How long to wait for the subscription before looking without it."""
_COVER = b"node"


class Held:
    """Where the store is opened on; it outlives a close, as the leases object does."""

    def __init__(self) -> None:
        self.db: Database | None = None
        self.wakeups: Wakeups | None = None

    @property
    def open_db(self) -> Database:
        """Return the open database.

        Raises:
            StoreUnavailable: the store is closed.
        """
        if self.db is None:
            raise StoreUnavailable("The store is closed.")
        return self.db


class RedisLeases:
    def __init__(self, held: Held, duration_s: float) -> None:
        self._held = held
        self._duration_s = duration_s

    @property
    def duration_s(self) -> float:
        return self._duration_s

    async def take(self, key: SessionKey, nonce: str) -> None:
        db = self._held.open_db
        other = await db.tell("take", tag_of(key), nonce, db.node.boot_id, db.node.url or "", db.lease_ms)
        if other is not None:
            raise LeasedElsewhere(to_holder(other), session_id=key.session_id)

    async def renew(self, held: Sequence[tuple[SessionKey, str]]) -> tuple[bool, ...]:
        db = self._held.open_db
        if not held:
            return ()
        words = [word for key, nonce in held for word in (tag_of(key), nonce)]
        return tuple(map(bool, await db.tell("renew", db.lease_ms, *words)))

    async def give_back(self, key: SessionKey, nonce: str) -> None:
        await self._held.open_db.tell("giveback", tag_of(key), nonce)

    async def holder(self, key: SessionKey) -> Holder | None:
        found = await self._held.open_db.ask("holder", tag_of(key))
        return None if found is None else to_holder(found[0])

    async def wait_free(self, key: SessionKey, limit_s: float) -> None:
        db, tag = self._held.open_db, tag_of(key)
        assert self._held.wakeups is not None
        with self._held.wakeups.listening(tag) as call:
            try:
                async with asyncio.timeout(limit_s):
                    await _wait(call.ready, READY_S)
                    # Now that what happens is told: is it free already?
                    found = await db.ask("holder", tag)
                    if found is not None:
                        left_s = int(found[1]) / 1000
                        await _wait(call.told, min(left_s, LOOK_S if call.ready.is_set() else READY_S))
            except TimeoutError:
                return

    async def reap(self, limit: int) -> int:
        _, ended = await self._held.open_db.tell("reap", limit, repeats=False)
        return int(ended)

    async def announce(self) -> None:
        db = self._held.open_db
        await db.tell("node", node_word(db.node), db.lease_ms)

    async def nodes(self) -> tuple[Node, ...]:
        found = []
        for raw in await self._held.open_db.ask("node"):
            try:
                boot_id, url = NO_KEYS.open(raw, _COVER)
            except SnapshotUnreadable:
                continue
            found.append(Node(boot_id, url))
        return tuple(sorted(found, key=lambda node: node.boot_id))

    async def secret(self) -> str:
        db = self._held.open_db
        name = db.name("secret")
        await db.wire.call("SET", name, token_urlsafe(32), "NX", writes=True)
        return str((await db.read("GET", name)).decode())


def node_word(node: Node) -> bytes:
    """Return what stands for a node among those that have announced themselves: the same bytes each time."""
    return NO_KEYS.seal(to_body([node.boot_id, node.url]), _COVER)


async def _wait(event: asyncio.Event, limit_s: float) -> None:
    try:
        async with asyncio.timeout(limit_s):
            await event.wait()
    except TimeoutError:
        return
