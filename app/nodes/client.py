"""The asking side: other nodes' turns, and whole requests that belong to another node.

Every request carries the secret that the nodes share (``SessionLeases.secret``); it is sent to
no address but those that nodes have stored themselves.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2
import orjson

from app.domain.errors import RunsElsewhere
from app.domain.ids import SessionKey
from app.domain.lease import Node
from app.domain.turn import CancelOrder, JsonObject

SECRET_HEADER = "X-AgentPool-Node"  # noqa: S105  # the header's name
HOPS_HEADER = "X-AgentPool-Hops"
CONNECT_S = 1.0
ASK_S = 2.0
"""For an answer that a healthy node gives in a few milliseconds."""

Headers = list[tuple[bytes, bytes]]


class NodeClient:
    """One client for all nodes; ``here`` is this process."""

    def __init__(self, here: Node) -> None:
        self.here = here
        self.secret = ""
        self.under_way = 0
        """How many requests other nodes are answering."""
        self._client: httpx2.AsyncClient | None = None

    def open(self, secret: str) -> None:
        """Begin to ask, with the secret that all nodes know."""
        self.secret = secret
        # No proxy and no certificate of the environment's: nodes are neighbours.
        self._client = httpx2.AsyncClient(
            trust_env=False,
            follow_redirects=False,
            timeout=httpx2.Timeout(ASK_S, connect=CONNECT_S),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=32),
        )

    async def close(self) -> None:
        """End what is under way. May be called twice."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def stats_of(self, node: Node) -> JsonObject:
        return await self._ask(node, "GET", "/agent-stats")

    async def has_live(self, node: Node, key: SessionKey) -> bool:
        return bool((await self._ask(node, "POST", "/node/live", _of_key(key))).get("live"))

    async def turns_of(self, node: Node, key: SessionKey) -> tuple[str, ...]:
        return await self._ask_turns(node, "/node/turns", _of_key(key))

    async def cancel(self, node: Node, key: SessionKey, order: CancelOrder) -> tuple[str, ...]:
        asked = {
            "reason": order.reason.value,
            "keep_partial": order.keep_partial,
            "turn_id": order.turn_id,
            "all": order.all,
        }
        return await self._ask_turns(node, "/node/cancel", _of_key(key) | asked)

    @asynccontextmanager
    async def forward(
        self, node: Node, method: str, target: str, headers: Headers, body: bytes | None, *, idle_s: float
    ) -> AsyncIterator[httpx2.Response]:
        """Send a request to the node and yield its answer, whose body comes as it comes.

        ``idle_s``: how long the node may send nothing.

        Raises:
            RunsElsewhere: it does not answer.
        """
        if self._client is None or node.url is None:
            raise RunsElsewhere(node)
        request = self._client.build_request(
            method,
            node.url + target,
            headers=[*headers, (SECRET_HEADER.encode(), self.secret.encode())],
            content=body,
            timeout=httpx2.Timeout(idle_s, connect=CONNECT_S),
        )
        self.under_way += 1
        try:
            response = await self._send(request, node)
            try:
                yield response
            finally:
                await response.aclose()
        finally:
            self.under_way -= 1

    async def _send(self, request: httpx2.Request, node: Node) -> httpx2.Response:
        assert self._client is not None
        try:
            return await self._client.send(request, stream=True)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise RunsElsewhere(node) from error
        except httpx2.TransportError as error:
            raise RunsElsewhere(node, outcome_unknown=True) from error

    async def _ask_turns(self, node: Node, path: str, question: JsonObject) -> tuple[str, ...]:
        answer = await self._ask(node, "POST", path, question)
        return tuple(str(turn_id) for turn_id in answer.get("turns", ()))

    async def _ask(
        self, node: Node, method: str, path: str, question: JsonObject | None = None
    ) -> JsonObject:
        """Return the JSON object that the node answers."""
        content = None if question is None else orjson.dumps(question)
        headers = [(b"content-type", b"application/json")] if content is not None else []
        async with self.forward(node, method, path, headers, content, idle_s=ASK_S) as response:
            try:
                body = orjson.loads(await response.aread())
            except (httpx2.TransportError, ValueError) as error:
                raise RunsElsewhere(node) from error
            if response.status_code != 200 or not isinstance(body, dict):
                raise RunsElsewhere(node)
            return body


def _of_key(key: SessionKey) -> JsonObject:
    return {"owner": key.owner, "session_id": key.session_id}
