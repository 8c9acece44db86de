"""From the URL in the settings to a store."""

from urllib.parse import unquote

from app.domain.session import LifeSpan
from app.ports import SessionStore
from app.stores.memory import MemoryStore
from app.stores.sqlite import SqliteStore

_ALLOWED = (
    "memory://, sqlite:///relative/path.db, sqlite:////absolute/path.db, redis://host:6379/0, rediss://,"
    " unix:// or redis+sentinel://"
)
_REDIS_SCHEMES = frozenset({"redis", "rediss", "unix", "redis+sentinel"})
_NO_REDIS = "A Redis store needs an extra: pip install 'agentpool[redis]'."


def open_store(
    url: str,
    life: LifeSpan,
    *,
    wait_for_lock: bool = False,
    accept_volatile: bool = False,
    fsync_wait_ms: int = 0,
) -> SessionStore:
    """Return the store that ``url`` names; it is not opened yet and nothing is touched.

    ``accept_volatile`` and ``fsync_wait_ms`` are Redis's.

    Raises:
        ValueError: it names none, or what it needs is not installed. The message never repeats the
            URL, which may hold a password.
    """
    scheme, separator, rest = url.partition("://")
    if separator and scheme == "memory" and not rest:
        return MemoryStore(life)
    if separator and scheme == "sqlite" and _is_file(rest):
        return SqliteStore(unquote(rest[1:]), life, wait_for_lock=wait_for_lock)
    if separator and scheme in _REDIS_SCHEMES:
        return _redis_store(url, life, accept_volatile=accept_volatile, fsync_wait_ms=fsync_wait_ms)
    raise ValueError(f"The store URL must be {_ALLOWED}.")


def _redis_store(url: str, life: LifeSpan, *, accept_volatile: bool, fsync_wait_ms: int) -> SessionStore:
    try:
        # Not above: it is an extra, and costs 0.2 s at start.
        from app.stores.redis.store import RedisStore
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in {"redis", "hiredis"}:
            raise ValueError(_NO_REDIS) from error
        raise
    return RedisStore(url, life, accept_volatile=accept_volatile, fsync_wait_ms=fsync_wait_ms)


def _is_file(rest: str) -> bool:
    """Say whether ``rest`` is a slash and the path of a file, without host, query or fragment."""
    return (
        rest.startswith("/")
        and rest.strip("/") != ""
        and not rest.endswith("/")
        and rest != "/:memory:"
        and "?" not in rest
        and "#" not in rest
    )
