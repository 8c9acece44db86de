"""What opening a database takes: its schema, a look at what it promises, and the turns of the dead."""

from importlib.resources import files

import asyncpg

from app.domain.errors import StoreUnavailable
from app.domain.lease import Node
from app.domain.session import LifeSpan
from app.stores.postgres.link import Connection, Link, Work

OPEN_S = 60.0
"""How long opening may take: another process may be migrating."""
_REAP_AT_ONCE = 100

# One lock per schema; ten processes that start together migrate one after the other.
_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('agentpool.' || current_schema(), 0))"
_FIND_MIGRATIONS = "SELECT to_regclass(current_schema() || '.migrations') IS NOT NULL"
_MAKE_MIGRATIONS = (
    "CREATE TABLE migrations (number integer PRIMARY KEY, made_at timestamptz NOT NULL DEFAULT now())"
)
_VERSION = "SELECT coalesce(max(number), 0) FROM migrations"
_IS_EMPTY = (
    "SELECT NOT EXISTS (SELECT 1 FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace"
    " WHERE n.nspname = current_schema() AND c.relkind IN ('r', 'p') AND c.relname = 'sessions')"
)
_PROMISES = "SELECT current_setting('fsync'), current_setting('synchronous_commit'), current_schema()"
_RENEW_OWN = "UPDATE leases SET until = clock_timestamp() + make_interval(secs => $2) WHERE boot_id = $1"
_END_OWN = "SELECT end_leases($1)"
_LEAVE = "DELETE FROM nodes WHERE boot_id = $1"
_REAP = "SELECT reap_leases($1)"


async def open_database(
    link: Link, life: LifeSpan, node: Node, lease_s: float, accept_volatile: bool
) -> None:
    """Migrate, check, and end the turns whose leases have run out, but not those of this boot.

    Raises:
        StoreUnavailable: the database cannot be used; the message says why.
    """

    async def begin(connection: Connection) -> None:
        await connection.execute("SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0")
        await _check_promises(connection, accept_volatile)
        await _migrate(connection)
        await connection.execute("SELECT set_idle_after($1)", life.idle_after_s * 1000)
        await connection.execute(_RENEW_OWN, node.boot_id, lease_s)

    async def reap(connection: Connection) -> int:
        ended: int = await connection.fetchval(_REAP, _REAP_AT_ONCE)
        return ended

    await link.transact(begin, repeats=True, limit_s=OPEN_S)
    while await link.run(reap, writes=True) == _REAP_AT_ONCE:
        pass


def leaving(node: Node) -> Work[None]:
    """Return what a process does last: it lets its leases run out, so that nobody waits for its turns."""

    async def leave(connection: Connection) -> None:
        await connection.execute(_END_OWN, node.boot_id)
        await connection.execute(_LEAVE, node.boot_id)

    return leave


def migrations() -> list[str]:
    """Return the SQL of every schema step; the n-th leads to version n."""
    folder = files("app.stores").joinpath("sql", "postgres")
    steps = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".sql")), key=lambda e: e.name)
    return [step.read_text(encoding="utf-8") for step in steps]


async def _migrate(connection: Connection) -> None:
    steps = migrations()
    await connection.execute(_LOCK)
    try:
        if not await connection.fetchval(_FIND_MIGRATIONS):
            if not await connection.fetchval(_IS_EMPTY):
                raise StoreUnavailable("The database schema belongs to another program.")
            await connection.execute(_MAKE_MIGRATIONS)
        version = await connection.fetchval(_VERSION)
        if version > len(steps):
            raise StoreUnavailable(
                f"The database has schema {version}, but this version knows only {len(steps)}: "
                "a newer version has written it."
            )
        for number, step in enumerate(steps[version:], version + 1):
            await connection.execute(step)
            await connection.execute("INSERT INTO migrations (number) VALUES ($1)", number)
    except asyncpg.InsufficientPrivilegeError as error:
        raise StoreUnavailable("The database user may not create tables in its schema.") from error


async def _check_promises(connection: Connection, accept_volatile: bool) -> None:
    fsync, synchronous_commit, schema = await connection.fetchrow(_PROMISES)
    if schema is None:
        raise StoreUnavailable("The database has no schema that its search_path names.")
    if accept_volatile:
        return
    for name, value in (("fsync", fsync), ("synchronous_commit", synchronous_commit)):
        if value == "off":
            raise StoreUnavailable(
                f"The database runs with {name} = off, so a power cut could lose what was acknowledged; "
                "switch it on, or start with --accept-volatile."
            )
