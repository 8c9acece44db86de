"""From a URL, or a client that exists, to connections with our own limits.

redis-py's defaults repeat a command ten times and wait for 40 s in all, and may so run a write twice;
none of that is left on: whether repeating is safe only the caller knows.
"""

from collections.abc import Callable
from typing import Any
from urllib.parse import unquote, urlsplit

from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

SOCKET_S = 1.0
"""How long connecting, writing or a reply may take."""
_SENTINEL_PORT = 26379
_BAD = "The Redis URL must be redis://, rediss:// or unix://, or redis+sentinel://host:port,…/service/db."

Connect = Callable[[], AbstractConnection]
"""Makes a connection that is not connected yet."""


class Address:
    """Where Redis is: a URL, or as a client that exists has it. Making one touches nothing.

    Raises:
        ValueError: it is no address. The message never repeats it: it may hold a password.
    """

    def __init__(self, address: "str | Redis") -> None:
        self._sentinels: list[Redis] = []
        pool = self._pool_of(address) if isinstance(address, str) else address.connection_pool
        self._pool = pool
        self._options = {**pool.connection_kwargs, **_limits(), "decode_responses": False}
        try:
            self.connect()
        except (ValueError, TypeError) as error:  # an option in the URL's query that there is not
            raise ValueError(_BAD) from error

    def connect(self) -> AbstractConnection:
        """Return a connection that is not connected yet."""
        connection: AbstractConnection = self._pool.connection_class(**self._options)
        return connection

    def pool(self, size: int) -> ConnectionPool:
        """Return connections for those who share them; who finds none free waits for one."""
        kind = self._pool.connection_class
        return BlockingConnectionPool(size, SOCKET_S, connection_class=kind, **self._options)

    async def close(self) -> None:
        """Close what was opened to find the server."""
        for sentinel in self._sentinels:
            await sentinel.aclose()

    def _pool_of(self, url: str) -> ConnectionPool:
        try:
            if urlsplit(url).scheme == "redis+sentinel":
                return self._sentinel_pool(url)
            return ConnectionPool.from_url(url)
        except (ValueError, TypeError) as error:
            raise ValueError(_BAD) from error

    def _sentinel_pool(self, url: str) -> ConnectionPool:
        parts = urlsplit(url)
        login, _, hosts = parts.netloc.rpartition("@")
        service, _, db = parts.path.strip("/").partition("/")
        if not service or not hosts:
            raise ValueError(_BAD)
        user, _, password = login.partition(":")
        credentials = {"username": unquote(user) or None, "password": unquote(password) or None}
        timeouts = {"socket_timeout": SOCKET_S / 2, "socket_connect_timeout": SOCKET_S / 2}
        options: dict[str, Any] = {**timeouts, "retry": Retry(NoBackoff(), 0)}
        addresses = [_host_of(host) for host in hosts.split(",")]
        sentinel: Any = Sentinel(addresses, sentinel_kwargs=options)  # type: ignore[no-untyped-call]
        self._sentinels = sentinel.sentinels
        master = sentinel.master_for(unquote(service), db=int(db or 0), **(credentials if login else {}))
        pool: ConnectionPool = master.connection_pool
        return pool


def _limits() -> dict[str, Any]:
    return {
        "socket_timeout": SOCKET_S,
        "socket_connect_timeout": SOCKET_S,
        "retry": Retry(NoBackoff(), 0),
        "retry_on_timeout": False,
        "retry_on_error": [],
        "health_check_interval": 0,
        "protocol": 2,
        "maint_notifications_config": None,
        "maint_notifications_pool_handler": None,
    }


def _host_of(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    has_port = colon and not text.endswith("]")
    return (host.strip("[]"), int(port)) if has_port else (text.strip("[]"), _SENTINEL_PORT)
