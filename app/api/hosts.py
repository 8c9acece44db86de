"""Whom a request is meant for, which it says once; if the operator names hosts, it is one of those."""

import re
from collections.abc import Iterable
from functools import lru_cache
from ipaddress import ip_address
from typing import Final

from starlette.types import Scope

from app.api.errors import InvalidFields, MalformedRequest

PROBES: Final = frozenset({"/health", "/ready"})
"""Asked by whatever address a process has today, and telling nobody a secret: any host will do, as for
Rails' ``/up``."""

REMEMBERED = 64

_NAME = re.compile(r"(?:\*\.)?[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]*)(?::[0-9]*)?")
_NO_ADDRESS = ":"
_ONE_HOST = "The Host header must be given once."
# Of two of these, two readers could take different ones.
_ONCE: Final = {
    b"host": "Host",
    b"idempotency-key": "Idempotency-Key",
    b"if-match": "If-Match",
    b"last-event-id": "Last-Event-ID",
}
_VERSIONS = frozenset({"1.1", "1.0", "2", "3"})


class Hosts:
    """The names by which the server may be addressed; none: any.

    Each is a name, an address, or ``*.suffix`` for all names below it. Case and port do not matter.

    Raises:
        ValueError: one is something else.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        given = [_plain(name) for name in names]
        self._exact = {name for name in given if not name.startswith("*")}
        self._suffixes = tuple(name[1:] for name in given if name.startswith("*"))
        self._is_ours = lru_cache(REMEMBERED)(self._is_name_of_ours)  # 3 us, for each request of a client

    def check(self, scope: Scope, route_path: str) -> None:
        """Refuse a request that is not for this server, or of which that cannot be said.

        Raises:
            MalformedRequest
            InvalidFields: another header that may be given once is repeated.
        """
        names = [name for name, _ in scope["headers"]]
        if len(distinct := set(names)) != len(names):
            _check_repeated(name for name in distinct if names.count(name) > 1)
        version: str = scope.get("http_version", "1.1")
        if version == "1.1" and b"host" not in distinct:
            raise MalformedRequest(_ONE_HOST)
        if version not in _VERSIONS:
            raise MalformedRequest("The request must be of HTTP/1.1.")
        is_free = not (self._exact or self._suffixes) or route_path in PROBES
        if not is_free and not self._is_ours(dict(scope["headers"]).get(b"host", b"")):
            raise MalformedRequest("The Host header names none of this server's hosts.")

    def _is_name_of_ours(self, host: bytes) -> bool:
        match = _HOST.fullmatch(host.decode("latin-1").lower())
        name = _plain_address(match[1]).removesuffix(".") if match else ""
        return name in self._exact or name.endswith(self._suffixes or ("/",))


def _check_repeated(names: Iterable[bytes]) -> None:
    if b"host" in (repeated := _ONCE.keys() & set(names)):
        raise MalformedRequest(_ONE_HOST)
    if repeated:
        raise InvalidFields([(_ONCE[name], "must be given once") for name in sorted(repeated)])


def _plain(name: str) -> str:
    plain = _plain_address(name.lower())
    if plain == _NO_ADDRESS or (":" not in plain and not _NAME.fullmatch(plain)):
        raise ValueError("each is a name, an address or *.name, without a port")
    return plain


def _plain_address(host: str) -> str:
    """Return an IPv6 address as it is usually written, without brackets; anything else as it is."""
    if ":" not in host:
        return host
    try:
        return str(ip_address(host.removeprefix("[").removesuffix("]")))
    except ValueError:
        return _NO_ADDRESS
