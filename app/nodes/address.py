"""Where other nodes find this one."""

import socket
from urllib.parse import urlsplit

_DEFAULT_PORTS = {"postgresql": 5432, "postgres": 5432, "redis": 6379, "rediss": 6379}


def address_towards(url: str) -> str:
    """Return the address of this machine from which the store behind ``url`` is reached.

    Nodes that share a store reach each other on the way on which they reach that. Loopback where
    the URL does not say. Nothing is sent.
    """
    parts = urlsplit(url)
    host = parts.hostname
    if not host:
        return "127.0.0.1"
    port = parts.port or _DEFAULT_PORTS.get(parts.scheme, 1)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"


def url_of(listener: socket.socket) -> str:
    """Return the URL of what listens there."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def without_secrets(store_url: str) -> str:
    """Return the URL as it may be shown: no user, no password, no options."""
    scheme, separator, rest = store_url.partition("?")[0].partition("://")
    return scheme + separator + rest.rpartition("@")[2]
