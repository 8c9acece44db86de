"""An ASGI connection by hand: what the client sends and does, and what it got."""

import asyncio
import json
from typing import Any

GONE = {"type": "http.disconnect"}


def part(body: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def http_scope(method: str = "GET", path: str = "/x", headers: dict[str, str] | None = None, **more) -> Any:
    raw, _, query = path.partition("?")
    return {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": raw,
        "raw_path": raw.encode("latin-1"),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [
            (k.lower().encode(), v.encode("latin-1")) for k, v in {"host": "x", **(headers or {})}.items()
        ],
        **more,
    }


class Wire:
    """Gives ``events`` in order, then waits for ``hang_up``; keeps what was sent."""

    def __init__(self, *events: dict[str, Any]) -> None:
        self._events = list(events)
        self._gone = asyncio.Event()
        self.received = 0
        self.sent: list[dict[str, Any]] = []
        self.arrived = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        if self._events:
            self.received += 1
            return self._events.pop(0)
        await self._gone.wait()
        return GONE

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        self.arrived.set()

    def hang_up(self) -> None:
        self._gone.set()

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def writes(self) -> list[bytes]:
        return [message["body"] for message in self.sent[1:]]

    @property
    def body(self) -> bytes:
        return b"".join(self.writes)

    @property
    def problem(self) -> dict[str, Any]:
        assert self.headers["content-type"] == "application/problem+json"
        return json.loads(self.body)

    @property
    def is_complete(self) -> bool:
        return bool(self.sent) and not self.sent[-1].get("more_body", False)


class PushingWire(Wire):
    """A connection that takes parts of the body at once, while ``takes``."""

    def __init__(self) -> None:
        super().__init__()
        self.takes = True
        self.pushed: list[bytes] = []

    def push(self, body: bytes) -> bool:
        if self.takes:
            self.pushed.append(body)
            self.sent.append({"body": body, "more_body": True})
        return self.takes
