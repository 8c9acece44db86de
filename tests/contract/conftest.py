"""Every store behind one fixture: what is true of one must be true of all."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from app.domain.session import LifeSpan
from app.ports import SessionStore
from app.stores.memory import MemoryStore
from app.stores.memory_shared import SharedMemoryStore
from app.stores.sqlite import SqliteStore

from .builders import BOOT, LIFE

CUTS = 20
URL = "http://127.0.0.1:1001"


class Place:
    """Where one kind of store keeps its content, so that it can be opened again after an end."""

    def __init__(self, kind: str, folder: Path, life: LifeSpan) -> None:
        self._kind = kind
        self._folder = folder
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
        return SqliteStore(str(self._folder / "agentpool.db"), self._life)


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


def share_memory(life: LifeSpan, lease_s: float) -> tuple[SessionStore, Callable[[], SessionStore]]:
    store = SharedMemoryStore(life, lease_s=lease_s)
    return store, store.beside


SHARED = {"memory": share_memory}


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


@pytest.fixture(params=["memory", "sqlite"])
async def place(request: pytest.FixtureRequest, tmp_path: Path, life: LifeSpan) -> AsyncIterator[Place]:
    place = Place(request.param, tmp_path, life)
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


@pytest.fixture(params=list(SHARED))
async def shared_place(
    request: pytest.FixtureRequest, life: LifeSpan, lease_s: float
) -> AsyncIterator[SharedPlace]:
    place = SharedPlace(*SHARED[request.param](life, lease_s))
    await place.store.open(BOOT, URL)
    yield place
    await place.close()
