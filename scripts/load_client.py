"""The two routes of the API, as a client measures them.

Times are in seconds and count from ``began``, which is when the turn should have begun, not
when a connection was free for it: what a server makes its clients wait is never left out.
"""

import argparse
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import cycle, pairwise
from typing import Any

import aiohttp
import orjson
from load_session import Answer

# What may break on the way, or in an answer that is not one, beside what the server itself refuses.
BREAKS = (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError)


class TurnError(Exception):
    """A turn did not finish; ``code`` is the server's, or says what broke the connection."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@dataclass(slots=True)
class Timed:
    """An answer and how long it took; ``first_token_s``, ``gaps_s`` and ``deltas`` when it was streamed."""

    answer: Answer
    latency_s: float
    first_token_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    deltas: int = 0


class Client:
    """Asks a server, or the nodes of one store by turns, so that no session stays with one.

    ``bases`` are their addresses with the prefix that the routes are mounted under.
    """

    def __init__(self, http: aiohttp.ClientSession, bases: Sequence[str]) -> None:
        self._http = http
        self._bases = cycle(bases)
        self._first = bases[0]

    async def ask(self, body: dict[str, Any], is_streamed: bool, began: float) -> Timed:
        """Carry out one turn.

        Raises:
            TurnError: it did not finish.
        """
        try:
            return await (self._chat_stream(body, began) if is_streamed else self._chat(body, began))
        except BREAKS as error:
            raise TurnError(f"client: {type(error).__name__}") from error

    async def find_stats(self) -> dict[str, Any] | None:
        """Return the (first node's) pool's statistics, ``None`` where they are not for us to read."""
        async with self._http.get(f"{self._first}/agent-stats") as response:
            return orjson.loads(await response.read()) if response.status == 200 else None

    async def _chat(self, body: dict[str, Any], began: float) -> Timed:
        async with self._http.post(f"{next(self._bases)}/chat", json=body) as response:
            await refuse_problem(response)
            answer = to_answer(orjson.loads(await response.read()))
            return Timed(answer, time.perf_counter() - began)

    async def _chat_stream(self, body: dict[str, Any], began: float) -> Timed:
        text: list[str] = []
        arrivals: list[float] = []
        started: dict[str, Any] = {}
        async with self._http.post(f"{next(self._bases)}/chat/stream", json=body) as response:
            await refuse_problem(response)
            async for event in read_events(response):
                kind = event["type"]
                if kind == "text.delta":
                    arrivals.append(time.perf_counter())
                    text.append(event["text"])
                elif kind == "turn.started":
                    started = event
                elif kind in ("turn.failed", "turn.cancelled"):
                    raise TurnError(event.get("code", kind))
                elif kind == "turn.finished":
                    if event["reply"] != "".join(text):
                        raise TurnError("client: the deltas are not the reply")
                    return to_timed(to_answer(started | event), began, arrivals)
        raise TurnError("client: the stream ended early")


def to_timed(answer: Answer, began: float, arrivals: list[float]) -> Timed:
    gaps = [later - earlier for earlier, later in pairwise(arrivals)]
    first = arrivals[0] - began if arrivals else None
    return Timed(answer, time.perf_counter() - began, first, gaps, len(arrivals))


async def read_events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in response.content:
        if line.startswith(b"data:"):
            yield orjson.loads(line[5:])


async def refuse_problem(response: aiohttp.ClientResponse) -> None:
    if response.status == 200:
        return
    try:
        code = str(orjson.loads(await response.read())["code"])
    except (ValueError, LookupError, TypeError):
        code = f"client: status {response.status} without a problem document"
    raise TurnError(code)


def to_answer(data: dict[str, Any]) -> Answer:
    try:
        return Answer(**{name: data[name] for name in Answer.__slots__})
    except KeyError as missing:
        raise TurnError(f"client: the answer has no {missing}") from None


@asynccontextmanager
async def open_client(options: argparse.Namespace) -> AsyncIterator[Client]:
    headers = dict(header.split(":", 1) for header in options.header)
    async with aiohttp.ClientSession(
        headers={name.strip(): value.strip() for name, value in headers.items()},
        # No limit: who waits for a connection here would not be waiting for the server.
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=options.timeout),
        json_serialize=lambda body: orjson.dumps(body).decode(),
        read_bufsize=2**22,
    ) as http:
        prefix = options.prefix.rstrip("/")
        yield Client(http, [url.rstrip("/") + prefix for url in options.url.split(",")])
