"""Every store behind one fixture: what is true of one must be true of all."""

from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path

import asyncpg
import pytest

from app.domain.session import LifeSpan
from app.ports import SessionStore
from app.stores.memory import MemoryStore
from app.stores.postgres import PostgresStore
from app.stores.sqlite import SqliteStore
from tests.postgresserver import PostgresServer, find_binaries

from .builders import BOOT, LIFE

CUTS = 20
KINDS = ("memory", "sqlite", "postgres")
_schemas = count()


class Place:
    """Where one kind of store keeps its content, so that it can be opened again after an end."""

    def __init__(self, kind: str, folder: Path, life: LifeSpan, url: str = "") -> None:
        self._kind = kind
        self._folder = folder
        self._url = url
        self._life = life
        self.store: SessionStore = self._make()

    async def restart(self, boot_id: str) -> SessionStore:
        """Close the store and return one of the same content, as another process would see it."""
        await self.store.close()
        if self._kind != "memory":
            self.store = self._make()
        await self.store.open(boot_id)
        return self.store

    def _make(self) -> SessionStore:
        if self._kind == "memory":
            return MemoryStore(self._life)
        if self._kind == "postgres":
            return PostgresStore(self._url, self._life, accept_volatile=True)
        return SqliteStore(str(self._folder / "agentpool.db"), self._life)


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
async def schema(postgres: PostgresServer) -> str:
    """The URL of an empty schema."""
    return await make_schema(postgres)


async def make_schema(server: PostgresServer) -> str:
    name = f"test_{next(_schemas)}"
    connection = await asyncpg.connect(server.url)
    await connection.execute(f"CREATE SCHEMA {name}")
    await connection.close()
    return f"{server.url}?search_path={name}"


@pytest.fixture(params=KINDS)
async def place(request: pytest.FixtureRequest, tmp_path: Path, life: LifeSpan) -> AsyncIterator[Place]:
    url = await make_schema(request.getfixturevalue("postgres")) if request.param == "postgres" else ""
    place = Place(request.param, tmp_path, life, url)
    await place.store.open(BOOT)
    yield place
    await place.store.close()


@pytest.fixture
def store(place: Place) -> SessionStore:
    return place.store
