"""Where other nodes find this one."""

import socket
from urllib.parse import urlsplit

_DEFAULT_PORTS = {"postgresql": 5432, "postgres": 5432, "redis": 6379, "rediss": 6379}


def address_towards(url: str) -> str:
    """Return the address of this machine from which the store behind ``url`` is reached.

    Nodes that share a store reach each other on the way on which they reach that. Loopback where
    the URL does not say. Nothing is sent.
    """
    scheme, rest = urlsplit(url).scheme, urlsplit(url).netloc
    try:
        first = urlsplit("//" + rest.rpartition("@")[2].partition(",")[0])  # of several: Sentinel's
        host, port = first.hostname, first.port or _DEFAULT_PORTS.get(scheme, 1)
    except ValueError:  # no port: the store will say so
        host = None
    if not host:
        return "127.0.0.1"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"


def url_of(listener: socket.socket, *, towards: str | None = None) -> str:
    """Return the URL of what listens there; on every address: that from which ``towards`` is reached."""
    host, port = listener.getsockname()[:2]
    if towards is not None and host in ("0.0.0.0", "::"):  # noqa: S104  # to be told apart, not to be bound
        host = address_towards(towards)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def without_secrets(store_url: str) -> str:
    """Return the URL as it may be shown: no user, no password, no options."""
    scheme, separator, rest = store_url.partition("?")[0].partition("://")
    return scheme + separator + rest.rpartition("@")[2]
