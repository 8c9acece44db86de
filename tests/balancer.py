"""A small round-robin HTTP proxy, as it may stand before several nodes.

No request sticks to a node. What was sent is never sent again: a node is passed by only if it
refuses the connection. One whose ``/ready`` is not 200 gets nothing, as far as that is known.
Streams are passed on as they come.
"""

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Self

import aiohttp
from aiohttp import web

HOST = "127.0.0.1"
PROBE_S = 0.05
_START_S = 10
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host"}


class Balancer:
    """Listens on a free port, on a thread of its own. ``find_urls`` tells where the nodes are now.

    ``sent`` counts the requests of each node's URL, ``refused`` the connections.
    """

    def __init__(self, find_urls: Callable[[], Sequence[str]]) -> None:
        self._find_urls = find_urls
        self._ready: dict[str, bool] = {}
        self._next = 0
        self.sent: Counter[str] = Counter()
        self.refused = 0
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._is_over = asyncio.Event()
        self._has_started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="balancer")

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._has_started.wait(_START_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._is_over.set)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_route("*", "/{path:.*}", self._pass_on)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        async with self._open_client(), asyncio.TaskGroup() as tasks:
            probing = tasks.create_task(self._probe_for_ever())
            await runner.setup()
            site = web.TCPSite(runner, HOST, 0)
            await site.start()
            self.url = f"http://{HOST}:{runner.addresses[0][1]}"
            self._has_started.set()
            await self._is_over.wait()
            probing.cancel()
            await runner.cleanup()

    @asynccontextmanager
    async def _open_client(self) -> AsyncIterator[None]:
        # A fresh connection for each request: on a used one nobody knows what has arrived.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        patience = aiohttp.ClientTimeout(total=60)
        async with aiohttp.ClientSession(
            connector=connector, timeout=patience, auto_decompress=False
        ) as self._http:
            yield

    async def _probe_for_ever(self) -> None:
        while True:
            urls = list(self._find_urls())
            answers = await asyncio.gather(*(self._probe(url) for url in urls))
            self._ready = dict(zip(urls, answers, strict=True))
            with suppress(TimeoutError):
                async with asyncio.timeout(PROBE_S):
                    await self._is_over.wait()

    async def _probe(self, url: str) -> bool:
        try:
            async with self._http.get(f"{url}/ready", timeout=aiohttp.ClientTimeout(total=1)) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    def _pick(self, tried: set[str]) -> str | None:
        """Return the next node in turn that takes requests, or, if none does, one that was not tried."""
        urls = [url for url in self._find_urls() if url not in tried]
        fit = [url for url in urls if self._ready.get(url, True)] or urls
        if not fit:
            return None
        self._next += 1
        return fit[self._next % len(fit)]

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        tried: set[str] = set()
        while (url := self._pick(tried)) is not None:
            tried.add(url)
            try:
                answer = await self._send(request, url, body)
            except aiohttp.ClientConnectorError:
                self.refused += 1
                continue
            async with answer:
                self.sent[url] += 1
                return await self._answer(request, answer)
        return web.Response(status=502)

    async def _send(self, request: web.Request, url: str, body: bytes) -> aiohttp.ClientResponse:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
        return await self._http.request(
            request.method, url + request.path_qs, data=body or None, headers=headers, allow_redirects=False
        )

    async def _answer(self, request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP}
        if "text/event-stream" not in answer.content_type:
            return web.Response(status=answer.status, body=await answer.read(), headers=kept)
        passed = web.StreamResponse(status=answer.status, headers=kept)
        await passed.prepare(request)
        async for part in answer.content.iter_any():
            await passed.write(part)
        await passed.write_eof()
        return passed
