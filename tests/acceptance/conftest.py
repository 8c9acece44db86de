"""A server process on the demo model, shared by the tests of one module."""

from collections.abc import Iterator

import pytest

from tests.postgresserver import PostgresServer, find_binaries
from tests.serverprocess import ServerProcess

KILLS = 20


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=KILLS, help="how often a server under load is killed")
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
