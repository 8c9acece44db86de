"""A server process on the demo model, shared by the tests of one module."""

from collections.abc import Iterator

import pytest

from tests.postgresserver import PostgresServer, find_binaries
from tests.redisserver import RedisServer
from tests.serverprocess import ServerProcess
from tests.storeserver import STORES, StoreServer, open_store_server

KILLS = 20
CLUSTER_S = 10.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=KILLS, help="how often a server under load is killed")
    parser.addoption(
        "--cluster-s", type=float, default=CLUSTER_S, help="how long a cluster is troubled for, in seconds"
    )
    parser.addoption("--cluster-seed", type=int, default=0, help="what troubles it, and when")
    parser.addoption("--stalled", type=int, default=0, help="how many watchers do not read")
    parser.addoption("--stalled-s", type=float, default=60.0, help="how long the turns take that they watch")


@pytest.fixture
def kills(pytestconfig: pytest.Config) -> int:
    # Known to pytest only when this folder is named on the command line, hence the default.
    return int(pytestconfig.getoption("--kills", default=KILLS))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("server"), MODEL_PROVIDER="demo") as process:
        yield process


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("there is no PostgreSQL here")
    with PostgresServer(binaries) as server:
        yield server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    server = RedisServer()
    try:
        yield server.start()
    finally:
        server.close()


@pytest.fixture
def cluster_s(pytestconfig: pytest.Config) -> float:
    return float(pytestconfig.getoption("--cluster-s", default=CLUSTER_S))


@pytest.fixture
def cluster_seed(pytestconfig: pytest.Config) -> int:
    return int(pytestconfig.getoption("--cluster-seed", default=0))


@pytest.fixture(scope="module", params=STORES)
def store_server(request: pytest.FixtureRequest) -> Iterator[StoreServer]:
    """A server of each kind that nodes can share; whatever a test does to it, it leaves it running."""
    with open_store_server(request.param) as server:
        yield server
