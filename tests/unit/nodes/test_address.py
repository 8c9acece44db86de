"""Where nodes find each other, and what of a store's URL may be shown."""

import socket

import pytest

from app.nodes.address import address_towards, url_of, without_secrets


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("postgresql://u:p@127.0.0.1:5432/db", "127.0.0.1"),
        ("redis://localhost", "127.0.0.1"),
        ("redis://[::1]:6379/0", "::1"),
        ("unix:///run/redis.sock", "127.0.0.1"),
        ("postgresql:///db?host=/run/postgresql", "127.0.0.1"),
        ("redis://no-such-host.invalid:6379", "127.0.0.1"),
        ("redis+sentinel://127.0.0.1:26379,127.0.0.2:26379/mymaster/0", "127.0.0.1"),
    ],
)
def test_nodes_listen_where_the_store_is_reached_from(url: str, address: str) -> None:
    """A store on this machine is reached from loopback; one whose URL says nothing, or nonsense, too."""
    assert address_towards(url) == address


def test_a_listener_on_every_address_is_named_by_one() -> None:
    """Other nodes are told an address that they can use, and the real port."""
    with socket.create_server(("0.0.0.0", 0)) as everywhere, socket.create_server(("127.0.0.1", 0)) as here:
        port = everywhere.getsockname()[1]
        assert url_of(everywhere, towards="redis://127.0.0.1") == f"http://127.0.0.1:{port}"
        assert url_of(here, towards="redis://10.0.0.1") == f"http://127.0.0.1:{here.getsockname()[1]}"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite:///./agentpool.db", "sqlite:///./agentpool.db"),
        ("postgresql://u:se@cret@h:1/db?password=x", "postgresql://h:1/db"),
        ("redis://:s3cret@h/0", "redis://h/0"),
        ("redis+sentinel://u:p@a:1,b:2/m/0?x=y", "redis+sentinel://a:1,b:2/m/0"),
    ],
)
def test_no_secret_is_shown(url: str, shown: str) -> None:
    """User, password and options stay hidden."""
    assert without_secrets(url) == shown
