"""From the URL in the settings to a store."""

from urllib.parse import unquote

from app.domain.session import LifeSpan
from app.ports import SessionStore
from app.stores.memory import MemoryStore
from app.stores.sqlite import SqliteStore

_ALLOWED = (
    "memory://, sqlite:///relative/path.db, sqlite:////absolute/path.db or postgresql://user@host/database"
)


def open_store(
    url: str, life: LifeSpan, *, wait_for_lock: bool = False, accept_volatile: bool = False
) -> SessionStore:
    """Return the store that ``url`` names; it is not opened yet and nothing is touched.

    ``accept_volatile``: one that several processes share may be served by what loses what it
    acknowledged when the power fails.

    Raises:
        ValueError: it names none, or what it needs is not installed. The message never repeats the
            URL, which may hold a password.
    """
    scheme, separator, rest = url.partition("://")
    if separator and scheme == "memory" and not rest:
        return MemoryStore(life)
    if separator and scheme == "sqlite" and _is_file(rest):
        return SqliteStore(unquote(rest[1:]), life, wait_for_lock=wait_for_lock)
    if separator and scheme in ("postgresql", "postgres") and rest:
        return _postgres(url, life, accept_volatile)
    raise ValueError(f"The store URL must be {_ALLOWED}.")


def _postgres(url: str, life: LifeSpan, accept_volatile: bool) -> SessionStore:
    try:
        from app.stores.postgres import PostgresStore
    except ModuleNotFoundError as error:
        if error.name != "asyncpg":
            raise
        # "from None": one line is all that the operator needs.
        raise ValueError("PostgreSQL needs asyncpg: pip install 'agentpool[postgres]'.") from None
    return PostgresStore(url, life, accept_volatile=accept_volatile)


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
