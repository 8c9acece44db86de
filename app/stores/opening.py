"""From the URL in the settings to a store."""

from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote

from app.domain.lease import LEASE_S
from app.domain.session import LifeSpan
from app.ports import MovableStore
from app.stores.memory.store import MemoryStore
from app.stores.sqlite.store import SqliteStore

if TYPE_CHECKING:
    from app.stores.keyring import KeyRing

_ALLOWED = (
    "memory://, sqlite:///relative/path.db, sqlite:////absolute/path.db, postgresql://user@host/database,"
    " redis://host:6379/0, rediss://, unix:///path/of.sock or redis+sentinel://host:26379/service/0"
)
_REDIS_SCHEMES = frozenset({"redis", "rediss", "unix", "redis+sentinel"})


@dataclass(frozen=True, slots=True)
class Sharing:
    """How a store is used that several processes share.

    ``lease_s`` is how long a lease holds. ``accept_volatile``: it may be served by what loses what
    it acknowledged when the power fails. ``fsync_wait_ms``: how long Redis is waited for to have a
    turn on its disk, 0 for not at all.
    """

    lease_s: float = LEASE_S
    accept_volatile: bool = False
    fsync_wait_ms: int = 0


def open_store(
    url: str,
    life: LifeSpan,
    *,
    wait_for_lock: bool = False,
    sharing: Sharing | None = None,
    keys: "KeyRing | None" = None,
) -> MovableStore:
    """Return the store that ``url`` names; it is not opened yet and nothing is touched.

    With ``keys`` what people and models said, and all that hangs on it, is encrypted at rest.

    Raises:
        ValueError: it names none, or what it needs is not installed. The message never repeats the
            URL, which may hold a password.
    """
    scheme, separator, rest = url.partition("://")
    sharing = sharing or Sharing()
    if separator and scheme == "memory" and not rest:
        return MemoryStore(life)
    if separator and scheme == "sqlite" and _is_file(rest):
        return SqliteStore(unquote(rest[1:]), life, wait_for_lock=wait_for_lock, keys=keys)
    if separator and scheme in ("postgresql", "postgres") and rest:
        return _postgres_store(url, life, sharing, keys)
    if separator and scheme in _REDIS_SCHEMES and rest:
        return _redis_store(url, life, sharing, keys)
    raise ValueError(f"The store URL must be {_ALLOWED}.")


def _postgres_store(url: str, life: LifeSpan, sharing: Sharing, keys: "KeyRing | None") -> MovableStore:
    try:
        from app.stores.postgres import PostgresStore
    except ModuleNotFoundError as error:
        if error.name != "asyncpg":
            raise
        # "from None": one line is all that the operator needs.
        raise ValueError("PostgreSQL needs an extra: pip install 'agentpool[postgres]'.") from None
    return PostgresStore(
        url, life, lease_s=sharing.lease_s, accept_volatile=sharing.accept_volatile, keys=keys
    )


def _redis_store(url: str, life: LifeSpan, sharing: Sharing, keys: "KeyRing | None") -> MovableStore:
    try:
        from app.stores.redis.store import RedisStore
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"redis", "hiredis"}:
            raise
        raise ValueError("Redis needs an extra: pip install 'agentpool[redis]'.") from None
    return RedisStore(
        url,
        life,
        lease_s=sharing.lease_s,
        fsync_wait_ms=sharing.fsync_wait_ms,
        accept_volatile=sharing.accept_volatile,
        keys=keys,
    )


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


def find_file(url: str) -> str | None:
    """Return the path of the file that ``url`` names, be it there or not; ``None`` if it names none."""
    scheme, separator, rest = url.partition("://")
    return unquote(rest[1:]) if separator and scheme == "sqlite" and _is_file(rest) else None
