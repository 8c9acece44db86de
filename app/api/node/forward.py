"""A request that belongs to another node goes there as it came, and the answer comes back as it is."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from functools import partial
from typing import Any, Protocol

import orjson
from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.api.departure import ClientLeft, client_watched, ended_by
from app.api.errors import problem_response
from app.api.exchange import HOPS_KEY, Exchange, Missing, exchange_of
from app.domain.errors import Draining, NodeUnreachable, RunsElsewhere
from app.domain.lease import Node
from app.services import Services

MAX_HOPS = 3
"""A turn may end, and another node take the session, while a request is on its way."""
ANSWER_S = 900.0
"""For a whole answer: the longest turn that is usual, and its wait."""
SILENT_HEARTBEATS = 3
_HOP_BY_HOP = frozenset(
    {b"connection", b"keep-alive", b"transfer-encoding", b"te", b"trailer", b"upgrade", b"proxy-connection"}
)
_NOT_SENT = _HOP_BY_HOP | {b"host", b"content-length", b"x-request-id", b"accept-encoding", b"expect"}
_NOT_PASSED = _HOP_BY_HOP | {b"x-request-id", b"date", b"server"}

Headers = list[tuple[bytes, bytes]]

_log = logging.getLogger(__name__)


class Answer(Protocol):
    """What another node says."""

    status_code: int

    @property
    def headers(self) -> Any: ...

    def aiter_raw(self) -> AsyncIterator[bytes]: ...


class Forwarder(Protocol):
    """How a request gets to another node."""

    def forward(
        self, node: Node, method: str, target: str, headers: Headers, body: bytes | None, *, idle_s: float
    ) -> AbstractAsyncContextManager[Answer]: ...


def install_forwarding(app: FastAPI, forwarder: Forwarder) -> None:
    """Have requests answered by the node that ``RunsElsewhere`` names.

    And by any other one what was not begun here because this node drains.
    """

    async def forward(request: Request, error: Exception) -> Response:
        assert isinstance(error, RunsElsewhere)
        return await _forward(forwarder, error.node, error, request)

    async def pass_on(request: Request, error: Exception) -> Response:
        assert isinstance(error, Draining)
        services: Services = request.app.state.services
        node = await services.chat.find_successor() if error.turn_id is None else None
        return await _forward(forwarder, node, error, request)

    app.add_exception_handler(RunsElsewhere, forward)
    app.add_exception_handler(Draining, pass_on)


async def _forward(
    forwarder: Forwarder, node: Node | None, error: RunsElsewhere | Draining, request: Request
) -> Response:
    """Return the node's answer, or ``error`` if it cannot be asked."""
    exchange = exchange_of(request.scope)
    hops: int = request.scope.get(HOPS_KEY, 0)
    if node is None or node.url is None or hops >= MAX_HOPS:
        return problem_response(error, exchange)
    exchange.quotas.clear()  # the other node tells of the limits on turns
    exchange.turn_id = None  # of the turn that was not to be; the other node's answer names its own
    try:
        answer = await _ask(forwarder, node, request, exchange, hops)
        exchange.deed = None  # in that node's audit log
        return answer
    except NodeUnreachable as failure:
        return problem_response(failure if failure.outcome_unknown else error, exchange)


async def _ask(forwarder: Forwarder, node: Node, request: Request, exchange: Exchange, hops: int) -> Response:
    scope = request.scope
    query: bytes = scope["query_string"]
    stack = AsyncExitStack()
    services: Services = request.app.state.services
    async with client_watched(request.receive), node_watched(services, node):
        answer = await stack.enter_async_context(
            forwarder.forward(
                node,
                scope["method"],
                exchange.path + (f"?{query.decode('latin-1')}" if query else ""),
                _headers_to_send(scope, exchange, hops),
                None if isinstance(exchange.body, Missing) else orjson.dumps(exchange.body),
                idle_s=_patience(scope, request),
            )
        )
    return ForwardedResponse(answer, stack, lambda: node_watched(services, node))


def node_watched(services: Services, node: Node) -> AbstractAsyncContextManager[None]:
    """Run the block while the node is there; cancel it when others do not hear of it any more.

    Raises:
        NodeUnreachable: so it was; whatever it was asked to do may have happened.
    """
    return ended_by(partial(services.admin.wait_gone, node), NodeUnreachable(node, outcome_unknown=True))


class ForwardedResponse(Response):
    """Another node's answer, passed on as it comes; what it came from is closed with it."""

    def __init__(
        self,
        answer: Answer,
        source: AsyncExitStack,
        watched: Callable[[], AbstractAsyncContextManager[None]],
    ) -> None:
        self.status_code = answer.status_code
        self.background = None
        self.raw_headers = [
            (name.lower(), value) for name, value in answer.headers.raw if name.lower() not in _NOT_PASSED
        ]
        self._answer = answer
        self._source = source
        self._watched = watched

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._source:
            try:
                async with client_watched(receive), self._watched():
                    start = {"type": "http.response.start", "status": self.status_code}
                    await send({**start, "headers": self.raw_headers})
                    async for part in self._answer.aiter_raw():
                        await send({"type": "http.response.body", "body": part, "more_body": True})
                    await send({"type": "http.response.body", "body": b""})
            except (ClientLeft, OSError):
                pass
            except Exception as error:
                # Without its last part the server breaks the answer off, and the client comes again.
                _log.warning("another node broke its answer off: %r", error)


def _headers_to_send(scope: Scope, exchange: Exchange, hops: int) -> Headers:
    kept = [(name, value) for name, value in scope["headers"] if name not in _NOT_SENT]
    return [*kept, (b"x-request-id", exchange.request_id.encode()), (b"x-agentpool-hops", b"%d" % (hops + 1))]


def _patience(scope: Scope, request: Request) -> float:
    if scope["path"].endswith("/stream") or b"stream=true" in scope["query_string"]:
        return float(SILENT_HEARTBEATS * request.app.state.api_options.heartbeat_s)
    return ANSWER_S
