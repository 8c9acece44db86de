"""Every store behind one fixture: what is true of one must be true of all."""

from collections.abc import AsyncIterator, Callable, Iterator
from uuid import uuid4

import pytest

from app.domain.session import LifeSpan
from app.ports import SessionStore
from app.stores.keyring import KeyRing
from app.stores.memory.shared import SharedMemoryStore
from app.stores.memory.store import MemoryStore
from app.stores.postgres import PostgresStore
from app.stores.redis.store import RedisStore
from app.stores.sqlite.store import SqliteStore
from tests.postgresserver import PostgresServer, find_binaries
from tests.redisserver import RedisServer

from .builders import BOOT, LIFE

CUTS = 20
URL = "http://127.0.0.1:1001"
KEYS = KeyRing([b"k" * 32])


class Place:
    """Where one kind of store keeps its content, so that it can be opened again after an end."""

    def __init__(self, make: Callable[[], SessionStore]) -> None:
        self._make = make
        self.store: SessionStore = make()

    async def restart(self, boot_id: str) -> SessionStore:
        """Close the store and return one of the same content, as another process would see it."""
        await self.store.close()
        self.store = self._make()
        await self.store.open(boot_id)
        return self.store


def memory_place(request: pytest.FixtureRequest, life: LifeSpan) -> Place:
    store = MemoryStore(life)
    return Place(lambda: store)


def sqlite_place(request: pytest.FixtureRequest, life: LifeSpan) -> Place:
    path = str(request.getfixturevalue("tmp_path") / "agentpool.db")
    return Place(lambda: SqliteStore(path, life))


def sealed_sqlite_place(request: pytest.FixtureRequest, life: LifeSpan) -> Place:
    path = str(request.getfixturevalue("tmp_path") / "agentpool.db")
    return Place(lambda: SqliteStore(path, life, keys=KEYS))


def postgres_place(request: pytest.FixtureRequest, life: LifeSpan) -> Place:
    url = request.getfixturevalue("postgres_url")
    return Place(lambda: PostgresStore(url, life, accept_volatile=True))


def redis_place(request: pytest.FixtureRequest, life: LifeSpan) -> Place:
    url, prefix = request.getfixturevalue("redis_server").url, fresh_prefix()
    return Place(lambda: RedisStore(url, life, prefix=prefix))


def sealed_postgres_place(request: pytest.FixtureRequest, life: LifeSpan) -> Place:
    url = request.getfixturevalue("postgres_url")
    return Place(lambda: PostgresStore(url, life, accept_volatile=True, keys=KEYS))


def sealed_redis_place(request: pytest.FixtureRequest, life: LifeSpan) -> Place:
    url, prefix = request.getfixturevalue("redis_server").url, fresh_prefix()
    return Place(lambda: RedisStore(url, life, prefix=prefix, keys=KEYS))


def fresh_prefix() -> str:
    """Return what keeps one test's keys apart from the others' on the server that they share."""
    return f"test-{uuid4().hex}"


PLACES = {
    "memory": memory_place,
    "sqlite": sqlite_place,
    "sqlite-keys": sealed_sqlite_place,
    "postgres": postgres_place,
    "postgres-keys": sealed_postgres_place,
    "redis": redis_place,
    "redis-keys": sealed_redis_place,
}


class SharedPlace:
    """Where one kind of store keeps what several processes share; ``store`` is opened by ``BOOT``."""

    def __init__(self, store: SessionStore, beside: Callable[[], SessionStore]) -> None:
        self.store = store
        self._beside = beside
        self._opened = [store]

    async def beside(self, boot_id: str, url: str | None = None) -> SessionStore:
        """Return another store of the same content, opened as another process would."""
        other = self._beside()
        await other.open(boot_id, url)
        self._opened.append(other)
        return other

    async def close(self) -> None:
        for store in self._opened:
            await store.close()


def share_memory(request: pytest.FixtureRequest, life: LifeSpan, lease_s: float) -> SharedPlace:
    store = SharedMemoryStore(life, lease_s=lease_s)
    return SharedPlace(store, store.beside)


def share_postgres(request: pytest.FixtureRequest, life: LifeSpan, lease_s: float) -> SharedPlace:
    url = request.getfixturevalue("postgres_url")

    def make() -> SessionStore:
        return PostgresStore(url, life, lease_s=lease_s, accept_volatile=True)

    return SharedPlace(make(), make)


def share_redis(request: pytest.FixtureRequest, life: LifeSpan, lease_s: float) -> SharedPlace:
    url, prefix = request.getfixturevalue("redis_server").url, fresh_prefix()

    def make() -> SessionStore:
        return RedisStore(url, life, prefix=prefix, lease_s=lease_s)

    return SharedPlace(make(), make)


SHARED = {"memory": share_memory, "postgres": share_postgres, "redis": share_redis}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cuts", type=int, default=CUTS, help="power cuts that the SQLite store must survive")


@pytest.fixture
def cuts(pytestconfig: pytest.Config) -> int:
    """How many power cuts to try; the option exists only where this folder is named on the command line."""
    return int(pytestconfig.getoption("--cuts", default=CUTS))


@pytest.fixture
def life() -> LifeSpan:
    """The life span of the store's sessions; a test that is parametrised with ``life`` has another."""
    return LIFE


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A server for all tests that do it no harm."""
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("there is no PostgreSQL here")
    with PostgresServer(binaries) as server:
        yield server


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> Iterator[str]:
    """The URL of a schema without content."""
    with postgres.empty_schema() as url:
        yield url


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """A Redis for all tests that do it no harm; each has keys of its own."""
    server = RedisServer()
    try:
        yield server.start()
    finally:
        server.close()


@pytest.fixture(params=PLACES)
async def place(request: pytest.FixtureRequest, life: LifeSpan) -> AsyncIterator[Place]:
    place = PLACES[request.param](request, life)
    await place.store.open(BOOT)
    yield place
    await place.store.close()


@pytest.fixture
def store(place: Place) -> SessionStore:
    return place.store


@pytest.fixture
def lease_s() -> float:
    """How long leases hold; a test that is parametrised with ``lease_s`` has other ones."""
    return 30.0


@pytest.fixture(params=SHARED)
async def shared_place(
    request: pytest.FixtureRequest, life: LifeSpan, lease_s: float
) -> AsyncIterator[SharedPlace]:
    place = SHARED[request.param](request, life, lease_s)
    await place.store.open(BOOT, URL)
    yield place
    await place.close()
