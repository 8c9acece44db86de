"""By which names a server lets itself be addressed."""

import pytest

from app.api.errors import MalformedRequest
from app.api.hosts import Hosts
from tests.unit.api.wire import http_scope

NAMES = ("example.com", "*.pool.example", "10.0.0.1", "[::1]", "2001:DB8::0:1", "Big.Example")


def is_let_in(hosts: Hosts, *given: str, path: str = "/chat", version: str = "1.1") -> bool:
    scope = http_scope(http_version=version) | {"headers": [(b"host", host.encode()) for host in given]}
    try:
        hosts.check(scope, path)
    except MalformedRequest:
        return False
    return True


@pytest.mark.parametrize(
    "host",
    ["example.com", "EXAMPLE.com:8000", "example.com.", "example.com.:80", "a.pool.example",
     "a.b.pool.example:1", "10.0.0.1:80", "[::1]", "[::1]:8000", "[0:0:0:0:0:0:0:1]", "[2001:db8::1]",
     "big.example"],
)  # fmt: skip
def test_a_name_of_the_server_is_let_in(host: str) -> None:
    """Whatever its case, its port, a dot at its end, and the way an IPv6 address is written."""
    assert is_let_in(Hosts(NAMES), host)


@pytest.mark.parametrize(
    "host",
    ["", "evil.com", "pool.example", "evilpool.example", "example.com.evil.com", "example.com:80:80",
     "example.com@evil.com", "evil.com#example.com", "[::2]", "::1", "[::1", "[", "10.0.0.10", "example.com/",
     "exämple.com", "*.pool.example:x"],
)  # fmt: skip
def test_any_other_name_is_refused(host: str) -> None:
    """Neighbours of an allowed name, the suffix alone, and what is no host at all."""
    assert not is_let_in(Hosts(NAMES), host)


def test_any_name_is_let_in_without_a_list() -> None:
    """The check is off by default."""
    assert is_let_in(Hosts(), "evil.com")
    assert is_let_in(Hosts(), "")


@pytest.mark.parametrize(
    ("given", "version", "is_good"),
    [
        ((), "1.1", False),
        (("a", "a"), "1.1", False),
        (("a", "b"), "1.0", False),
        ((), "1.0", True),
        ((), "0.9", False),
        (("a",), "2.0", False),
        (("a",), "2", True),
        ((), "3", True),
    ],
)
def test_it_is_said_once_for_whom_a_request_is(given: tuple[str, ...], version: str, is_good: bool) -> None:
    """HTTP/1.1 has one Host header; HTTP/1.0, as health checks speak it, may have none."""
    assert is_let_in(Hosts(), *given, version=version) is is_good


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_may_use_any_name(path: str) -> None:
    """Whatever watches the process knows its address only; no other path is so open."""
    assert is_let_in(Hosts(NAMES), "10.9.8.7:8000", path=path)
    assert is_let_in(Hosts(NAMES), path=path, version="1.0")
    assert not is_let_in(Hosts(NAMES), path="/chat", version="1.0")
    assert not is_let_in(Hosts(NAMES), "10.9.8.7", path=path + "/")


@pytest.mark.parametrize(
    "name", ["*", "", "a b", "http://a", "a:80", "[::1]:80", "*.", "a/b", "*a.b", "a.*", "[a]"]
)
def test_what_is_no_name_is_refused_at_the_start(name: str) -> None:
    """A list that could not work, or would let everybody in, is no list."""
    with pytest.raises(ValueError, match="without a port"):
        Hosts([name])
