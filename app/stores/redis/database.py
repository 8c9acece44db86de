"""One opened Redis as everything in this package sees it: how records are read, and drafts written.

Who writes reads the record, makes a draft by the rules, and hands it over with the token that it read.
If somebody has written since, nothing happens, and all begins anew with what is there now.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from app.domain.errors import SessionNotFound, StoreUnavailable
from app.domain.ids import SessionKey, to_id_bytes
from app.domain.lease import Node
from app.domain.session import LifeSpan, Session
from app.stores.redis import keys, rows
from app.stores.redis.draft import Draft, activity_words, head_word
from app.stores.redis.ground import Fence
from app.stores.redis.rows import Record
from app.stores.redis.seen import Seen
from app.stores.redis.wire import Wire, Word
from app.stores.sealing import Sealer

TRIES = 50
"""How often a write begins anew because others were faster; each time one of them has got on."""

SCANNED_KEYS = 500
"""Keys that a step of a scan looks at; meanwhile no turn is served."""

T = TypeVar("T")


class Database:
    def __init__(
        self,
        wire: Wire,
        prefix: str,
        life: LifeSpan,
        node: Node,
        lease_ms: int,
        fence: Fence | None,
        sealer: Sealer,
    ) -> None:
        self.wire = wire
        self.prefix = prefix
        self.life = life
        self.node = node
        self.lease_ms = lease_ms
        self.seen = Seen()
        self.session_count: int | None = None
        self.sealer = sealer
        self._fence = fence
        self._queues: dict[object, list[asyncio.Future[None]]] = {}

    def name(self, rest: str) -> str:
        """Return the name of a key that is of no session."""
        return f"{self.prefix}:{rest}"

    def room(self, tag: str, letter: str) -> str:
        """Return the name of a session's key; ``lua/common.lua`` says which there are."""
        return f"{self.prefix}:{{{tag}}}:{letter}"

    async def read(self, *words: Word) -> Any:
        return await self.wire.call(*words)

    async def ask(self, script: str, *words: Word) -> Any:
        """Run a script that only reads."""
        return await self.wire.run(script, *words)

    async def tell(self, script: str, *words: Word, repeats: bool = True) -> Any:
        """Run a script that writes, and wait for the disk if that is asked for."""
        reply = await self.wire.run(script, *words, repeats=repeats, writes=True)
        if self._fence is not None:
            await self._fence.wait()
        return reply

    async def close(self) -> None:
        """End what waits for the disk."""
        if self._fence is not None:
            await self._fence.close()

    async def find_record(self, key: SessionKey, uid: str | None = None) -> Record | None:
        """Return the record; with ``uid`` that of this incarnation only.

        Raises:
            SnapshotUnreadable
        """
        found = await self.read("HMGET", self.room(keys.tag_of(key), "s"), "u", "r", "j", "w")
        # Before it is read: a broken one of another incarnation is no concern of this.
        if found[0] is None or (uid is not None and found[0] != to_id_bytes(uid)):
            self.seen.drop(key)
            return None
        record = rows.from_record(self.sealer, key, *found[1:])
        self.seen.put(record)
        return record

    async def get_by_key(self, key: SessionKey) -> Record:
        """Return the record.

        Raises:
            SessionNotFound, SnapshotUnreadable
        """
        record = await self.find_record(key)
        if record is None:
            raise SessionNotFound(session_id=key.session_id)
        return record

    async def get_record(self, session: Session) -> Record:
        """Return the record of this very incarnation.

        Raises:
            SessionNotFound, SnapshotUnreadable
        """
        record = await self.find_record(session.key, session.uid)
        if record is None:
            raise SessionNotFound(session_id=session.key.session_id)
        return record

    async def write(self, draft: Draft, *, turn: bytes = b"", nonce: str = "") -> tuple[Record, bool] | None:
        """Let ``draft`` happen unless somebody has written since; return the record then.

        Also whether an idempotency key of it was another turn's. ``None``: nothing happened, also if
        ``turn`` has ended. ``nonce`` is that of a lease to give back in the same step.

        Raises:
            SessionNotFound: this incarnation is gone.
        """
        was, record = draft.was, draft.to_record(new_token())
        session, commands = record.session, list(draft.commands)
        if record.json != was.json:
            commands += [4, "HSET", "s", "j", record.json] if record.json else [3, "HDEL", "s", "j"]
        if session.agent_id != was.session.agent_id:
            commands += [2, "reindex", "\n".join(keys.indexes_of(session))]
        reply = await self.tell(
            "apply", was.tag, was.uid, was.token, record.token, turn, nonce, head_word(session),
            rows.to_record(self.sealer, record), *activity_words(session, draft.now, self.life),
            session.last_accessed - was.session.last_accessed, *commands,
        )  # fmt: skip
        if reply[0] == b"ok":
            self.seen.put(record)
            return record, bool(reply[1])
        self.seen.drop(session.key)
        if reply[0] == b"gone":
            raise SessionNotFound(session_id=session.key.session_id)
        return None

    def check_heard(self, repeated: int) -> None:
        """Refuse to begin a write anew that says it did not happen, but was sent twice.

        It may have happened unheard, if somebody wrote in between. ``repeated`` is from before it.

        Raises:
            StoreUnavailable: calls were repeated meanwhile.
        """
        if self.wire.repeated != repeated:
            raise StoreUnavailable("Whether a write happened is not known.", outcome_unknown=True)

    async def scan(self, begin: str, rest: str = "*") -> AsyncIterator[str]:
        """Yield what follows ``begin`` in the names of keys of no session, each once; ``rest`` is a pattern.

        Looks at all keys there are, some at a time.
        """
        prefix = self.name(begin)
        escaped = "".join(f"\\{char}" if char in "*?[]\\" else char for char in prefix)
        cursor, seen = b"0", set()
        while True:
            cursor, found = await self.read("SCAN", cursor, "MATCH", escaped + rest, "COUNT", SCANNED_KEYS)
            for name in found:
                if name not in seen:
                    seen.add(name)
                    yield name.decode().removeprefix(prefix)
            if cursor == b"0":
                return

    async def change(self, read: Callable[[], Awaitable[T]], attempt: Callable[[T], Awaitable[bool]]) -> None:
        """Read and attempt until an attempt says that it is done.

        Raises:
            StoreUnavailable: others were faster every time.
        """
        for _ in range(TRIES):
            if await attempt(await read()):
                return
        raise StoreUnavailable("Too many write here at once.")

    @asynccontextmanager
    async def alone(self, what: object) -> AsyncIterator[None]:
        """Let this process's writers to the same thing go one after the other, in the order they came.

        They need not: it spares those that would begin anew. Cancelled, a waiter lets the next go.
        What Redis did not do for one is not asked for by those behind: each would wait as long again.
        """
        queue = self._queues.setdefault(what, [])
        mine = asyncio.get_running_loop().create_future()
        queue.append(mine)
        try:
            if queue[0] is not mine:
                await mine
            yield
        except StoreUnavailable as error:
            for waiting in queue:
                if waiting is not mine and not waiting.done():
                    waiting.set_exception(StoreUnavailable(error.detail))
            raise
        finally:
            is_first = queue[0] is mine
            queue.remove(mine)
            if not queue:
                del self._queues[what]
            elif is_first and not queue[0].done():
                queue[0].set_result(None)


def new_token() -> bytes:
    """Return what names a write: never used before, also by a server that has lost its last writes."""
    return os.urandom(12)
