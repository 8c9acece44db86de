"""Nodes behind a round-robin proxy are restarted one after the other under load: no request fails."""

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import pytest

from tests.acceptance.cluster_load import last_of, open_http
from tests.acceptance.history import Op, check, messages_of, text_of
from tests.balancer import Balancer
from tests.cluster import Cluster, says
from tests.modelserver import ModelServer
from tests.storeserver import StoreServer

CLIENTS = 16
RESTARTS = 2
"""Of each node."""

_log = logging.getLogger(__name__)


@dataclass
class Guest:
    """Talks through the balancer, plain or streamed, and reads in between; sends nothing twice."""

    number: int
    url: str
    ops: list[Op] = field(default_factory=list)
    failed: list[Any] = field(default_factory=list)
    longest_s: float = 0.0

    async def talk(self, http: aiohttp.ClientSession, is_over: asyncio.Event) -> None:
        chance, count = Random(self.number), 0
        while not is_over.is_set():
            count += 1
            await self._say(http, f"g{self.number}-{count // 20}", count, streamed=chance.random() < 0.5)
            await self._read(http, f"/sessions/g{self.number}-{count // 20}/history")

    async def _say(self, http: aiohttp.ClientSession, session: str, count: int, *, streamed: bool) -> None:
        said = f"re {text_of(session, count)}"
        text = text_of(session, count, says(said, chunks=3, delay_s=0.05 + 0.1 * (self.number % 4)))
        body, began = {"session_id": session, "message": text}, time.monotonic()
        path = "/chat/stream" if streamed else "/chat"
        try:
            async with http.post(self.url + path, json=body) as response:
                status, raw = response.status, await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self.failed.append((path, repr(error), time.monotonic()))
            return
        self.longest_s = max(self.longest_s, time.monotonic() - began)
        end = last_of(raw)
        if status != 200 or "reply" not in end:
            self.failed.append((path, status, end, time.monotonic()))
            return
        turn_id = end["turn_id"]
        op = Op(began, time.monotonic(), session, text, "ok", turn_id=turn_id, reply=end["reply"])
        self.ops.append(op)

    async def _read(self, http: aiohttp.ClientSession, path: str) -> None:
        try:
            async with http.get(self.url + path) as response:
                if response.status != 200:
                    self.failed.append((path, response.status, json.loads(await response.read())))
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self.failed.append((path, repr(error), time.monotonic()))


@pytest.fixture
def cluster(store_server: StoreServer, tmp_path: Path) -> Iterator[Cluster]:
    with ExitStack() as stack:
        model = stack.enter_context(ModelServer())
        settings = {"DRAIN_TIMEOUT_S": "10"}
        yield stack.enter_context(Cluster(tmp_path, [store_server.url] * 2, model, **settings))


async def restart_in_turn(cluster: Cluster, guests: list[Guest]) -> list[float]:
    """Restart one node after the other while the guests talk; return how long each took to end."""
    drains_s = []
    for number in [*range(len(cluster.nodes))] * RESTARTS:
        await until_more(guests, 50)
        node, began = cluster.nodes[number], time.monotonic()
        await asyncio.to_thread(node.stop)
        drains_s.append(time.monotonic() - began)
        await asyncio.to_thread(node.start)
    await until_more(guests, 50)
    return drains_s


async def until_more(guests: list[Guest], count: int) -> None:
    """Return when so many more turns have been answered."""
    goal = sum(len(guest.ops) for guest in guests) + count
    async with asyncio.timeout(60):
        while sum(len(guest.ops) for guest in guests) < goal:
            await next_tick()


async def next_tick() -> None:
    over = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(0.02, over.set_result, None)
    await over


@pytest.mark.timeout(300)
def test_a_rolling_restart_fails_no_request(cluster: Cluster) -> None:
    """Sixteen clients hear of no restart: every turn is answered, every history read, nothing is lost."""

    async def scene(url: str) -> tuple[list[Guest], list[float]]:
        guests = [Guest(number, url) for number in range(CLIENTS)]
        is_over = asyncio.Event()
        async with open_http() as http, asyncio.TaskGroup() as tasks:
            for guest in guests:
                tasks.create_task(guest.talk(http, is_over))
            try:
                drains_s = await restart_in_turn(cluster, guests)
            finally:
                is_over.set()
        return guests, drains_s

    with Balancer(lambda: cluster.urls) as balancer:
        guests, drains_s = asyncio.run(scene(balancer.url))
        refused, sent = balancer.refused, Counter(balancer.sent)
    ops = [op for guest in guests for op in guest.ops]
    longest_s = max(guest.longest_s for guest in guests)
    _log.info("%d turns, %d refused, drains %s, longest %.2f s", len(ops), refused, drains_s, longest_s)
    assert [fault for guest in guests for fault in guest.failed] == []
    sessions = {op.session for op in ops}
    assert check(ops, {session: messages_of(cluster.history(session)) for session in sessions}) == []
    assert "Traceback" not in cluster.logs()
    # That each node had its share, old or new.
    assert len(sent) == 2 * (1 + RESTARTS)
    assert min(sent.values()) > 20
