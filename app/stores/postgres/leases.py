"""Leases in a table, by the database's clock; who waits for one is woken by NOTIFY.

A NOTIFY makes commits queue behind one lock, so the end of a lease is only told where its
row says that somebody waits. The listening connection is made when the first one does, and
made again by whoever waits next after it broke; meanwhile a waiter looks again every
``LOOK_AGAIN_S``. As a connection may be dead without a word, nobody trusts it for longer than
``TRUST_S``.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from secrets import token_urlsafe
from typing import Any

import asyncpg

from app.domain.errors import AgentPoolError, LeasedElsewhere, StoreUnavailable
from app.domain.ids import SessionKey, to_id_bytes
from app.domain.lease import Holder, Node
from app.stores.postgres.link import Connection, Link, Work
from app.stores.postgres.tree import raw_key

LOOK_AGAIN_S = 0.25
TRUST_S = 2.0
ANSWER_S = 1.0

_TAKE = "SELECT * FROM take_lease($1, $2, $3, NULL, $4, $5, $6)"
_RENEW = (
    "UPDATE leases AS l SET until = clock_timestamp() + make_interval(secs => $4)"
    " FROM unnest($1::bytea[], $2::bytea[], $3::text[]) AS h (owner, session_id, nonce)"
    " WHERE l.owner = h.owner AND l.session_id = h.session_id AND l.nonce = h.nonce"
    " RETURNING l.owner, l.session_id, l.nonce"
)
_GIVE_BACK = "SELECT give_back($1, $2, $3, $4)"
_HOLDER = (
    "SELECT boot_id, url, nonce, turn_id IS NOT NULL FROM leases"
    " WHERE owner = $1 AND session_id = $2 AND until > clock_timestamp()"
)
_AWAIT = (
    "UPDATE leases SET is_awaited = true WHERE owner = $1 AND session_id = $2 AND until > clock_timestamp()"
    " RETURNING extract(epoch FROM until - clock_timestamp())::float8"
)
_REAP = "SELECT reap_leases($1)"
_ANNOUNCE = (
    "INSERT INTO nodes (boot_id, url, until) VALUES ($1, $2, clock_timestamp() + make_interval(secs => $3))"
    " ON CONFLICT (boot_id) DO UPDATE SET url = excluded.url, until = excluded.until"
)
_FORGET_NODES = "DELETE FROM nodes WHERE until < clock_timestamp() - make_interval(secs => 10 * $1)"
_NODES = "SELECT boot_id, url FROM nodes WHERE until > clock_timestamp() ORDER BY boot_id"
_ADD_SECRET = "INSERT INTO settings (name, value) VALUES ('secret', $1) ON CONFLICT (name) DO NOTHING"  # noqa: S105  # its name, not a secret
_SECRET = "SELECT value FROM settings WHERE name = 'secret'"  # noqa: S105  # its name, not a secret

_log = logging.getLogger(__name__)


class PostgresLeases:
    """The leases as one process sees them."""

    def __init__(self, link: Link, duration_s: float) -> None:
        self._link = link
        self._duration_s = duration_s
        self._listener = _Listener(link)
        self.node = Node("")

    @property
    def duration_s(self) -> float:
        return self._duration_s

    async def take(self, key: SessionKey, nonce: str) -> None:
        async def work(connection: Connection) -> Any:
            node = self.node
            return await connection.fetchrow(
                _TAKE, *raw_key(key), nonce, node.boot_id, node.url, self._duration_s
            )

        is_taken, *holder = await self._link.run(work, writes=True, undo=self.giving_back(key, nonce))
        if not is_taken:
            raise LeasedElsewhere(_holder_of(holder), session_id=key.session_id)

    async def renew(self, held: Sequence[tuple[SessionKey, str]]) -> tuple[bool, ...]:
        raw = [(*raw_key(key), nonce) for key, nonce in held]

        async def work(connection: Connection) -> set[tuple[Any, ...]]:
            columns = [[one[place] for one in raw] for place in range(3)]
            return {tuple(row) for row in await connection.fetch(_RENEW, *columns, self._duration_s)}

        renewed = await self._link.run(work, writes=True) if raw else set()
        return tuple(one in renewed for one in raw)

    async def give_back(self, key: SessionKey, nonce: str) -> None:
        await self._link.run(self.giving_back(key, nonce), writes=True)

    async def give_back_after(self, error: AgentPoolError, key: SessionKey, nonce: str) -> None:
        """Give back what was taken before ``error``, which says so if that fails."""
        try:
            await self.give_back(key, nonce)
        except StoreUnavailable:
            if isinstance(error, StoreUnavailable):
                error.outcome_unknown = True

    def giving_back(self, key: SessionKey, nonce: str) -> Work[None]:
        """Return what gives a lease back, also for when nobody waits for it any more."""
        try:
            turn_id = to_id_bytes(nonce)
        except ValueError:
            turn_id = None

        async def work(connection: Connection) -> None:
            await connection.execute(_GIVE_BACK, *raw_key(key), nonce, turn_id)

        return work

    async def holder(self, key: SessionKey) -> Holder | None:
        async def work(connection: Connection) -> Any:
            return await connection.fetchrow(_HOLDER, *raw_key(key))

        row = await self._link.run(work)
        return None if row is None else _holder_of(row)

    async def wait_free(self, key: SessionKey, limit_s: float) -> None:
        """As the port says; ``limit_s`` holds also where the server does not answer."""
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                is_free = await self._wait_a_while(key)
                while not is_free:
                    is_free = await self._wait_a_while(key, heard_nothing=True)

    async def _wait_a_while(self, key: SessionKey, *, heard_nothing: bool = False) -> bool:
        """Say whether the session has come free; if not, nothing was heard of it for that while."""
        is_listening = await self._listener.listen(is_doubtful=heard_nothing)
        with self._listener.waiting_for(key) as woken:

            async def work(connection: Connection) -> float | None:
                left: float | None = await connection.fetchval(_AWAIT, *raw_key(key))
                return left

            # Said before it is waited for: who gives the session back from now on sees it.
            left_s = await self._link.run(work, writes=True)
            if left_s is None:
                return True
            try:
                async with asyncio.timeout(min(left_s, TRUST_S if is_listening else LOOK_AGAIN_S)):
                    await woken
            except TimeoutError:
                return False
            return True

    async def reap(self, limit: int) -> int:
        async def work(connection: Connection) -> int:
            ended: int = await connection.fetchval(_REAP, limit)
            return ended

        return await self._link.run(work, writes=True)

    async def announce(self) -> None:
        async def work(connection: Connection) -> None:
            await connection.execute(_ANNOUNCE, self.node.boot_id, self.node.url, self._duration_s)
            await connection.execute(_FORGET_NODES, self._duration_s)

        await self._link.run(work, writes=True)

    async def nodes(self) -> tuple[Node, ...]:
        async def work(connection: Connection) -> list[Any]:
            rows: list[Any] = await connection.fetch(_NODES)
            return rows

        return tuple(Node(*row) for row in await self._link.run(work))

    async def secret(self) -> str:
        made = token_urlsafe(32)

        async def work(connection: Connection) -> str:
            found: str | None = await connection.fetchval(_SECRET)
            if found is None:
                await connection.execute(_ADD_SECRET, made)
                found = await connection.fetchval(_SECRET)
            assert found is not None
            return found

        return await self._link.run(work, writes=True)

    def close(self) -> None:
        """Wake everybody, and listen no more."""
        self._listener.close()


class _Waiting:
    """One who waits; leaving the context takes him from the list."""

    def __init__(self, listener: "_Listener", name: str) -> None:
        self._listener = listener
        self._name = name
        self._future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def __enter__(self) -> "asyncio.Future[None]":
        self._listener.waiters.setdefault(self._name, set()).add(self._future)
        return self._future

    def __exit__(self, *_: object) -> None:
        others = self._listener.waiters.get(self._name)
        if others is not None:
            others.discard(self._future)
            if not others:
                del self._listener.waiters[self._name]


class _Listener:
    """The connection that hears of leases that end."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._connection: asyncpg.Connection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self.waiters: dict[str, set[asyncio.Future[None]]] = {}

    async def listen(self, *, is_doubtful: bool = False) -> bool:
        """Say whether what ends from now on is heard; connects if need be, once for all who ask meanwhile.

        Where that ``is_doubtful``, the connection is asked whether it is there still.
        """
        if is_doubtful or self._connection is None or self._connection.is_closed():
            if self._connecting is None or self._connecting.done():
                loop = asyncio.get_running_loop()
                self._connecting = loop.create_task(self._try_to_connect(), name="postgres:listen")
            # Whoever is cancelled leaves the others their attempt; ``close`` ends it.
            await asyncio.wait([self._connecting])
        return self._connection is not None

    def waiting_for(self, key: SessionKey) -> _Waiting:
        owner, session_id = raw_key(key)
        return _Waiting(self, f"{owner.hex()}/{session_id.hex()}")

    def close(self) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()
        self._wake_all()

    async def _try_to_connect(self) -> None:
        connection = self._connection
        try:
            if connection is None or connection.is_closed() or not await self._answers(connection):
                self._connection = None
                self._connection = await self._connect()
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            _log.warning("nobody hears of sessions that come free: %s", type(error).__name__)

    async def _answers(self, connection: asyncpg.Connection) -> bool:
        try:
            async with asyncio.timeout(ANSWER_S):
                await connection.execute("SELECT 1")
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError):
            connection.terminate()
            return False
        return True

    async def _connect(self) -> asyncpg.Connection:
        connection = await self._link.connect_alone()
        try:
            async with asyncio.timeout(ANSWER_S):
                await connection.add_listener(await connection.fetchval("SELECT channel()"), self._hear)
        except BaseException:
            connection.terminate()
            raise
        connection.add_termination_listener(self._hear_end)
        return connection

    def _hear(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        self._wake(str(payload))

    def _hear_end(self, connection: object) -> None:
        # Nobody waits longer than he would without: the next one connects again.
        if self._connection is connection:
            self._connection = None
        self._wake_all()

    def _wake(self, name: str) -> None:
        for future in self.waiters.get(name, ()):
            if not future.done():
                future.set_result(None)

    def _wake_all(self) -> None:
        for name in self.waiters:
            self._wake(name)


def _holder_of(row: Sequence[Any]) -> Holder:
    boot_id, url, nonce, is_turn = row
    return Holder(Node(boot_id, url), nonce, is_turn=is_turn)
