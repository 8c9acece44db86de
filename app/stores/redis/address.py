"""From a URL, or a client that exists, to connections with our own limits.

redis-py's defaults repeat a command ten times and wait for 40 s in all, and may so run a write twice;
none of that is left on: whether repeating is safe only the caller knows.
"""

from collections.abc import Callable
from typing import Any
from urllib.parse import unquote, urlsplit

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

SOCKET_S = 1.0
"""How long connecting, writing or a reply may take."""
SCHEMES = ("redis", "rediss", "unix", "redis+sentinel")
_SENTINEL_PORT = 26379
_BAD = "The Redis URL must be redis://, rediss:// or unix://, or redis+sentinel://host:port,…/service/db."

Connect = Callable[[], AbstractConnection]
"""Makes a connection that is not connected yet."""


def to_connect(address: "str | Redis") -> Connect:
    """Return what makes connections to ``address``; nothing is touched yet.

    Raises:
        ValueError: it is no address. The message never repeats it: it may hold a password.
    """
    pool = _pool_of(address) if isinstance(address, str) else address.connection_pool
    options = {**pool.connection_kwargs, **_limits(), "decode_responses": False}
    return lambda: pool.connection_class(**options)


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


def _pool_of(url: str) -> ConnectionPool:
    try:
        if urlsplit(url).scheme == "redis+sentinel":
            return _sentinel_pool(url)
        return ConnectionPool.from_url(url)
    except (ValueError, TypeError) as error:
        raise ValueError(_BAD) from error


def _sentinel_pool(url: str) -> ConnectionPool:
    parts = urlsplit(url)
    login, _, hosts = parts.netloc.rpartition("@")
    service, _, db = parts.path.strip("/").partition("/")
    if not service or not hosts:
        raise ValueError(_BAD)
    user, _, password = login.partition(":")
    credentials = {"username": unquote(user) or None, "password": unquote(password) or None} if login else {}
    sentinels = [_host_of(host) for host in hosts.split(",")]
    timeouts = {"socket_timeout": SOCKET_S / 2, "socket_connect_timeout": SOCKET_S / 2}
    sentinel = Sentinel(sentinels, sentinel_kwargs={**timeouts, "retry": Retry(NoBackoff(), 0)})
    master = sentinel.master_for(unquote(service), db=int(db or 0), **credentials)
    return master.connection_pool


def _host_of(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    return (
        (host.strip("[]"), int(port))
        if colon and not text.endswith("]")
        else (text.strip("[]"), _SENTINEL_PORT)
    )
