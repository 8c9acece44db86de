"""Who is a node: a proof in a header, checked before anything else is done."""

from typing import Protocol

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.exchange import HOPS_KEY

_PROOF = b"x-agentpool-node"
_HOPS = b"x-agentpool-hops"
_OURS = frozenset({_PROOF, _HOPS})


class Link(Protocol):
    """What this process knows of being a node."""

    def is_proof(self, given: bytes, method: str, target: bytes) -> bool:
        """Whether a request to this node with that proof comes from a node."""


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
            if self._is_node(given.get(_PROOF, b""), scope):
                hops = given.get(_HOPS, b"0")
                scope[HOPS_KEY] = int(hops) if hops.isdigit() else 0
            elif self._private_port is not None and self._port_of(scope) == self._private_port:
                await send({"type": "http.response.start", "status": 404, "headers": []})
                await send({"type": "http.response.body", "body": b""})
                return
        await self._app(scope, receive, send)

    def _is_node(self, given: bytes, scope: Scope) -> bool:
        query: bytes = scope["query_string"]
        target = scope.get("raw_path", b"").partition(b"?")[0] + (b"?" + query if query else b"")
        return bool(given) and self._link.is_proof(given, scope["method"], target)

    def _port_of(self, scope: Scope) -> int | None:
        server = scope.get("server")
        return server[1] if server else None
