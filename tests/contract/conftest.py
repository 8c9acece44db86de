"""Every store behind one fixture: what is true of one must be true of all."""

from collections.abc import AsyncIterator, Callable, Iterator
from uuid import uuid4

import pytest

from app.domain.session import LifeSpan
from app.ports import SessionStore
from app.stores.memory import MemoryStore
from app.stores.redis.store import RedisStore
from app.stores.sqlite import SqliteStore
from tests.redisserver import RedisServer

from .builders import BOOT, LIFE

CUTS = 20


class Place:
    """Where one kind of store keeps its content, so that it can be opened again after an end."""

    def __init__(self, make: Callable[[], SessionStore]) -> None:
        self._make = make
        self._boot_id = BOOT
        self.store: SessionStore = make()

    async def restart(self, boot_id: str) -> SessionStore:
        """Close the store and return one of the same content, as another process would see it."""
        await self.store.close()
        if boot_id != self._boot_id:
            self.end_leases()
        self._boot_id = boot_id
        self.store = self._make()
        await self.store.open(boot_id)
        return self.store

    def end_leases(self) -> None:
        """Let the leases of a boot that is gone have run out, where there are leases."""


class RedisPlace(Place):
    def __init__(self, server: RedisServer, life: LifeSpan) -> None:
        self._server = server
        self.prefix = f"test-{uuid4().hex}"
        super().__init__(lambda: RedisStore(server.url, life, prefix=self.prefix))

    def end_leases(self) -> None:
        lapse = (
            "for _, tag in ipairs(redis.call('ZRANGE', ARGV[1] .. ':leases', 0, -1)) do"
            " redis.call('ZADD', ARGV[1] .. ':leases', 1, tag)"
            " redis.call('HSET', ARGV[1] .. ':{' .. tag .. '}:l', 'x', 1) end"
        )
        self._server.command("EVAL", lapse, "0", self.prefix)


def _memory_place(request: pytest.FixtureRequest, life: LifeSpan) -> Place:
    store = MemoryStore(life)
    return Place(lambda: store)


def _sqlite_place(request: pytest.FixtureRequest, life: LifeSpan) -> Place:
    path = str(request.getfixturevalue("tmp_path") / "agentpool.db")
    return Place(lambda: SqliteStore(path, life))


def _redis_place(request: pytest.FixtureRequest, life: LifeSpan) -> Place:
    return RedisPlace(request.getfixturevalue("redis_server"), life)


PLACES = {"memory": _memory_place, "sqlite": _sqlite_place, "redis": _redis_place}


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """A Redis that all tests share; each has keys of its own."""
    server = RedisServer()
    try:
        yield server.start()
    finally:
        server.close()


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


@pytest.fixture(params=PLACES)
async def place(request: pytest.FixtureRequest, life: LifeSpan) -> AsyncIterator[Place]:
    place = PLACES[request.param](request, life)
    await place.store.open(BOOT)
    yield place
    await place.store.close()


@pytest.fixture
def store(place: Place) -> SessionStore:
    return place.store
