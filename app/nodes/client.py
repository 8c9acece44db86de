"""The asking side: other nodes' turns, and whole requests that belong to another node.

Every request proves that it comes from a node, and for which node it is: by an HMAC with the secret
that the nodes share (``SessionLeases.secret``). The secret itself is never sent, so who listens where
a node has died learns nothing that another would take.
"""

import hashlib
import hmac
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict

import httpx2
import orjson

from app.domain.erasure import ErasureNotice
from app.domain.errors import NodeUnreachable
from app.domain.ids import SessionKey
from app.domain.lease import Node
from app.domain.turn import CancelOrder, JsonObject

PROOF_HEADER = b"x-agentpool-node"
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

    async def forget(self, node: Node, keys: Sequence[SessionKey], notice: ErasureNotice) -> None:
        question = {"sessions": [_of_key(key) for key in keys], "notice": asdict(notice)}
        await self._ask(node, "POST", "/node/forget", question)

    @asynccontextmanager
    async def forward(
        self, node: Node, method: str, target: str, headers: Headers, body: bytes | None, *, idle_s: float
    ) -> AsyncIterator[httpx2.Response]:
        """Send a request to the node and yield its answer, whose body comes as it comes.

        ``idle_s``: how long the node may send nothing.

        Raises:
            NodeUnreachable: it does not answer.
        """
        if self._client is None or node.url is None:
            raise NodeUnreachable(node)
        request = self._build(node, method, target, headers, body, idle_s)
        self.under_way += 1
        try:
            response = await self._send(request, node)
            try:
                if "x-request-id" not in response.headers:  # not of a node, or of one with another secret
                    raise NodeUnreachable(node)
                yield response
            finally:
                await response.aclose()
        finally:
            self.under_way -= 1

    def prove(self, node: Node, method: str, target: bytes) -> bytes:
        """Return the value of ``PROOF_HEADER`` for a request to ``node``."""
        words = b"\n".join((node.boot_id.encode(), method.encode(), target))
        return hmac.new(self.secret.encode(), words, hashlib.sha256).hexdigest().encode()

    def is_proof(self, given: bytes, method: str, target: bytes) -> bool:
        """Whether a request to this node with that proof comes from a node."""
        return bool(self.secret) and hmac.compare_digest(given, self.prove(self.here, method, target))

    def _build(
        self, node: Node, method: str, target: str, headers: Headers, body: bytes | None, idle_s: float
    ) -> httpx2.Request:
        assert self._client is not None
        timeout = httpx2.Timeout(idle_s, connect=CONNECT_S)
        try:
            request = self._client.build_request(
                method, f"{node.url}{target}", headers=headers, content=body, timeout=timeout
            )
        except httpx2.InvalidURL as error:
            raise NodeUnreachable(node) from error
        proof = self.prove(node, method, request.url.raw_path)  # as it is sent, not as it was written
        request.headers[PROOF_HEADER.decode()] = proof.decode()
        return request

    async def _send(self, request: httpx2.Request, node: Node) -> httpx2.Response:
        assert self._client is not None
        try:
            return await self._client.send(request, stream=True)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise NodeUnreachable(node) from error
        except httpx2.RequestError as error:
            raise NodeUnreachable(node, outcome_unknown=True) from error

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
            except (httpx2.RequestError, ValueError) as error:
                raise NodeUnreachable(node) from error
            if response.status_code != 200 or not isinstance(body, dict):
                raise NodeUnreachable(node)
            return body


def _of_key(key: SessionKey) -> JsonObject:
    return {"owner": key.owner, "session_id": key.session_id}
