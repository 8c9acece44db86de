"""Who is a node: the secret in a header, compared before anything else is done."""

import hmac
from typing import Protocol

from starlette.types import ASGIApp, Receive, Scope, Send

HOPS_KEY = "agentpool.hops"
"""In the scope of a request that another node forwarded: how often it has been."""

_SECRET = b"x-agentpool-node"
_HOPS = b"x-agentpool-hops"
_OURS = frozenset({_SECRET, _HOPS})


class Link(Protocol):
    """What this process knows of being a node; ``secret`` is empty until the store is open."""

    @property
    def secret(self) -> str: ...


class NodeGate:
    """Pure ASGI middleware: takes the nodes' own headers off, and marks requests of nodes.

    On ``private_port`` strangers get an empty 404: they see whether somebody listens, and no more.
    """

    def __init__(self, app: ASGIApp, link: Link, private_port: int | None) -> None:
        self._app = app
        self._link = link
        self._private_port = private_port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = {name: value for name, value in scope["headers"] if name in _OURS}
            if given:
                scope["headers"] = [header for header in scope["headers"] if header[0] not in _OURS]
            if self._is_node(given.get(_SECRET, b"")):
                hops = given.get(_HOPS, b"0")
                scope[HOPS_KEY] = int(hops) if hops.isdigit() else 0
            elif self._private_port is not None and self._port_of(scope) == self._private_port:
                await send({"type": "http.response.start", "status": 404, "headers": []})
                await send({"type": "http.response.body", "body": b""})
                return
        await self._app(scope, receive, send)

    def _is_node(self, given: bytes) -> bool:
        secret = self._link.secret.encode()
        return bool(secret) and hmac.compare_digest(given, secret)

    def _port_of(self, scope: Scope) -> int | None:
        server = scope.get("server")
        return server[1] if server else None
