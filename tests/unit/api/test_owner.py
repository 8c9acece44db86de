"""In whose name a request acts: the one decision, for every kind of caller."""

import re
from pathlib import Path

import pytest
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from app.api import health
from app.api.deps import call_of
from app.api.install import ROUTERS
from app.api.owner import Namespace, namespace_of
from app.domain.errors import Forbidden, InvalidInput, Unauthenticated
from app.domain.principal import ANYONE, NOBODY, principal_of

USER = principal_of("alice", is_admin=False, credential="key:1")
ADMIN = principal_of("root", is_admin=True, credential="key:2")
NATIVE = Path(__file__).parents[3] / "app" / "api" / "native"


@pytest.mark.parametrize("named", [None, "alice", "bob"])
def test_without_credentials_there_is_one_namespace(named: str | None) -> None:
    """Whoever is named, whose sessions made there are; lists are of that namespace."""
    namespace = namespace_of(ANYONE, named)
    assert namespace == Namespace("", named, "", is_admin=True)
    assert namespace.user_to_check == named


@pytest.mark.parametrize("named", [None, "alice"])
def test_a_user_acts_for_themselves(named: str | None) -> None:
    """Whether they name themselves or not."""
    namespace = namespace_of(USER, named)
    assert namespace == Namespace("alice", "alice", "alice", is_admin=False)
    assert namespace.user_to_check is None


@pytest.mark.parametrize("named", ["bob", "Alice", "alice ", "", "a/b", "alice\x00"])
def test_a_user_may_name_nobody_else(named: str) -> None:
    """Not one who does not exist, either, nor one whom nobody could be."""
    with pytest.raises(Forbidden):
        namespace_of(USER, named)


def test_an_admin_acts_for_whom_they_name() -> None:
    """For themselves if for nobody; then lists are of all owners."""
    assert namespace_of(ADMIN, None) == Namespace("root", "root", None, is_admin=True)
    assert namespace_of(ADMIN, "root") == Namespace("root", "root", "root", is_admin=True)
    assert namespace_of(ADMIN, "bob") == Namespace("bob", "bob", "bob", is_admin=True)
    with pytest.raises(InvalidInput):
        namespace_of(ADMIN, "")


@pytest.mark.parametrize("named", [None, "alice", ""])
def test_nobody_acts_for_anybody(named: str | None) -> None:
    """A route that is taken for an open one, and is none, refuses."""
    with pytest.raises(Unauthenticated):
        namespace_of(NOBODY, named)


def dependencies_of(dependant: Dependant) -> set[object]:
    found = {dependant.call}
    for inner in dependant.dependencies:
        found |= dependencies_of(inner)
    return found


@pytest.mark.parametrize(
    "route", [route for router in ROUTERS for route in router.routes], ids=lambda route: route.path
)
def test_every_route_asks_in_whose_name(route: APIRoute) -> None:
    """By the one dependency that decides it; only probes do not."""
    asks = call_of in dependencies_of(route.dependant)
    assert asks is not (route in health.router.routes)


def test_no_route_makes_an_address_by_itself() -> None:
    """Neither from a caller nor from an owner of its own: ``Namespace`` makes them all."""
    own_ways = re.compile(r"SessionKey\(|\.caller\b|namespace_of\((?!body\.user_id|entry\.user_id)")
    for path in NATIVE.glob("*.py"):
        assert not own_ways.search(path.read_text()), path.name
