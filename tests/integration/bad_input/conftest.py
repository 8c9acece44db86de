"""A server behind each HTTP parser, which bad input must leave as it was."""

from collections.abc import Iterator

import pytest

from tests.integration.bad_input.asking import PARSERS, Asked


@pytest.fixture(scope="package", params=PARSERS)
def running(request: pytest.FixtureRequest) -> Iterator[Asked]:
    with Asked(request.param) as server:
        yield server


@pytest.fixture
def asked(running: Asked) -> Iterator[Asked]:
    """A server that after the test has stored what it had before, and is well."""
    yield running
    before, running.before = running.before, running.stored()
    assert running.before == before
    assert running.ask("GET", "/ready").status == 200
