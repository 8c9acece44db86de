"""A server process on the demo model, shared by the tests of one module."""

from collections.abc import Iterator

import pytest

from tests.serverprocess import ServerProcess


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("server"), MODEL_PROVIDER="demo") as process:
        yield process
